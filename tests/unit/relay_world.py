"""Two nodes' relays as the unit tests need them: certificates, a stand-in for libvirtd, processes.

Everything that is started here has a mark in its environment, so that a test can tell whether any
relay process of its own is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from agent.relay import RelayTarget
from agent.relay_node import NodeRelays
from agent.relay_orders import TlsFiles
from agent.relay_settings import RelaySettings
from controlplane import pki
from shared.durable_files import write_new
from shared.tls import Identity, Role
from tests.lab.processes import ProcessKey, find_by_environment, send

CELL = "k3f9q2"
SOURCE = "n1"
DESTINATION = "n2"
NAME = "vm-k3f9q20123456789abcdefghij.7"
# Only against hanging for ever: nothing here takes a hundredth of it.
WAIT_LIMIT_S = 60.0

Handler = Callable[[socket.socket], None]


class Certificates:
    """Certificate authorities in a directory, and what they issue."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authorities: dict[str, pki.Authority] = {}

    def issue(
        self,
        name: str,
        *,
        role: Role = Role.AGENT,
        cell: str = CELL,
        authority: str = "ours",
        now: datetime | None = None,
    ) -> TlsFiles:
        """Return files of a new certificate; ``authority`` names whose it is."""
        made = now or datetime.now(UTC)
        issuer = self._authorities.get(authority)
        if issuer is None:
            issuer = pki.make_authority(CELL, pki.new_key(), made)
            self._authorities[authority] = issuer
        key = pki.new_key()
        certificate = pki.issue(issuer, Identity(cell, role, name), [], key.public_key(), made)
        directory = self._directory / uuid.uuid4().hex
        directory.mkdir()
        files = TlsFiles(*(str(directory / each) for each in ("ca.crt", "agent.crt", "agent.key")))
        write_new(Path(files.ca), issuer.certificate_pem(), 0o644)
        write_new(Path(files.certificate), certificate, 0o644)
        write_new(Path(files.key), pki.key_pem(key), 0o400)
        return files


def echo(connection: socket.socket) -> None:
    """Send back what comes, and end when the other side has."""
    while data := connection.recv(65536):
        connection.sendall(data)


class FakeLibvirtd:
    """Listens on a unix socket in threads of its own; counts who came."""

    def __init__(self, path: Path, handler: Handler = echo) -> None:
        self.path = path
        self.handler = handler
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def close(self) -> None:
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_LIMIT_S)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                self._start(partial(self._handle, connection))

    def _handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.handler(connection)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()


class RelayWorld:
    """A source node, a destination node with its libvirtd, and a way through."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mark = f"NOVACRON_TEST_RELAY={uuid.uuid4().hex}"
        self.certificates = Certificates(root)
        self.tls = {name: self.certificates.issue(name) for name in (SOURCE, DESTINATION)}
        self.libvirtd = FakeLibvirtd(root / "libvirt-sock")
        self.port = 0
        self._started: list[NodeRelays] = []

    @property
    def environment(self) -> dict[str, str]:
        name, _, value = self.mark.partition("=")
        return {**os.environ, name: value}

    @property
    def target(self) -> RelayTarget:
        return RelayTarget(f"127.0.0.1:{self.port}", DESTINATION)

    def settings(self, node: str, **limits: float) -> RelaySettings:
        return RelaySettings(
            directory=self.root / node,
            libvirt_socket=self.libvirtd.path,
            cell=CELL,
            tls=self.tls[node],
            client_uid=os.getuid(),
            **limits,
        )

    def relays(self, settings: RelaySettings) -> NodeRelays:
        """Return the relays of an agent; they are let go of when the world ends."""
        made = NodeRelays(settings, self.environment)
        self._started.append(made)
        return made

    def processes(self) -> list[ProcessKey]:
        return find_by_environment(self.mark)

    async def until_none_is_left(self) -> None:
        await until(lambda: not self.processes())

    def stop(self) -> None:
        """End it all; a test that failed may have left processes."""
        for process in self.processes():
            send(process, signal.SIGKILL)
        for relays in self._started:
            relays.stop()
        self.libvirtd.close()


@asynccontextmanager
async def serving(relays: NodeRelays) -> AsyncIterator[int]:
    """Let a node take relays in for the length of the block; yields its port."""
    port = relays.start("127.0.0.1", 0)
    task = asyncio.create_task(relays.run())
    try:
        yield port
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_LIMIT_S):
        while not condition():  # noqa: ASYNC110 - processes set no event
            await asyncio.sleep(0.01)


def socket_of(uri: str) -> str:
    """Return the path that a relay's URI names."""
    prefix = "qemu+unix:///system?socket="
    assert uri.startswith(prefix)
    return uri.removeprefix(prefix)


@asynccontextmanager
async def connected(uri: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Be the source's libvirtd for the length of the block."""
    reader, writer = await asyncio.open_unix_connection(socket_of(uri))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> bytes:
    """Send ``data`` and return as many bytes as come back meanwhile."""

    async def write() -> None:
        writer.write(data)
        await writer.drain()

    async with asyncio.timeout(WAIT_LIMIT_S):
        back, _ = await asyncio.gather(reader.readexactly(len(data)), write())
    return back


async def the_rest(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(WAIT_LIMIT_S):
        return await reader.read()


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A unix socket's path holds 107 bytes only: too few for a directory of pytest's."""
    with tempfile.TemporaryDirectory(prefix="ncr") as name:
        yield Path(name)
