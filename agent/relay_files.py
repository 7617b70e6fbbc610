"""The files by which relays are found again: which process has a name, under its directory.

A process is named by pid, start time and boot, since a pid alone may have gone to a stranger by the
time somebody acts on it. A file appears with its content or not at all, and never replaces another:
who made it has the name. Nothing here is durable: no process outlives a crash of the machine.
Standard library only, since relay processes use it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
# Long past every limit of a process that still holds a list with the token.
USED_KEPT_S = 3600.0


class ProcessKey(NamedTuple):
    """A process that cannot be mistaken for another; ``started`` is in clock ticks since boot."""

    pid: int
    started: int
    boot: str


# Holds a name for nobody.
NOBODY = ProcessKey(0, 0, "")


def used_file(directory: Path, name: str) -> Path:
    """The mark that a token was used, by the process in it, or revoked, by nobody."""
    return directory / f"{name}.used"


def dial_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.dial"


def socket_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.sock"


def key_of(pid: int) -> ProcessKey | None:
    """Return the key of a living process; None for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything.
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return ProcessKey(pid, int(fields[19]), BOOT_ID_FILE.read_text(encoding="ascii").strip())


def own_key() -> ProcessKey:
    key = key_of(os.getpid())
    assert key is not None, "who asks is alive"
    return key


def lives(key: ProcessKey) -> bool:
    return key != NOBODY and key_of(key.pid) == key


def claim(path: Path, key: ProcessKey) -> bool:
    """Make ``path`` name ``key``; returns False when it names somebody already."""
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(f"{key.pid} {key.started} {key.boot}\n", encoding="ascii")
    try:
        os.link(draft, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def holder(path: Path) -> ProcessKey | None:
    """Return whom a file names; None when there is none."""
    try:
        words = path.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return NOBODY
    if len(words) != 3 or not (words[0].isdecimal() and words[1].isdecimal()):
        return NOBODY  # revoked, or written just before a crash of the machine
    return ProcessKey(int(words[0]), int(words[1]), words[2])


def sweep(directory: Path) -> None:
    """Remove what processes left that ended long ago."""
    for path in (*directory.glob("*.dial"), *directory.glob("*.used"), *directory.glob("*.draft")):
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > USED_KEPT_S
            if not old or lives(holder(path) or NOBODY):
                continue
            if path.suffix == ".dial":
                path.with_suffix(".sock").unlink(missing_ok=True)
            path.unlink()
