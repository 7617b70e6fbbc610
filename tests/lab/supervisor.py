"""The one process that owns every process of a lab: starts them, restarts what dies, ends them.

It runs on its own (`python -m tests.lab.supervisor`), takes one JSON request per connection on a
unix socket, and records every pid at once, so that `./dev lab down` finds them whatever happened
to it. While its standard input is open it belongs to the process at the other end: when that one
dies, the supervisor removes the whole lab. ``Detach`` ends this bond. It is the reaper of orphans:
QEMU processes become its children. It knows programs only, nothing of nodes or replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.retry import Backoff
from tests.lab import leftovers
from tests.lab.layout import LOG_DIR, STATE_DIR
from tests.lab.processes import ProcessKey, key_of
from tests.lab.state import PIDS_FILE, SUPERVISOR, ProgramPid, write

SOCKET = STATE_DIR / "supervisor.sock"

# Quick enough for a test to wait for, slow enough that a program that cannot start costs nothing.
RESTART_BACKOFF = Backoff(first_s=0.2, cap_s=5.0)
# A program that ran this long had started well: its next restart is its first.
STEADY_S = 10.0
# An agent or replica that got SIGTERM ends its streams first; past this it is killed.
STOP_GRACE_S = 15.0
REAP_PERIOD_S = 0.5
# Requests carry one program's arguments and environment.
REQUEST_BYTES_MAX = 1 << 20

PR_SET_CHILD_SUBREAPER = 36


class Program(Struct, frozen=True, kw_only=True):
    """What to run. ``environment`` is all of it; the log is ``logs/<name>.log``, appended to."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = {}
    restart: bool = True


class Start(Struct, frozen=True, tag="start"):
    """Run a program; one that ran under this name must have been stopped."""

    program: Program


class Stop(Struct, frozen=True, tag="stop"):
    """End a program for good: SIGTERM, and SIGKILL after the grace."""

    name: str
    grace_s: float = STOP_GRACE_S


class SetRestart(Struct, frozen=True, tag="set_restart"):
    """Decide whether a program that dies is started again."""

    name: str
    restart: bool


class Detach(Struct, frozen=True, tag="detach"):
    """Live on when the process that started the supervisor ends."""


Request = Start | Stop | SetRestart | Detach


class Reply(Struct, frozen=True):
    pid: int = 0
    error: str = ""


