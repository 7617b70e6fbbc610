"""A machine becomes a node with a token, stays one by renewing, and is none once it is revoked."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import stat
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from agent import session_grpc
from agent.certificate_request import make_request
from agent.handshake import REFUSED, why_not
from agent.session import LeaderChannel
from agent.session_grpc import Dialler
from controlplane import pki
from controlplane.services.views import (
    AdmissionList,
    AdmissionView,
    JoinTokenList,
    NewJoinTokenView,
)
from shared.admission import Issued, Renewal, RenewalRefused
from shared.clock import SystemClock
from shared.errors import Disconnected, Unauthenticated
from shared.join_token import JoinTokenText, parse_join_token
from shared.model import Sample
from shared.protocol import (
    BatchSeen,
    Heartbeat,
    Rejected,
    TelemetryHello,
    TelemetryRefused,
    Welcome,
)
from shared.tls import Identity, Role, TlsMaterial
from tests.integration.joining_node import JoiningNode
from tests.integration.replica_api import until
from tests.integration.replica_process import free_ports
from tests.integration.stranger import Stranger
from tests.integration.world import World

pytestmark = pytest.mark.etcd


@pytest.fixture(autouse=True)
def _soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not let in is turned away at once: waiting longer shows nothing more."""
    monkeypatch.setattr(session_grpc, "CONNECT_TIMEOUT_S", 2.0)


async def token_for(world: World, *nodes: str, needs_approval: bool = False) -> str:
    order = {"nodes": list(nodes), "needs_approval": needs_approval}
    return (await world.api.post(NewJoinTokenView, "/join-tokens", order)).token


def a_machine(world: World, tmp_path: Path, name: str) -> JoiningNode:
    return JoiningNode(tmp_path / name, name, world.replica.agents_address)


async def joined(world: World, tmp_path: Path, name: str) -> JoiningNode:
    node = a_machine(world, tmp_path, name)
    status, said = await node.join(await token_for(world, name), [world.replica.api_url])
    assert status == 0, said
    return node


async def greeted(world: World, name: str, material: TlsMaterial) -> object:
    async with Stranger(world.replica.agents_address, material) as agent:
        return await agent.greet(name)


@pytest.fixture
async def dialler(shared_world: World) -> AsyncIterator[list[Dialler]]:
    """Connections that a test opens, to be closed after it."""
    opened: list[Dialler] = []
    yield opened
    for each in opened:
        await each.close()


async def renewed(world: World, node: JoiningNode, opened: list[Dialler]) -> Issued:
    """Have a node renew as its agent does; what it gets is on its disk then."""
    answer = await asked(world, node.material, opened, node.files.qemu_key(), node.name)
    key, issued = answer
    assert isinstance(issued, Issued), issued
    node.files.replace(key, node.files.qemu_key(), issued)
    return issued


async def asked(
    world: World, material: TlsMaterial, opened: list[Dialler], qemu_key: str, name: str
) -> tuple[str, Issued | RenewalRefused]:
    agent, qemu = make_request(name), make_request(name, qemu_key)
    connection = Dialler(material, random.Random(1))
    opened.append(connection)
    renewal = Renewal(agent_request=agent.request, qemu_request=qemu.request)
    return agent.key, await connection.renew(world.replica.agents_address, renewal)


