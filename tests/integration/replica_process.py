"""A cell's files and its replicas as real processes: own ports on loopback, ended by their pids.

A replica is what ``python -m controlplane`` makes of a configuration file. Leaving its context ends
it, whatever state it is in, and waits for it. Nothing here knows what a test is about.
"""

from __future__ import annotations

import http.client
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli_w

from controlplane.cell_files import CellFiles
from shared.clock import SystemClock
from shared.tls import TlsMaterial, load_material

ROOT = Path(__file__).parents[2]
# A replica leads within 2 s; two cores may be shared with other tests.
START_S = 30.0
POLL_S = 0.05
# Below the range from which the kernel takes the ports of outgoing connections: a port is still
# free when a replica that was killed is started on it again.
PORTS = range(15_000, 32_000)

Settings = dict[str, dict[str, Any]]


class Cell:
    """What ``novacron init`` makes, in a directory that goes away, and where its etcd is."""

    def __init__(self, etcd: tuple[str, ...], token_ttl: timedelta | None = None) -> None:
        self.etcd = etcd
        self.directory = Path(tempfile.mkdtemp(prefix="novacron-cell-"))
        self.files = CellFiles(self.directory / "cell", SystemClock(), random.SystemRandom())
        self.cell = self.files.ensure_cell(token_ttl).cell

    def __enter__(self) -> Cell:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.directory)

    @property
    def token(self) -> str:
        return self.files.token_file.read_text().strip()

    def node_tls(self, name: str) -> TlsMaterial:
        """Return the material of a node's agent; the node is enrolled when it is new."""
        self.files.add_node(name, "127.0.0.1")
        directory = self.files.root / "nodes" / name
        return load_material(self.files.ca_file, directory / "agent.crt", directory / "agent.key")

    def replica_tls(self, name: str) -> TlsMaterial:
        """Return the material of a replica; it is enrolled when it is new."""
        certificate, key = self.replica_files(name)
        return load_material(self.files.ca_file, certificate, key)

    def replica_files(self, name: str) -> tuple[Path, Path]:
        """Return the files of a replica's certificate and key."""
        self.files.add_replica(name, "127.0.0.1")
        directory = self.files.root / "replicas" / name
        return directory / "controlplane.crt", directory / "controlplane.key"


class ReplicaProcess:
    """One replica of a cell; a context manager that starts it and waits until it leads.

    ``settings`` are sections of its configuration to change. With ``leads`` False it is enough that
    it answers: another replica may lead. ``environment`` makes it one of another release.
    """

    def __init__(
        self,
        cell: Cell,
        name: str = "r1",
        settings: Settings | None = None,
        *,
        leads: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.cell = cell
        self.name = name
        self.directory = cell.directory / name
        self.directory.mkdir()
        api_port, agents_port = free_ports(2)
        self.api_url = f"https://127.0.0.1:{api_port}"
        self.agents_address = f"127.0.0.1:{agents_port}"
        self.data_dir = self.directory / "data"
        self.config_file = self.directory / "controlplane.toml"
        self._leads = leads
        self._is_present = environment is None
        self._environment = dict(environment or {"PATH": os.environ["PATH"]})
        self._port = api_port
        self._process: subprocess.Popen[bytes] | None = None
        self.config_file.write_text(tomli_w.dumps(self._config(settings or {})))

    def __enter__(self) -> ReplicaProcess:
        self.start()
        try:
            self.wait_until_serving()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        if error is not None:
            print(f"--- log of {self.name}\n{self.log_text()}")

    @property
    def token(self) -> str:
        return self.cell.token

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was started"
        return self._process

    def start(self) -> None:
        """Start the process; returns at once."""
        assert self._process is None or self._process.poll() is not None, "it does not run"
        self._process = self.run(self.config_file)

    def run(self, config_file: Path) -> subprocess.Popen[bytes]:
        """Start a process on any configuration file; its output joins this replica's log."""
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                replica_command(config_file),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
            )

    def wait_until_serving(self) -> None:
        """Return once the replica leads, or answers where that is enough; blocks."""
        end = time.monotonic() + START_S
        while not self.serves():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended:\n{self.log_text()}")
            if time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not serve:\n{self.log_text()}")
            time.sleep(POLL_S)

    def serves(self) -> bool:
        """Tell whether the replica leads, or answers where that is enough."""
        context = ssl.create_default_context(cafile=str(self.cell.files.ca_file))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, timeout=2.0, context=context
        )
        try:
            connection.request("GET", "/readyz" if self._leads else "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """End the process at once (SIGKILL) and wait for it; its data stays."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start the process again on its data and wait until it serves; blocks."""
        self.start()
        self.wait_until_serving()

    def stop(self) -> None:
        """Suspend the process (SIGSTOP): its connections stay open and silent."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        """Ask the process to end (SIGTERM) and return its exit code; blocks."""
        self.process.terminate()
        return self.process.wait(START_S)

    def end(self) -> None:
        """End the process for good, in whatever state it is."""
        if self._process is not None:
            # SIGKILL ends a stopped process too.
            self._process.kill()
            self._process.wait()

    def log_text(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def _config(self, settings: Settings) -> Settings:
        certificate, key = self.cell.replica_files(self.name)
        config: dict[str, Any] = {
            "name": self.name,
            "data_dir": str(self.data_dir),
            "api": {"listen": f"127.0.0.1:{self._port}", "advertise": self.api_url},
            "agents": {"listen": self.agents_address, "advertise": self.agents_address},
            "tls": {
                "ca": str(self.cell.files.ca_file),
                "certificate": str(certificate),
                "key": str(key),
            },
            "etcd": {"endpoints": list(self.cell.etcd)},
            "bootstrap": {
                "cluster_file": str(self.cell.files.root / "cluster.json"),
                "admin_key_file": str(self.cell.files.root / "admin-key.json"),
            },
        }
        if self._is_present:
            root = self.cell.files.root
            config["enrolment"] = {
                "agents_ca": str(root / "agents-ca.crt"),
                "agents_ca_key": str(root / "agents-ca.key"),
                "qemu_ca": str(root / "qemu-ca.crt"),
                "qemu_ca_key": str(root / "qemu-ca.key"),
            }
        for section, values in settings.items():
            config[section] = {**config.get(section, {}), **values}
        return config


def replica_command(config_file: Path) -> tuple[str, ...]:
    """Return how a replica is started; should the test run be killed, the kernel ends it."""
    return (
        *("setpriv", "--pdeathsig", "KILL"),
        *(sys.executable, "-m", "controlplane", "--config", str(config_file)),
    )


def free_ports(count: int) -> list[int]:
    """Return ports that were free at once; all are held until all are known."""
    held: list[socket.socket] = []
    try:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                candidate.close()
                continue
            held.append(candidate)
            if len(held) == count:
                return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
    raise RuntimeError("no port is free")
