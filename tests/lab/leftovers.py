"""What a lab leaves when it is killed: how it is found, and how all of it is removed.

Finds by facts of the kernel (mounts, devices, environments), not by the lab's own records alone,
which may be missing. Never touches a process that is not shown to be the lab's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab import network
from tests.lab.layout import CGROUP_PREFIX, KEPT_LOG_DIR, LOG_DIR, MARK, STATE_DIR
from tests.lab.processes import (
    KILL_WAIT_S,
    POLL_S,
    ProcessKey,
    find_by_environment,
    find_by_mount,
    is_alive,
    kill_all,
)
from tests.lab.state import read_pids


def find() -> list[str]:
    """Describe, in a line each, everything that is left of a lab; empty when there is nothing."""
    found = [f"directory {STATE_DIR}"] if STATE_DIR.exists() else []
    found += [f"network device {name}" for name in network.leftover_links()]
    found += [f"cgroup {path}" for path in _cgroups()]
    found += [f"process {key.pid}" for key in processes()]
    return found


def processes() -> list[ProcessKey]:
    """Return every living process of a lab: recorded ones, those in nodes, those of its files."""
    keys = {p.key for p in read_pids() if is_alive(p.key)}
    keys.update(find_by_mount(f"{STATE_DIR.name}/nodes/"))
    keys.update(find_by_environment(MARK))
    return sorted(key for key in keys if key.pid != os.getpid())


def _remove_cgroup(top: Path) -> None:
    """Remove a cgroup and all below it; the kernel lets go of those that have ended a bit later."""
    deadline = time.monotonic() + KILL_WAIT_S
    for path in (*sorted(top.rglob("*/"), reverse=True), top):
        while True:
            try:
                path.rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)


def _cgroups() -> list[Path]:
    """Return the cgroups of full nodes; they stay when the last process in them has ended."""
    hierarchies = (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/"))
    return [path for each in hierarchies for path in each.glob(f"{CGROUP_PREFIX}*/")]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other processes from claiming or clearing the machine meanwhile.

    The lock is on the directory that the lab's own is made in, so that it leaves nothing itself.
    """
    directory = os.open(STATE_DIR.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def clear() -> None:
    """End every process of a lab and remove its devices and files; its logs go to the cache."""
    with alone():
        kill_all(processes)
        remove()


def remove() -> None:
    """Remove a lab's devices and files once its processes are gone; call it ``alone``."""
    network.remove_links()
    for top in _cgroups():
        _remove_cgroup(top)
    if LOG_DIR.is_dir():
        shutil.rmtree(KEPT_LOG_DIR, ignore_errors=True)
        shutil.copytree(LOG_DIR, KEPT_LOG_DIR, dirs_exist_ok=True)
    shutil.rmtree(STATE_DIR, ignore_errors=True)
    if STATE_DIR.exists():
        # Something was being written when the first pass went through.
        shutil.rmtree(STATE_DIR)
