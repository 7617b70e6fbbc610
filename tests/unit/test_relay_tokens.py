"""Who gets through at the destination: the right node with an admitted token, once, until revoked.

The peers here speak TLS by themselves, so that they can be wrong in ways that ours never are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent import relay_files, relay_link, relay_listener
from agent.relay_files import ProcessKey, claim, holder, key_of, lives, used_file
from agent.relay_node import NodeRelays, own_identity
from agent.relay_orders import TlsFiles
from shared import tls
from shared.errors import ConfigInvalid, Overloaded, StateConflict
from shared.tls import Identity, Role
from tests.unit.relay_world import (
    CELL,
    DESTINATION,
    NAME,
    SOURCE,
    WAIT_LIMIT_S,
    RelayWorld,
    connected,
    exchange,
    serving,
    short_directory,
    the_rest,
    until,
)

WRONG = "00" * 32


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RelayWorld]:
    monkeypatch.setattr(relay_listener, "REFUSED_PAUSE_S", 0.0)
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


def used(world: RelayWorld) -> ProcessKey | None:
    return holder(used_file(world.root / DESTINATION, NAME))


class Peer:
    """Somebody who connects to a node's relays with a certificate and a greeting."""

    def __init__(self, port: int, files: TlsFiles) -> None:
        self.port = port
        self.context = relay_link.client_context(files)

    async def is_let_through(self, greeting: bytes) -> bool:
        return await asyncio.to_thread(self._greet, greeting)

    def _greet(self, greeting: bytes) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), WAIT_LIMIT_S) as connection:
            try:
                with self.context.wrap_socket(connection) as link:
                    link.sendall(greeting)
                    return link.recv(1) == relay_link.ACCEPTED
            except OSError:
                return False


def greeting(token: str) -> bytes:
    return relay_link.MAGIC + bytes.fromhex(token)


async def test_the_admitted_node_gets_through_once(
    world: RelayWorld, destination: NodeRelays
) -> None:
    token = await destination.admit(NAME, SOURCE)
    peer = Peer(world.port, world.tls[SOURCE])

    assert await peer.is_let_through(greeting(token))
    assert not await peer.is_let_through(greeting(token))
    assert world.libvirtd.connections == 1


@pytest.mark.parametrize(
    "stranger",
    [
        {"name": "n3"},
        {"name": DESTINATION},
        {"name": SOURCE, "role": Role.REPLICA},
        {"name": SOURCE, "cell": "000000"},
        {"name": SOURCE, "authority": "another"},
    ],
    ids=["another node", "the node itself", "no agent", "another cell", "another authority"],
)
async def test_the_right_token_in_wrong_hands_uses_nothing_up(
    world: RelayWorld, destination: NodeRelays, stranger: dict[str, str]
) -> None:
    token = await destination.admit(NAME, SOURCE)
    files = world.certificates.issue(**stranger)  # type: ignore[arg-type]
    # It trusts this cell, whoever issued its own certificate.
    files = files._replace(ca=world.tls[SOURCE].ca)

    assert not await Peer(world.port, files).is_let_through(greeting(token))

    assert used(world) is None
    assert world.libvirtd.connections == 0
    assert await Peer(world.port, world.tls[SOURCE]).is_let_through(greeting(token))


