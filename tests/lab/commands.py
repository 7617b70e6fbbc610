"""Run one short system command, with its output in the error when it fails."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from tests.lab.layout import LabError

# `ip`, `nft` and `nsenter` answer in milliseconds; a minute means that the machine hangs.
COMMAND_LIMIT_S = 60.0


def run(*arguments: str | int) -> str:
    """Run a command and return what it printed; raises LabError with its words when it fails."""
    outcome = attempt(*arguments)
    if outcome.returncode != 0:
        said = (outcome.stderr or outcome.stdout).strip()
        raise LabError(f"`{' '.join(map(str, arguments))}` failed: {said}")
    return outcome.stdout


def attempt(*arguments: str | int) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail and return its outcome."""
    words: Sequence[str] = [str(a) for a in arguments]
    return subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