async def test_a_machine_with_a_token_becomes_a_node(shared_world: World, tmp_path: Path) -> None:
    node = a_machine(shared_world, tmp_path, "new-1")
    token = await token_for(shared_world, "new-1")
    status, said = await node.join(token, [shared_world.replica.api_url])
    assert status == 0, said
    assert "new-1 has joined" in said
    assert isinstance(await greeted(shared_world, "new-1", node.material), Welcome)
    assert sorted(path.name for path in node.tls.iterdir()) == ["agent.pem", "ca.crt", "peers.crt"]
    assert stat.S_IMODE((node.tls / "agent.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((node.qemu / "server-key.pem").stat().st_mode) == 0o640
    lasts = node.files.validity()
    assert timedelta(days=7) <= lasts.ends_at - lasts.begins_at <= timedelta(days=7, minutes=6)
    secret = parse_join_token(token).secret
    for shown in (said, shared_world.replica.log_text(), (node.tls / "agent.pem").read_text()):
        assert secret not in shown


async def test_a_tokens_secret_is_told_once(shared_world: World) -> None:
    """Also to a client that asks again under the key of its request."""
    key = {b"Idempotency-Key": b"one-token"}
    first, again = [
        await shared_world.api.send("POST", "/api/v1/join-tokens", {}, headers=key)
        for _ in range(2)
    ]
    assert first.status_code == 201
    made = msgspec.json.decode(first.content, type=NewJoinTokenView)
    assert again.status_code == 409
    assert made.id in again.text
    assert parse_join_token(made.token).secret not in again.text
    gone = await shared_world.api.send("DELETE", f"/api/v1/join-tokens/{made.id}")
    assert gone.status_code == 200
    listed = await shared_world.api.get(JoinTokenList, "/join-tokens?limit=500")
    assert made.id not in {each.id for each in listed.items}


async def test_what_root_has_joined_belongs_to_the_agent(
    shared_world: World, tmp_path: Path
) -> None:
    node = a_machine(shared_world, tmp_path, "by-root")
    for directory in (node.tls, node.qemu):
        os.chown(directory, 4711, 4712)
        directory.chmod(0o2750)
    status, said = await node.join(await token_for(shared_world), [shared_world.replica.api_url])
    assert status == 0, said
    assert {path.stat().st_uid for path in (*node.tls.iterdir(), *node.qemu.iterdir())} == {4711}
    assert {path.stat().st_gid for path in node.qemu.iterdir()} == {4712}


async def test_a_token_is_good_once(shared_world: World, tmp_path: Path) -> None:
    token = await token_for(shared_world)
    endpoints = [shared_world.replica.api_url]
    first = a_machine(shared_world, tmp_path, "once-1")
    status, said = await first.join(token, endpoints)
    assert status == 0, said
    status, said = await a_machine(shared_world, tmp_path, "once-2").join(token, endpoints)
    assert status == 1
    assert "the join token was used for node 'once-1'" in said
    assert isinstance(await greeted(shared_world, "once-1", first.material), Welcome)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: JoinTokenText(t.id, "0" * 52, t.ca_sha256), "there is no such join token"),
        (lambda t: JoinTokenText("join-none", t.secret, t.ca_sha256), "there is no such join"),
        (lambda t: JoinTokenText(t.id, t.secret, "0" * 64), "its CA is another one"),
        (lambda t: "nonsense", "does not look like njt_"),
    ],
    ids=["another secret", "no such token", "another cell's", "no token"],
)
async def test_other_tokens_let_nobody_in(
    shared_world: World, tmp_path: Path, spoil: object, says: str
) -> None:
    assert callable(spoil)
    token = parse_join_token(await token_for(shared_world))
    node = a_machine(shared_world, tmp_path, "stranger")
    status, said = await node.join(str(spoil(token)), [shared_world.replica.api_url])
    assert status == 1
    assert says in said
    assert not (node.tls / "agent.pem").exists()


async def test_an_answer_of_an_impostor_is_not_believed(
    shared_world: World, tmp_path: Path
) -> None:
    """Somebody who has a node's certificate answers in the control plane's place."""
    insider = await joined(shared_world, tmp_path, "insider")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(insider.config.tls.certificate)
    ca = shared_world.cell.files.ca_file.read_bytes()
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ca), ca))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    node = a_machine(shared_world, tmp_path, "misled")
    async with server:
        status, said = await node.join(await token_for(shared_world), [f"https://127.0.0.1:{port}"])
    assert status == 1
    assert "is not trusted" in said
    assert not any(b"POST" in each for each in heard), "the token was not shown to it"


