"""`./dev demo`: three real nodes, the story, and a cluster to play with until Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from controlplane.cli.errors import CliError
from tests.lab import signals
from tests.lab.api import LabApi
from tests.lab.cluster import Lab, LabPlan
from tests.lab.layout import KEPT_LOG_DIR, LabError
from tests.lab.state import LabState, login_lines
from tests.lab.story import Story

Say = Callable[[str], None]


def run_demo(say: Say, *, once: bool) -> int:
    """Build a lab, tell the story in it and, unless ``once``, keep it until Ctrl-C."""
    started = time.monotonic()
    lab = Lab(LabPlan(), say)
    say("building a control plane and three nodes on this machine (Ctrl-C removes all of it)")
    try:
        built = lab.up()
        say(f"the cluster is up after {time.monotonic() - started:.1f} s")
        tell(lab.api(), _tell_line)
        _show_access(built)
        if not once:
            _tell_line("\nIt stays up until Ctrl-C.")
            wait_for_the_end()
    except CliError as error:
        raise LabError(f"the API: {error}; the logs are in {KEPT_LOG_DIR}") from error
    finally:
        say("removing the cluster")
        lab.down()
        say("nothing is left")
    return 0


def tell(api: LabApi, say: Say) -> None:
    """Tell the story with its summary; both demos end in this."""
    started = time.monotonic()
    story = Story(api, say)
    story.tell()
    say(f"\n== Summary, after {time.monotonic() - started:.1f} s of story")
    for line in [*story.summary(), *REMARKS]:
        say(line)


REMARKS: Sequence[str] = (
    "times run from the request to the end of its operation, as a client sees them",
    "what happens when a node dies is not part of this version",
)


def wait_for_the_end() -> None:
    """Return at Ctrl-C or SIGTERM."""
    try:
        while True:
            signal.pause()
    except signals.Interrupted:
        return


def _show_access(built: LabState) -> None:
    _tell_line(f"\n== Yours now: {built.api[0]} (CA {built.ca}, token in {built.token})")
    for line in (*login_lines(built), "novacron vm ls", "novacron node ls", "novacron top"):
        _tell_line(f"  {line}")


def _tell_line(text: str) -> None:
    print(text, flush=True)