@pytest.mark.parametrize(
    "said",
    [greeting(WRONG), b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n", b"nvr9" + bytes(32)],
    ids=["another token", "another protocol", "another version"],
)
async def test_the_right_node_without_the_token_is_refused(
    world: RelayWorld, destination: NodeRelays, said: bytes
) -> None:
    await destination.admit(NAME, SOURCE)

    assert not await Peer(world.port, world.tls[SOURCE]).is_let_through(said)

    assert used(world) is None
    assert world.libvirtd.connections == 0


async def test_nobody_gets_through_without_a_certificate(
    world: RelayWorld, destination: NodeRelays
) -> None:
    token = await destination.admit(NAME, SOURCE)
    peer = Peer(world.port, world.tls[SOURCE])
    peer.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    peer.context.check_hostname = False
    peer.context.load_verify_locations(world.tls[SOURCE].ca)

    assert not await peer.is_let_through(greeting(token))
    assert used(world) is None


async def test_nobody_gets_through_with_an_older_tls(
    world: RelayWorld, destination: NodeRelays
) -> None:
    token = await destination.admit(NAME, SOURCE)
    peer = Peer(world.port, world.tls[SOURCE])
    peer.context.minimum_version = ssl.TLSVersion.TLSv1_2
    peer.context.maximum_version = ssl.TLSVersion.TLSv1_2

    assert not await peer.is_let_through(greeting(token))
    assert used(world) is None


async def test_whoever_says_nothing_is_sent_away_and_gives_up_the_place(
    world: RelayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_listener, "PROCESSES_MAX", 1)
    relays = world.relays(world.settings(DESTINATION, greeting_limit_s=0.3))
    async with serving(relays) as world.port:
        token = await relays.admit(NAME, SOURCE)
        silent, writer = await asyncio.open_connection("127.0.0.1", world.port)

        assert await Peer(world.port, world.tls[SOURCE]).is_let_through(greeting(token))

        assert await the_rest(silent) == b""
        writer.close()
        await world.until_none_is_left()


async def test_processes_are_bounded(world: RelayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_listener, "PROCESSES_MAX", 2)
    relays = world.relays(world.settings(DESTINATION, greeting_limit_s=2.0))
    async with serving(relays) as world.port:
        await relays.admit(NAME, SOURCE)
        strangers = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(4)]
        await until(lambda: len(world.processes()) == 2)
        most = 0
        while world.processes():
            most = max(most, len(world.processes()))
            await asyncio.sleep(0.05)
        for _, writer in strangers:
            writer.close()
        await world.until_none_is_left()

    assert most == 2


async def test_nobody_is_spoken_to_when_nobody_is_expected(
    world: RelayWorld, destination: NodeRelays
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)

    assert await the_rest(reader) == b""
    assert world.processes() == []
    writer.close()


async def test_a_revoked_token_is_refused(world: RelayWorld, destination: NodeRelays) -> None:
    token = await destination.admit(NAME, SOURCE)
    await destination.admit("vm-other.1", SOURCE)  # or nobody would be expected
    await destination.revoke(NAME)
    await destination.revoke(NAME)

    assert not await Peer(world.port, world.tls[SOURCE]).is_let_through(greeting(token))
    assert world.libvirtd.connections == 0
    with pytest.raises(StateConflict):
        await destination.admit(NAME, SOURCE)


async def test_a_process_that_was_handed_the_token_before_it_was_revoked_refuses_it(
    world: RelayWorld, destination: NodeRelays
) -> None:
    token = await destination.admit(NAME, SOURCE)
    early = await asyncio.to_thread(
        socket.create_connection, ("127.0.0.1", world.port), WAIT_LIMIT_S
    )
    await until(lambda: len(world.processes()) == 1)
    await destination.revoke(NAME)

    def greet() -> bytes:
        with relay_link.client_context(world.tls[SOURCE]).wrap_socket(early) as link:
            link.sendall(greeting(token))
            return link.recv(1)

    assert await asyncio.to_thread(greet) == b""
    assert world.libvirtd.connections == 0


@pytest.mark.parametrize("by_a_later_agent", [False, True])
async def test_revoking_ends_the_relay_that_used_the_token(
    world: RelayWorld, destination: NodeRelays, by_a_later_agent: bool
) -> None:
    source = world.relays(world.settings(SOURCE))
    uri = await source.open(NAME, world.target, await destination.admit(NAME, SOURCE))
    async with connected(uri) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
        key = used(world)
        assert key is not None
        assert lives(key)
        revoker = world.relays(world.settings(DESTINATION)) if by_a_later_agent else destination

        await revoker.revoke(NAME)

        assert not lives(key)
        assert await the_rest(reader) == b""


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate(b"\n")


async def test_a_stranger_who_has_the_pid_is_left_alone(
    world: RelayWorld, destination: NodeRelays, stranger: subprocess.Popen[bytes]
) -> None:
    key = key_of(stranger.pid)
    assert key is not None
    others = (key._replace(started=key.started - 1), key._replace(boot="another"))
    for number, other in enumerate(others):
        name = f"vm-stranger.{number}"
        assert claim(used_file(world.root / DESTINATION, name), other)
        await destination.revoke(name)

    assert lives(key)