async def test_a_node_waits_until_it_is_approved(shared_world: World, tmp_path: Path) -> None:
    node = a_machine(shared_world, tmp_path, "patient")
    token = await token_for(shared_world, needs_approval=True)
    status, said = await node.join(token, [shared_world.replica.api_url])
    assert status == 1
    assert "nobody has approved this node yet" in said
    waiting = await node.start_join(token, [shared_world.replica.api_url], 60.0)
    listed = await shared_world.api.get(AdmissionList, "/admissions?limit=500")
    assert [(a.name, a.approved) for a in listed.items if a.name == "patient"] == [
        ("patient", False)
    ]
    await shared_world.api.post(AdmissionView, "/admissions/patient/actions/approve")
    output, complaints = await waiting.communicate()
    assert waiting.returncode == 0, complaints
    assert b"patient has joined" in output
    assert isinstance(await greeted(shared_world, "patient", node.material), Welcome)


async def test_a_node_renews_and_its_older_certificates_are_of_no_use(
    shared_world: World, tmp_path: Path, dialler: list[Dialler]
) -> None:
    node = await joined(shared_world, tmp_path, "lasting")
    first, qemu_key = node.material, node.files.qemu_key()
    await renewed(shared_world, node, dialler)
    second = node.material
    assert second.key != first.key
    assert node.files.qemu_key() == qemu_key
    # The answer may have been lost: what it was asked for with still counts.
    assert isinstance(await greeted(shared_world, "lasting", first), Welcome)
    assert isinstance(await greeted(shared_world, "lasting", second), Welcome)
    await renewed(shared_world, node, dialler)
    assert isinstance(await greeted(shared_world, "lasting", second), Welcome)
    stolen = await greeted(shared_world, "lasting", first)
    assert isinstance(stolen, Rejected)
    assert stolen.problem.code == Unauthenticated.code
    assert "not the newest certificate" in stolen.problem.detail
    _, refused = await asked(shared_world, first, dialler, qemu_key, "lasting")
    assert isinstance(refused, RenewalRefused)
    assert "not the newest certificate" in shared_world.replica.log_text()


async def test_nothing_of_a_revoked_node_is_taken_any_more(
    shared_world: World, tmp_path: Path, dialler: list[Dialler]
) -> None:
    api, address = shared_world.api, shared_world.replica.agents_address
    node = await joined(shared_world, tmp_path, "lost")
    connection = Dialler(node.material, random.Random(1))
    dialler.append(connection)
    async with Stranger(address, node.material) as agent:
        welcome = await agent.greet("lost")
        assert isinstance(welcome, Welcome)
        hello = TelemetryHello(node_name="lost", node_id=welcome.node_id, incarnation="1")
        sample = Sample(object=welcome.node_id, at=1e9)
        assert isinstance(await agent.measure(hello, sample), BatchSeen)
        order = {"reason": "stolen"}
        seen = await api.post(AdmissionView, "/admissions/lost/actions/revoke", order)
        assert seen.revoked_at is not None
        rejected = await agent.greet("lost")
        assert isinstance(rejected, Rejected)
        assert "node 'lost' was revoked at" in rejected.problem.detail
        refused = await agent.measure(hello)
        assert isinstance(refused, TelemetryRefused)
    _, renewal = await asked(shared_world, node.material, dialler, "", "lost")
    assert isinstance(renewal, RenewalRefused)
    assert "node 'lost' was revoked at" in shared_world.replica.log_text()
    again = a_machine(shared_world, tmp_path / "again", "lost")
    status, said = await again.join(
        await token_for(shared_world, "lost"), [shared_world.replica.api_url]
    )
    assert status == 0, said
    assert isinstance(await greeted(shared_world, "lost", again.material), Welcome)
    assert isinstance(await greeted(shared_world, "lost", node.material), Rejected)


async def test_a_session_ends_when_its_node_is_revoked(
    shared_world: World, tmp_path: Path, dialler: list[Dialler]
) -> None:
    """Also one whose agent says nothing."""
    node = await joined(shared_world, tmp_path, "silent")
    connection = Dialler(node.material, random.Random(1))
    dialler.append(connection)
    agent = Stranger(shared_world.replica.agents_address, node.material)
    async with agent, agent.session("silent") as channel:
        await shared_world.api.post(AdmissionView, "/admissions/silent/actions/revoke")
        async with asyncio.timeout(10):
            # What was on its way to it may come first.
            with pytest.raises(Disconnected):
                [await channel.receive() for _ in range(100)]


