"""Processes as the kernel shows them: which one is meant, whether it lives, how it is ended.

A process is named by its pid and start time, since a pid alone may have gone to a stranger by the
time somebody acts on it. Never ends a process by its name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from msgspec import Struct

# The kernel ends a killed process within milliseconds; one in uninterruptible sleep may take
# seconds on a slow disk.
KILL_WAIT_S = 15.0
POLL_S = 0.02


class ProcessKey(Struct, frozen=True, order=True):
    """A process that cannot be mistaken for another; ``started`` is in clock ticks since boot."""

    pid: int
    started: int


def key_of(pid: int) -> ProcessKey | None:
    """Return the key of a living process; None for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return ProcessKey(pid, int(fields[19]))


def is_alive(key: ProcessKey) -> bool:
    """Tell whether this very process still runs (or is stopped, but not dead)."""
    return key_of(key.pid) == key


def send(key: ProcessKey, number: signal.Signals) -> None:
    """Send a signal to this very process; does nothing when it is gone."""
    if is_alive(key):
        with contextlib.suppress(ProcessLookupError):
            os.kill(key.pid, number)


def kill_all(find: Callable[[], Iterable[ProcessKey]]) -> None:
    """Kill what ``find`` returns until it returns nothing.

    It looks again each time, since a process may have forked meanwhile. Raises TimeoutError.
    """
    deadline = time.monotonic() + KILL_WAIT_S
    while living := [key for key in find() if is_alive(key)]:
        for key in living:
            send(key, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes that do not die: {living}")
        time.sleep(POLL_S)


def find_by_mount(marker: str) -> list[ProcessKey]:
    """Return the processes whose mount namespace shows a mount of a source named ``marker``.

    Only those in other mount namespaces than ours are looked at: the lab mounts nothing in it.
    """
    own = Path("/proc/self/ns/mnt").readlink()
    found = []
    for pid in _pids():
        try:
            if Path(f"/proc/{pid}/ns/mnt").readlink() == own:
                continue
            shown = marker in Path(f"/proc/{pid}/mountinfo").read_text()
        except OSError:
            continue
        key = key_of(pid) if shown else None
        if key is not None:
            found.append(key)
    return found


def find_by_environment(assignment: str) -> list[ProcessKey]:
    """Return the processes other than this one that were started with ``NAME=value``."""
    wanted = assignment.encode()
    found = []
    for pid in _pids():
        try:
            shown = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        key = key_of(pid) if shown else None
        if key is not None and pid != os.getpid():
            found.append(key)
    return found


def _pids() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