async def test_admitting_again_voids_the_token_before(
    world: RelayWorld, destination: NodeRelays
) -> None:
    before = await destination.admit(NAME, SOURCE)
    token = await destination.admit(NAME, SOURCE)
    peer = Peer(world.port, world.tls[SOURCE])

    assert not await peer.is_let_through(greeting(before))
    assert await peer.is_let_through(greeting(token))
    with pytest.raises(StateConflict):
        await destination.admit(NAME, SOURCE)


async def test_what_is_withdrawn_takes_nobody_in_and_leaves_who_is_in(
    world: RelayWorld, destination: NodeRelays
) -> None:
    source = world.relays(world.settings(SOURCE))
    used_token = await destination.admit(NAME, SOURCE)
    unused_token = await destination.admit("vm-other.1", SOURCE)
    uri = await source.open(NAME, world.target, used_token)
    async with connected(uri) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"

        await destination.withdraw(NAME)
        await destination.withdraw("vm-other.1")

        assert await exchange(reader, writer, b"y") == b"y"
        await destination.admit("vm-third.1", SOURCE)  # or nobody would be expected
        for token in (used_token, unused_token):
            assert not await Peer(world.port, world.tls[SOURCE]).is_let_through(greeting(token))
        for name in (NAME, "vm-other.1"):
            with pytest.raises(StateConflict):
                await destination.admit(name, SOURCE)


async def test_admissions_are_bounded(destination: NodeRelays) -> None:
    for number in range(relay_listener.ADMITTED_MAX):
        await destination.admit(f"vm-a.{number}", SOURCE)

    with pytest.raises(Overloaded):
        await destination.admit("vm-b.1", SOURCE)
    await destination.revoke("vm-a.0")
    await destination.admit("vm-b.1", SOURCE)
    await destination.withdraw("vm-a.1")
    await destination.admit("vm-b.2", SOURCE)


async def test_tokens_are_nowhere_on_disk_or_in_the_log(
    world: RelayWorld, destination: NodeRelays, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        token = await destination.admit(NAME, SOURCE)
        assert await Peer(world.port, world.tls[SOURCE]).is_let_through(greeting(token))

    written = b"".join(path.read_bytes() for path in (world.root / DESTINATION).iterdir())
    assert written
    assert token.encode() not in written
    assert token not in caplog.text


@pytest.mark.parametrize("name", ["", ".", "../escape", "vm/1", "VM", "a" * 65])
async def test_a_name_is_never_a_way_out_of_the_directory(
    destination: NodeRelays, name: str
) -> None:
    with pytest.raises(AssertionError):
        await destination.admit(name, SOURCE)


def test_what_ended_long_ago_is_swept_away(tmp_path: Path) -> None:
    own = relay_files.own_key()
    gone = own._replace(started=own.started + 1)
    for name, key in (("a.used", gone), ("b.dial", gone), ("c.used", own), ("young.used", gone)):
        assert claim(tmp_path / name, key)
    for name in ("b.sock", "a.99.draft", "c.sock"):
        (tmp_path / name).touch()
    for path in tmp_path.iterdir():
        if path.name != "young.used":
            os.utime(path, (1, 1))

    relay_files.sweep(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.sock", "c.used", "young.used"]


def test_a_file_that_a_crash_of_the_machine_emptied_names_nobody(tmp_path: Path) -> None:
    for content in (b"", b"12\n", b"\xff\xfe", b"a b c\n"):
        (tmp_path / "x.used").write_bytes(content)

        assert not lives(holder(tmp_path / "x.used") or relay_files.NOBODY)


async def test_a_node_reads_its_own_name_from_its_certificate(world: RelayWorld) -> None:
    out_of_date = world.certificates.issue(
        "n9", authority="old", now=datetime(2001, 1, 1, tzinfo=UTC)
    )

    assert own_identity(world.tls[SOURCE]) == Identity(CELL, Role.AGENT, SOURCE)
    assert own_identity(out_of_date) == Identity(CELL, Role.AGENT, "n9")


async def test_files_that_are_no_set_are_a_fault_of_the_configuration(world: RelayWorld) -> None:
    ours, theirs = world.tls[SOURCE], world.certificates.issue("n1", authority="another")

    for wrong in (
        ours._replace(key=theirs.key),
        ours._replace(ca=theirs.ca),
        ours._replace(certificate="/nowhere"),
    ):
        with pytest.raises(ConfigInvalid):
            own_identity(wrong)


def test_the_scheme_is_that_of_identities() -> None:
    assert f"{tls.SCHEME}://" == relay_link.SCHEME
