"""Real etcd members for tests: processes of our own on loopback, in a directory that goes away.

Members are started, stopped and ended by their own process ids, never by name. Leaving the
context ends them and waits for it, whatever state they are in.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

# Debian's etcd starts within 2 s; two cores may be shared with other tests.
START_S = 30.0
POLL_S = 0.05


class Ports(NamedTuple):
    client: int
    peer: int
    metrics: int


class EtcdCluster:
    """A cluster of one or three members; usable as a context manager, sync or async.

    ``endpoints`` are ``host:port``; members are named by their index in it. ``options`` are
    further command-line options of every member.
    """

    def __init__(
        self, members: int = 1, *, options: tuple[str, ...] = (), tls_dir: Path | None = None
    ) -> None:
        self._count = members
        self._options = options
        self._tls_dir = tls_dir
        self._directory = Path()
        self._ports: list[Ports] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self.endpoints: tuple[str, ...] = ()

    def __enter__(self) -> EtcdCluster:
        self._directory = Path(tempfile.mkdtemp(prefix="novacron-etcd-"))
        ports = _free_ports(3 * self._count)
        self._ports = [Ports(*ports[at : at + 3]) for at in range(0, len(ports), 3)]
        self.endpoints = tuple(f"127.0.0.1:{each.client}" for each in self._ports)
        try:
            self._processes = [self._start(index, "new") for index in range(self._count)]
            for index in range(self._count):
                self._wait_healthy(index)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    async def __aenter__(self) -> EtcdCluster:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def kill(self, index: int) -> None:
        """End a member at once (SIGKILL); its data stays for ``restart``."""
        self._processes[index].kill()
        self._processes[index].wait()

    def stop(self, index: int) -> None:
        """Suspend a member (SIGSTOP): its connections stay open and silent, once this returns.

        A thread that runs just then may answer a request before the signal has come to it.
        """
        process = self._processes[index]
        process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{process.pid}/task")
        deadline = time.monotonic() + START_S
        while not all(_stands_still(each) for each in threads.iterdir()):
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.001)

    def resume(self, index: int) -> None:
        self._processes[index].send_signal(signal.SIGCONT)

    def restart(self, index: int) -> None:
        """Start a member that was killed, and wait until it takes part again."""
        assert self._processes[index].poll() is not None, "only a dead member is started anew"
        self._processes[index] = self._start(index, "existing")
        self._wait_healthy(index)

    def restart_empty(self, index: int) -> None:
        """Start a member that was killed as one that has lost all its data; it must be alone."""
        assert self._processes[index].poll() is not None, "only a dead member is started anew"
        shutil.rmtree(self._directory / f"m{index}")
        self._processes[index] = self._start(index, "new")
        self._wait_healthy(index)

    def alive(self, index: int) -> bool:
        return self._processes[index].poll() is None

    def log_text(self, index: int) -> str:
        return (self._directory / f"m{index}.log").read_text(errors="replace")

    def _start(self, index: int, state: str) -> subprocess.Popen[bytes]:
        ports = self._ports[index]
        scheme = "https" if self._tls_dir else "http"
        peers = ",".join(f"m{i}=http://127.0.0.1:{p.peer}" for i, p in enumerate(self._ports))
        command = [
            # Should the test run itself be killed, the kernel ends the member.
            *("setpriv", "--pdeathsig", "KILL", "etcd"),
            f"--name=m{index}",
            f"--data-dir={self._directory / f'm{index}'}",
            f"--listen-client-urls={scheme}://127.0.0.1:{ports.client}",
            f"--advertise-client-urls={scheme}://127.0.0.1:{ports.client}",
            f"--listen-peer-urls=http://127.0.0.1:{ports.peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{ports.peer}",
            f"--initial-cluster={peers}",
            f"--initial-cluster-state={state}",
            f"--listen-metrics-urls=http://127.0.0.1:{ports.metrics}",
            "--snapshot-count=10000",
            "--logger=zap",
            "--log-level=warn",
            *self._tls_options(),
            *self._options,
        ]
        environment = {"PATH": os.environ["PATH"]}
        with (self._directory / f"m{index}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _tls_options(self) -> tuple[str, ...]:
        if self._tls_dir is None:
            return ()
        return (
            f"--trusted-ca-file={self._tls_dir / 'ca.crt'}",
            f"--cert-file={self._tls_dir / 'member.crt'}",
            f"--key-file={self._tls_dir / 'member.key'}",
            "--client-cert-auth",
        )

    def _wait_healthy(self, index: int) -> None:
        """Wait until the member answers through a leader; its own metrics port says so."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if not self.alive(index):
                raise RuntimeError(f"etcd member {index} ended:\n{self.log_text(index)}")
            if _healthy(f"http://127.0.0.1:{self._ports[index].metrics}/health"):
                return
            time.sleep(POLL_S)
        raise RuntimeError(f"etcd member {index} does not serve:\n{self.log_text(index)}")

    def _end(self) -> None:
        for process in self._processes:
            # SIGKILL ends a stopped process too.
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []
        shutil.rmtree(self._directory)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return b'"true"' in answer.read()
    except (urllib.error.URLError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    """Return ports that were free at once; all are held until all are known."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def _stands_still(thread: Path) -> bool:
    """Tell whether a thread is stopped, or over."""
    try:
        stat = (thread / "stat").read_text()
    except OSError:
        return True
    # The state follows the program's name, which may hold anything but comes in brackets.
    return stat.rpartition(")")[2].split()[0] in ("T", "t", "Z", "X")
