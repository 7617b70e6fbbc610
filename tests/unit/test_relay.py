"""Relays of live migrations, both ends in real processes, with real certificates."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.relay import RelayTarget
from agent.relay_files import dial_file, holder, lives, used_file
from agent.relay_node import NodeRelays
from shared.errors import StateConflict, Unavailable
from shared.tls import Role
from tests.unit.relay_world import (
    DESTINATION,
    NAME,
    SOURCE,
    WAIT_LIMIT_S,
    RelayWorld,
    connected,
    exchange,
    serving,
    short_directory,
    socket_of,
    the_rest,
    until,
)

BULK = os.urandom(1 << 20) * 10
# More than all buffers on the way, kernel's included, may ever hold.
BUFFERS_BYTES_MAX = 24 << 20


@pytest.fixture
async def world() -> AsyncIterator[RelayWorld]:
    with short_directory() as root:
        made = RelayWorld(root)
        try:
            yield made
            await made.until_none_is_left()
        finally:
            made.stop()


@pytest.fixture
async def destination(world: RelayWorld) -> AsyncIterator[NodeRelays]:
    relays = world.relays(world.settings(DESTINATION))
    async with serving(relays) as world.port:
        yield relays


@pytest.fixture
def source(world: RelayWorld) -> NodeRelays:
    return world.relays(world.settings(SOURCE))


async def opened(world: RelayWorld, source: NodeRelays, destination: NodeRelays) -> str:
    return await source.open(NAME, world.target, await destination.admit(NAME, SOURCE))


def files_of(world: RelayWorld) -> list[str]:
    """Return what the source's relays have in their directory."""
    return sorted(path.name for path in (world.root / SOURCE).iterdir())


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


