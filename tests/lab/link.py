"""The lab's side of its supervisor: start it, ask it, wait for things with a limit."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from tests.lab import runtime, supervisor
from tests.lab.layout import LOG_DIR, REPOSITORY, STATE_DIR, LabError
from tests.lab.processes import KILL_WAIT_S, is_alive, send
from tests.lab.state import SUPERVISOR, ProgramPid, read_pids

POLL_S = 0.02
# A program that dies more often than this before it is ready will not become so.
RESTARTS_MAX = 2
LOG_LINES = 20
START_LIMIT_S = 30.0
# A stop may use up its grace and then wait for the kernel to end the process.
REQUEST_LIMIT_S = supervisor.STOP_GRACE_S + KILL_WAIT_S


class SupervisorLink:
    """Talks to the lab's supervisor, whoever started it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        # Programs that nobody starts again when they end.
        self._once: set[str] = set()

    def launch(self) -> None:
        """Start the supervisor, bound to this process until ``detach``."""
        LOG_DIR.mkdir()
        log = LOG_DIR / "supervisor.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.lab.supervisor"],
                cwd=REPOSITORY,
                env=runtime.environment(STATE_DIR) | {"PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        process = self._process
        wait_until(
            supervisor.SOCKET.exists,
            f"the lab's supervisor (see {log})",
            alive=lambda: process.poll() is None,
        )

    def start(self, program: supervisor.Program) -> int:
        """Start a program and return its pid."""
        if not program.restart:
            self._once.add(program.name)
        return self._ask(supervisor.Start(program)).pid

    def stop(self, name: str, grace_s: float = supervisor.STOP_GRACE_S) -> None:
        """End a program for good; does nothing when it is not known."""
        self._ask(supervisor.Stop(name, grace_s))

    def set_restart(self, name: str, restart: bool) -> None:
        """Decide whether a program that dies is started again."""
        self._ask(supervisor.SetRestart(name, restart))

    def detach(self) -> None:
        """Let the lab live on when this process ends."""
        self._ask(supervisor.Detach())

    def program(self, name: str) -> ProgramPid | None:
        """Return what is recorded of a program, whether it lives or not."""
        return next((p for p in read_pids() if p.name == name), None)

    def lives(self, name: str) -> bool:
        """Tell whether a program's process lives."""
        program = self.program(name)
        return program is not None and is_alive(program.key)

    def pid_of(self, name: str) -> int:
        """Return a living program's pid; raises LabError."""
        program = self.program(name)
        if program is None or not is_alive(program.key):
            raise LabError(f"{name} does not run")
        return program.key.pid

    def wait_for(
        self, name: str, holds: Callable[[], bool], what: str, limit_s: float = START_LIMIT_S
    ) -> None:
        """Wait for what a program is to do; raises LabError with its log's end when it cannot."""

        def thrives() -> bool:
            program = self.program(name)
            if program is None or program.restarts > RESTARTS_MAX:
                return False
            return program.restarts > 0 or is_alive(program.key) or name not in self._once

        try:
            wait_until(holds, what, limit_s=limit_s, alive=thrives)
        except LabError as error:
            raise LabError(f"{error}\n{_log_end(name)}") from None

    def shut_down(self) -> None:
        """Let the supervisor end everything, itself last; it may be gone already."""
        recorded = self.program(SUPERVISOR)
        if recorded is not None:
            send(recorded.key, signal.SIGTERM)
            limit_s = time.monotonic() + REQUEST_LIMIT_S
            while is_alive(recorded.key) and time.monotonic() < limit_s:
                time.sleep(POLL_S)
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            if recorded is None:
                self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Let go of the supervisor's process after ``detach`` without waiting for its end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            # Not ours to wait for any more; without this its object would complain.
            self._process.returncode = 0
            self._process = None

    def _ask(self, request: supervisor.Request) -> supervisor.Reply:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(REQUEST_LIMIT_S)
            connection.connect(str(supervisor.SOCKET))
            connection.sendall(msgspec.json.encode(request) + b"\n")
            with connection.makefile("rb") as answers:
                reply = msgspec.json.decode(answers.readline(), type=supervisor.Reply)
        if reply.error:
            raise LabError(f"the lab's supervisor: {reply.error}")
        return reply


def wait_until(
    holds: Callable[[], bool],
    what: str,
    *,
    limit_s: float = START_LIMIT_S,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Wait for a condition; raises LabError when it takes too long or can no longer come."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if not alive():
            raise LabError(f"waiting for {what}, but its process ended")
        if time.monotonic() > deadline:
            raise LabError(f"waited {limit_s:.0f} s for {what}")
        time.sleep(POLL_S)


def _log_end(name: str) -> str:
    path = LOG_DIR / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join([f"the end of {name}'s log:", *(f"  {line}" for line in lines[-LOG_LINES:])])