class _Running:
    """A program under supervision and the task that keeps it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.restart = asyncio.Event()
        self.stopping = False
        self.restarts = 0
        self.process: asyncio.subprocess.Process | None = None
        self.key: ProcessKey | None = None
        self.keeper: asyncio.Task[None] | None = None
        self.set_restart(program.restart)

    def set_restart(self, restart: bool) -> None:
        if restart:
            self.restart.set()
        else:
            self.restart.clear()


class Supervisor:
    """Keeps the programs; one instance in one process."""

    def __init__(self) -> None:
        self._programs: dict[str, _Running] = {}
        self._ended = asyncio.Event()
        self._detached = False
        self._spawning = asyncio.Lock()
        self._rng = random.Random(os.getpid())

    async def serve(self) -> None:
        """Serve requests until told to end; then end every program and remove the lab."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._ended.set)
        loop.add_reader(sys.stdin.fileno(), self._lifeline_moved)
        self._record()
        server = await asyncio.start_unix_server(self._answer, SOCKET, limit=REQUEST_BYTES_MAX)
        reaper = asyncio.create_task(self._reap_orphans())
        await self._ended.wait()
        server.close()
        # Orphans are collected to the last: virtlockd ends the QEMUs whose leases it drops, and it
        # waits for them to be gone.
        await asyncio.gather(*(self._stop(Stop(name)) for name in list(self._programs)))
        reaper.cancel()
        leftovers.clear()

    def _lifeline_moved(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        if not self._detached:
            self._ended.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = msgspec.json.decode(await reader.readline(), type=Request)
            reply = await self._do(request)
        except (msgspec.MsgspecError, OSError, ValueError) as error:
            reply = Reply(error=f"{type(error).__name__}: {error}")
        with contextlib.suppress(ConnectionError):
            writer.write(msgspec.json.encode(reply) + b"\n")
            await writer.drain()
        writer.close()

    async def _do(self, request: Request) -> Reply:
        match request:
            case Start(program):
                return await self._start(program)
            case Stop():
                await self._stop(request)
            case SetRestart(name, restart):
                if name not in self._programs:
                    return Reply(error=f"no program {name!r}")
                self._programs[name].set_restart(restart)
            case Detach():
                self._detached = True
        return Reply()

    async def _start(self, program: Program) -> Reply:
        if program.name in self._programs:
            return Reply(error=f"{program.name!r} runs already")
        running = _Running(program)
        self._programs[program.name] = running
        try:
            await self._spawn(running)
        except OSError:
            del self._programs[program.name]
            raise
        running.keeper = asyncio.create_task(self._keep(running))
        running.keeper.add_done_callback(_tell_failure)
        return Reply(pid=running.process.pid if running.process else 0)

    async def _spawn(self, running: _Running) -> None:
        program = running.program
        with (LOG_DIR / f"{program.name}.log").open("ab") as log:
            async with self._spawning:
                running.process = await asyncio.create_subprocess_exec(
                    *program.arguments,
                    env=program.environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,
                )
                running.key = key_of(running.process.pid)
        self._record()

    async def _keep(self, running: _Running) -> None:
        """Wait for the program's end, again and again, and start it anew while that is wanted."""
        delays = RESTART_BACKOFF.delays(self._rng)
        clock = asyncio.get_running_loop().time
        while running.process is not None:
            started = clock()
            await running.process.wait()
            if running.stopping:
                return
            if clock() - started > STEADY_S:
                delays = RESTART_BACKOFF.delays(self._rng)
            await asyncio.sleep(next(delays))
            await running.restart.wait()
            running.restarts += 1
            print(f"{running.program.name} ended with {running.process.returncode}", flush=True)
            await self._spawn(running)

    async def _stop(self, request: Stop) -> None:
        running = self._programs.get(request.name)
        if running is None:
            return
        running.stopping = True
        process = running.process
        if process is not None and process.returncode is None:
            await _end(process, request.grace_s)
        if running.keeper is not None:
            running.keeper.cancel()
            await asyncio.wait([running.keeper])
        # Only now, so that nobody starts a second one under this name while the first still ends.
        del self._programs[request.name]
        self._record()

    def _record(self) -> None:
        own = key_of(os.getpid())
        record = [] if own is None else [ProgramPid(name=SUPERVISOR, key=own)]
        record += [
            ProgramPid(name=name, key=running.key, restarts=running.restarts)
            for name, running in sorted(self._programs.items())
            if running.key is not None
        ]
        # The directory may be gone already when `lab down` is at work beside us.
        with contextlib.suppress(FileNotFoundError):
            write(PIDS_FILE, tuple(record))

    async def _reap_orphans(self) -> None:
        """Collect the exit codes of adopted processes; our own children's are asyncio's."""
        while True:
            await asyncio.sleep(REAP_PERIOD_S)
            async with self._spawning:
                owned = {r.process.pid for r in self._programs.values() if r.process is not None}
                for pid in _children():
                    if pid not in owned:
                        _reap(pid)


def _tell_failure(keeper: asyncio.Task[None]) -> None:
    if not keeper.cancelled() and keeper.exception() is not None:
        keeper.print_stack()


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        # A test may have stopped it, and a stopped process does not hear SIGTERM.
        process.send_signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(word) for word in text.split()]


def _become_reaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


if __name__ == "__main__":
    # Its starter held signals back, and a mask is inherited.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _become_reaper()
    asyncio.run(Supervisor().serve())