async def test_bytes_go_both_ways_at_once(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    async with connected(await opened(world, source, destination)) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
        assert await exchange(reader, writer, BULK) == BULK


async def test_what_one_end_closes_the_other_finishes(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    """A client that has said all still gets the whole answer, which comes only then."""

    def answer_at_the_end(connection: socket.socket) -> None:
        said = b"".join(iter(lambda: connection.recv(65536), b""))
        connection.sendall(said[::-1])

    world.libvirtd.handler = answer_at_the_end
    async with connected(await opened(world, source, destination)) as (reader, writer):
        writer.write(BULK)
        writer.write_eof()

        assert await the_rest(reader) == BULK[::-1]


async def test_an_end_at_the_destination_reaches_the_client(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    world.libvirtd.handler = lambda connection: connection.sendall(b"goodbye")
    async with connected(await opened(world, source, destination)) as (reader, _):
        assert await the_rest(reader) == b"goodbye"


async def test_what_nobody_reads_is_not_taken(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    go_on = threading.Event()

    def read_late(connection: socket.socket) -> None:
        assert go_on.wait(WAIT_LIMIT_S)
        total = 0
        while data := connection.recv(1 << 20):
            total += len(data)
        connection.sendall(str(total).encode())

    world.libvirtd.handler = read_late
    uri = await opened(world, source, destination)

    def fill_and_empty() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(socket_of(uri))
            sent = fill(client)
            assert 0 < sent < BUFFERS_BYTES_MAX
            go_on.set()
            client.shutdown(socket.SHUT_WR)
            client.settimeout(WAIT_LIMIT_S)
            assert client.recv(100) == str(sent).encode()

    await asyncio.to_thread(fill_and_empty)


def fill(client: socket.socket) -> int:
    """Send until nothing more is taken, and return how much was."""
    client.settimeout(2.0)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < BUFFERS_BYTES_MAX:
            sent += client.send(BULK[:65536])
    return sent


async def test_a_relay_takes_one_connection_on_a_socket_of_its_owner(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    uri = await opened(world, source, destination)
    path = socket_of(uri)
    assert mode(path) == 0o600
    assert mode(world.root / SOURCE) == 0o700

    async with connected(uri) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"

        assert files_of(world) == [f"{NAME}.dial"]
        with pytest.raises(FileNotFoundError):
            await asyncio.open_unix_connection(path)
        assert world.libvirtd.connections == 1


async def test_a_stranger_on_the_node_is_sent_away_and_uses_nothing_up(
    world: RelayWorld, destination: NodeRelays
) -> None:
    settings = world.settings(SOURCE, idle_limit_s=1.0)
    others = world.relays(replace(settings, client_uid=os.getuid() + 1))
    uri = await opened(world, others, destination)

    for _ in range(2):
        async with connected(uri) as (reader, _):
            assert await the_rest(reader) == b""

    await world.until_none_is_left()
    assert world.libvirtd.connections == 0
    assert holder(used_file(world.root / DESTINATION, NAME)) is None


async def test_a_relay_that_nobody_uses_ends(world: RelayWorld, destination: NodeRelays) -> None:
    source = world.relays(world.settings(SOURCE, idle_limit_s=0.1))
    await opened(world, source, destination)

    await world.until_none_is_left()
    assert files_of(world) == []


async def test_a_destination_that_is_not_there_closes_the_socket(
    world: RelayWorld, source: NodeRelays
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = RelayTarget(f"127.0.0.1:{taken.getsockname()[1]}", DESTINATION)
    async with connected(await source.open(NAME, nowhere, "00" * 32)) as (reader, _):
        assert await the_rest(reader) == b""


async def test_a_libvirtd_that_is_not_there_closes_the_socket(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    world.libvirtd.path.unlink()
    async with connected(await opened(world, source, destination)) as (reader, _):
        assert await the_rest(reader) == b""


@pytest.mark.parametrize(
    "impostor",
    [
        {"name": "n3"},
        {"name": DESTINATION, "role": Role.REPLICA},
        {"name": DESTINATION, "cell": "000000"},
        {"name": DESTINATION, "authority": "another"},
    ],
    ids=["another node", "no agent", "another cell", "another authority"],
)
async def test_an_impostor_at_the_destination_gets_nothing(
    world: RelayWorld, source: NodeRelays, impostor: dict[str, str]
) -> None:
    world.tls[DESTINATION] = world.certificates.issue(**impostor)  # type: ignore[arg-type]
    relays = world.relays(world.settings(DESTINATION))
    async with serving(relays) as world.port:
        async with connected(await opened(world, source, relays)) as (reader, _):
            assert await the_rest(reader) == b""
        await world.until_none_is_left()

    assert world.libvirtd.connections == 0
    # Not even the token was shown.
    assert holder(used_file(world.root / DESTINATION, NAME)) is None


async def test_one_direction_alone_lasts_a_limited_time(
    world: RelayWorld, source: NodeRelays
) -> None:
    """A libvirtd that hangs holds up neither relay for ever."""
    ended = threading.Event()

    def hang(connection: socket.socket) -> None:
        connection.recv(1)
        assert ended.wait(WAIT_LIMIT_S)

    world.libvirtd.handler = hang
    relays = world.relays(world.settings(DESTINATION, linger_limit_s=0.2))
    async with serving(relays) as world.port:
        async with connected(await opened(world, source, relays)):
            pass
        await world.until_none_is_left()
    ended.set()


async def test_closing_ends_a_relay_and_closes_both_connections(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    async with connected(await opened(world, source, destination)) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
        key = holder(dial_file(world.root / SOURCE, NAME))
        assert key is not None
        assert lives(key)

        await source.close(NAME)

        assert not lives(key)
        assert await the_rest(reader) == b""
        assert files_of(world) == []


async def test_a_name_is_open_once_and_another_agent_finds_it(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    await opened(world, source, destination)
    later = world.relays(world.settings(SOURCE))

    with pytest.raises(StateConflict):
        await later.open(NAME, world.target, "00" * 32)
    await later.close(NAME)

    assert world.processes() == []
    await later.open(NAME, world.target, "00" * 32)
    await later.close(NAME)


async def test_closing_what_is_not_open_does_nothing(source: NodeRelays) -> None:
    await source.close(NAME)


async def test_an_agent_whose_relay_cannot_start_is_told_why(
    world: RelayWorld, destination: NodeRelays
) -> None:
    deep = world.root / ("d" * 100)
    settings = replace(world.settings(SOURCE), directory=deep)
    source = world.relays(settings)

    with pytest.raises(Unavailable, match="path too long"):
        await opened(world, source, destination)

    await world.until_none_is_left()
    assert list(deep.iterdir()) == []


async def test_a_killed_relay_is_in_nobodys_way(
    world: RelayWorld, source: NodeRelays, destination: NodeRelays
) -> None:
    await opened(world, source, destination)
    key = holder(dial_file(world.root / SOURCE, NAME))
    assert key is not None
    os.kill(key.pid, signal.SIGKILL)
    await until(lambda: not lives(key))
    assert files_of(world) == [f"{NAME}.dial", f"{NAME}.sock"]

    async with connected(await opened(world, source, destination)) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
