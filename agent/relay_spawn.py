"""Starts relay processes so that they outlive this one, and ends them by what they are.

They are started through ``posix_spawn``: the libraries' child objects end, or complain about,
children that live on. A process is ended only after its start time and boot were compared while a
descriptor held on to it, so that a pid that went to a stranger is never hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.relay_files import ProcessKey, lives
from agent.relay_process import CONNECTION_FD
from shared.errors import OutcomeUnknown

# The kernel ends a killed process within milliseconds; one that waits for a slow disk takes longer.
KILL_LIMIT_S = 10.0
# Of a process that somebody else has waited for, or the kernel where SIGCHLD is ignored.
UNKNOWN_STATUS = 255

# The agent's own interpreter and path, but without ``site``, which takes longer than TLS to load.
# The name is there for people who look at processes.
_INTERPRETER_OPTIONS = ("-P", "-s", "-S")
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from {module} import main; main()"
_ROOT = Path(__file__).parent.parent

Ended = Callable[[int], None]


class RelaySpawner:
    """Knows the relay processes that this agent started and that still run."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment`` is this agent's own: what finds its code and libraries finds theirs."""
        self._environment = environment
        self._children: dict[int, int] = {}  # pid to pidfd

    def spawn(
        self,
        module: str,
        name: str,
        order: bytes,
        *,
        stdout: int | None = None,
        connection: int | None = None,
        ended: Ended = lambda _status: None,
    ) -> int:
        """Start a relay process and return its pid; ``ended`` gets its exit status.

        Raises OSError when the machine has no room for another process.
        """
        program = (sys.executable, *_INTERPRETER_OPTIONS, "-c", _PROGRAM.format(module=module))
        given = _order_file(order)
        try:
            actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, given, 0)]
            with Path(os.devnull).open("wb") as null:
                output = null.fileno() if stdout is None else stdout
                actions.append((os.POSIX_SPAWN_DUP2, output, 1))
                if connection is not None:
                    actions.append((os.POSIX_SPAWN_DUP2, connection, CONNECTION_FD))
                pid = os.posix_spawn(
                    sys.executable,
                    (*program, str(_ROOT), name),
                    self._environment,
                    file_actions=actions,
                    setsid=True,  # signals to the agent's group are not for it
                    setsigmask=(),
                )
        finally:
            os.close(given)
        self._watch(pid, ended)
        return pid

    def kill(self, pid: int) -> None:
        """End a process that this agent started; does nothing when it has ended."""
        pidfd = self._children.get(pid)
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def forget(self) -> None:
        """Forget the processes; they go on."""
        for pidfd in self._children.values():
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
        self._children.clear()

    def _watch(self, pid: int, ended: Ended) -> None:
        # Nobody else waits for it, so the pid is its own until then.
        pidfd = self._children[pid] = os.pidfd_open(pid)
        loop = asyncio.get_running_loop()

        def reap() -> None:
            loop.remove_reader(pidfd)
            os.close(self._children.pop(pid))
            ended(_exit_status(pid))

        loop.add_reader(pidfd, reap)


def _exit_status(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return UNKNOWN_STATUS


async def kill(key: ProcessKey) -> None:
    """End this very process and wait until it is gone; does nothing when it is.

    Raises OutcomeUnknown when it does not end in time.
    """
    if not lives(key):
        return
    try:
        pidfd = os.pidfd_open(key.pid)
    except ProcessLookupError:
        return
    try:
        # Once more: what the descriptor holds on to is what is ended.
        if not lives(key):
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await _until_readable(pidfd)
    except TimeoutError:
        raise OutcomeUnknown(f"relay process {key.pid} does not end") from None
    finally:
        os.close(pidfd)


async def _until_readable(descriptor: int) -> None:
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, readable.set)
    try:
        async with asyncio.timeout(KILL_LIMIT_S):
            await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def _order_file(order: bytes) -> int:
    """A file in memory breaks with nobody and never fills up, unlike a pipe."""
    descriptor = os.memfd_create("relay-order")
    os.write(descriptor, order)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
