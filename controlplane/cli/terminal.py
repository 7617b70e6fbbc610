"""The CLI's edge to the outside that is not the network: streams, time, and Ctrl-C while waiting.

Data goes to stdout and everything else to stderr, so that output can be piped. Colour and cursor
movement are used on a terminal only, and never with ``NO_COLOR``. This is the one place of the CLI
that reads a clock or sleeps; tests hand in another.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TextIO

CLEAR_SCREEN = "\x1b[2J\x1b[H"
CLEAR_LINE = "\r\x1b[K"


class Terminal:
    """Standard streams and the machine's clocks."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._held: list[str] | None = None

    @property
    def err(self) -> TextIO:
        return self._err

    @property
    def stdout_is_tty(self) -> bool:
        return self._out.isatty()

    @property
    def stderr_is_tty(self) -> bool:
        return self._err.isatty()

    @property
    def stdin_is_tty(self) -> bool:
        return sys.stdin is not None and sys.stdin.isatty()

    @property
    def coloured(self) -> bool:
        return self.stdout_is_tty and not os.environ.get("NO_COLOR")

    def print(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text + "\n")
            return
        self._out.write(text + "\n")
        self._out.flush()

    def print_bytes(self, data: bytes) -> None:
        """Write bytes as they are; a guest's console knows no encoding."""
        self._out.flush()
        self._out.buffer.write(data)
        self._out.flush()

    def abandon_stdout(self) -> None:
        """Let the interpreter end quietly after the reader of stdout has gone."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def tell(self, text: str) -> None:
        """Say something to the person, beside the data."""
        self._err.write(text + "\n")
        self._err.flush()

    def status(self, text: str) -> None:
        """Replace the line at the cursor; only for a terminal."""
        self._err.write(CLEAR_LINE + text)
        self._err.flush()

    @contextlib.contextmanager
    def picture(self) -> Iterator[None]:
        """Show what is printed inside at once, on a terminal in place of what was there.

        Shown at once so that the screen is never empty while answers are on their way.
        """
        self._held = []
        try:
            yield
        finally:
            text, self._held = "".join(self._held), None
            if text:
                self._out.write(CLEAR_SCREEN + text if self.stdout_is_tty else text)
                self._out.flush()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