async def test_who_waits_on_a_stream_hears_that_its_certificate_was_replaced(
    shared_world: World, tmp_path: Path, dialler: list[Dialler]
) -> None:
    """Not that it is cancelled: nobody would look after it any more."""
    node = await joined(shared_world, tmp_path, "changing")
    connection = Dialler(node.material, random.Random(1))
    dialler.append(connection)
    address = shared_world.replica.agents_address
    channel = await connection.session(address)
    waiting = asyncio.ensure_future(channel.receive())
    (silent,) = free_ports(1)
    dialling = asyncio.ensure_future(connection.session(f"127.0.0.1:{silent}"))
    await asyncio.sleep(0.5)
    await renewed(shared_world, node, dialler)
    await connection.use(node.material)
    for each in (waiting, dialling):
        with pytest.raises(Disconnected):
            await each
    with pytest.raises(Disconnected):
        await channel.send(Heartbeat(number=1))
    again = await connection.session(address)
    await connection.use(node.material)
    assert not await _has_ended(again), "nothing changed: the stream goes on"


async def _has_ended(channel: LeaderChannel) -> bool:
    """Whether a stream that was not greeted has ended, after a moment."""
    waiting = asyncio.ensure_future(channel.receive())
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    waiting.cancel()
    return bool(done)


def _spoilt(world: World, node: JoiningNode, stem: str, days: float) -> str:
    """Give a node a certificate that began so many days ago, and return why it fails."""
    root = world.cell.files.root
    authority = pki.load_authority(root / f"{stem}.crt", root / f"{stem}.key")
    key, identity = pki.new_key(), Identity(world.cell.cell, Role.AGENT, node.name)
    began = SystemClock().now() - timedelta(days=days)
    week = timedelta(days=7)
    certificate = pki.issue(authority, identity, [], key.public_key(), began, lifetime=week)
    node.config.tls.certificate.write_bytes(certificate + pki.key_pem(key))
    return why_not(world.replica.agents_address, node.config.tls)


async def test_both_sides_say_what_is_wrong_with_a_certificate(
    shared_world: World, tmp_path: Path
) -> None:
    node = await joined(shared_world, tmp_path, "spoilt")
    explain = asyncio.to_thread
    assert await explain(why_not, shared_world.replica.agents_address, node.config.tls) == ""
    for stem, days in (("agents-ca", 9.0), ("agents-ca", -2.0), ("qemu-ca", 0.0)):
        assert await explain(_spoilt, shared_world, node, stem, days) == REFUSED
        with pytest.raises(Disconnected):
            await greeted(shared_world, "spoilt", node.material)
    told = shared_world.replica.log_text()
    for says in ("certificate has expired", "certificate is not yet valid", "unable to get"):
        assert says in told
    (silent,) = free_ports(1)
    assert await explain(why_not, f"127.0.0.1:{silent}", node.config.tls) == "connection refused"
    node.config.tls.ca.write_bytes((shared_world.cell.files.root / "etcd-ca.crt").read_bytes())
    said = await explain(why_not, shared_world.replica.agents_address, node.config.tls)
    assert "its certificate is not good here" in said


async def test_a_node_of_init_renews_into_the_agents_ca(
    shared_world: World, dialler: list[Dialler]
) -> None:
    material = shared_world.cell.node_tls("older")
    assert isinstance(await greeted(shared_world, "older", material), Welcome)
    _, issued = await asked(shared_world, material, dialler, "", "older")
    assert isinstance(issued, Issued)
    agents_ca = ssl.create_default_context(cadata=issued.peers_ca)
    assert len(agents_ca.get_ca_certs()) >= 2
    await until(lambda: _is_admitted(shared_world, "older"), "the node's admission")


async def _is_admitted(world: World, name: str) -> bool:
    listed = await world.api.get(AdmissionList, "/admissions?limit=500")
    return any(each.name == name and each.approved for each in listed.items)
