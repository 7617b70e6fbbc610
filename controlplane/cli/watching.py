"""``--watch``: the same view again and again until Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from controlplane.cli.errors import ApiProblem, Exit, Unreachable
from controlplane.cli.terminal import Terminal


def show(terminal: Terminal, view: Callable[[], None], *, watch: bool, interval_s: float) -> None:
    """Call ``view`` once, or until Ctrl-C; on a terminal each picture replaces the last.

    A watch outlives an answer that fails for now, such as between two leaders.
    """
    if not watch:
        view()
        return
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _show_once(terminal, view)
            terminal.sleep(interval_s)


def _show_once(terminal: Terminal, view: Callable[[], None]) -> None:
    try:
        with terminal.picture():
            view()
    except (Unreachable, ApiProblem) as error:
        if error.exit_with() is not Exit.UNREACHABLE:
            raise
        terminal.tell(f"{error}; trying again")
