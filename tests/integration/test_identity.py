"""Who may speak for a node: what does not fit is refused, each time, and nothing is changed."""

from __future__ import annotations

import asyncio
import random
import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from agent import session_grpc
from controlplane import pki
from controlplane.cell_files import CellFiles
from controlplane.services.views import SeriesView
from shared.clock import SystemClock
from shared.errors import Disconnected, Forbidden
from shared.model import Sample
from shared.protocol import (
    BatchSeen,
    Rejected,
    TelemetryHello,
    TelemetryRefused,
    Welcome,
)
from shared.tls import Identity, Role, TlsMaterial
from tests.integration.simulated_agent import WitnessNode
from tests.integration.stranger import Stranger
from tests.integration.world import World

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def foreign_cell(tmp_path_factory: pytest.TempPathFactory) -> CellFiles:
    """Another cell that has a node n1 and a replica r1 too."""
    files = CellFiles(tmp_path_factory.mktemp("foreign"), SystemClock(), random.Random(1))
    files.ensure_cell()
    files.add_node("n1", "127.0.0.1")
    files.add_replica("r1", "127.0.0.1")
    return files


@pytest.fixture(autouse=True)
def _soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not let in is turned away at once: waiting longer shows nothing more."""
    monkeypatch.setattr(session_grpc, "CONNECT_TIMEOUT_S", 2.0)


async def test_the_right_certificate_is_welcome(shared_world: World) -> None:
    async with Stranger(
        shared_world.replica.agents_address, shared_world.cell.node_tls("good")
    ) as agent:
        assert isinstance(await agent.greet("good"), Welcome)
    assert "good" in {node.name for node in await shared_world.api.nodes()}


async def test_a_client_of_another_ca_does_not_get_past_tls(
    shared_world: World, foreign_cell: CellFiles
) -> None:
    directory = foreign_cell.root / "nodes" / "n1"
    foreign = TlsMaterial(
        ca=shared_world.cell.files.ca_file.read_bytes(),
        certificate=(directory / "agent.crt").read_bytes(),
        key=(directory / "agent.key").read_bytes(),
    )
    before = await shared_world.api.nodes()
    async with _stranger(shared_world, foreign) as agent:
        with pytest.raises(Disconnected):
            await agent.greet("n1")
    files = (directory / "agent.crt", directory / "agent.key")
    assert not await _http2_begins(shared_world, files)
    assert not await _http2_begins(shared_world, None)
    # The same way with the right certificate is open: what closed the others is TLS.
    shared_world.cell.node_tls("n1")
    ours = shared_world.cell.files.root / "nodes" / "n1"
    assert await _http2_begins(shared_world, (ours / "agent.crt", ours / "agent.key"))
    assert await shared_world.api.nodes() == before


@pytest.mark.parametrize(
    ("cell", "role"),
    [(None, Role.REPLICA), (None, Role.QEMU), ("vvvvvv", Role.AGENT)],
    ids=["a replica's", "a QEMU's", "another cell's name under our CA"],
)
async def test_a_certificate_of_ours_that_is_no_agents_here_is_refused(
    shared_world: World, cell: str | None, role: Role
) -> None:
    identity = Identity(cell or shared_world.cell.cell, role, "n1")
    before = await shared_world.api.nodes()
    async with Stranger(
        shared_world.replica.agents_address, _issue(shared_world, identity)
    ) as agent:
        with pytest.raises(Disconnected):
            await agent.greet("n1")
        hello = TelemetryHello(node_name="n1", node_id="node-x", incarnation="1")
        with pytest.raises(Disconnected):
            await agent.measure(hello)
    assert await shared_world.api.nodes() == before
    refusals = shared_world.replica.log_text().count(f"is refused: {identity} is not an agent")
    assert refusals == 2


async def test_an_agent_that_claims_another_nodes_name_is_rejected(shared_world: World) -> None:
    async with Stranger(
        shared_world.replica.agents_address, shared_world.cell.node_tls("victim")
    ) as victim:
        assert isinstance(await victim.greet("victim"), Welcome)
    before = await shared_world.api.nodes()
    (node_id,) = [node.id for node in before if node.name == "victim"]
    async with Stranger(
        shared_world.replica.agents_address, shared_world.cell.node_tls("thief")
    ) as thief:
        rejected = await thief.greet("victim")
        assert isinstance(rejected, Rejected)
        assert rejected.problem.code == Forbidden.code
        claim = TelemetryHello(node_name="victim", node_id=node_id, incarnation="1")
        refused = await thief.measure(claim)
        assert isinstance(refused, TelemetryRefused)
        assert refused.problem.code == Forbidden.code
    assert await shared_world.api.nodes() == before


async def test_figures_of_others_are_ignored(shared_world: World) -> None:
    api = shared_world.api
    async with shared_world.agent(WitnessNode("owner"), telemetry=False) as owner:
        await api.done(await api.create("owned"))
        vm = await api.vm("owned")
        assert vm.status.node == owner.node_id
        async with Stranger(
            shared_world.replica.agents_address, shared_world.cell.node_tls("liar")
        ) as liar:
            welcome = await liar.greet("liar")
            assert isinstance(welcome, Welcome)
            objects = (welcome.node_id, owner.node_id or "", vm.id)
            samples = tuple(
                Sample(object=each, at=at, cpu_s_total=at)
                for at in (1e9, 1e9 + 5)
                for each in objects
            )
            hello = TelemetryHello(node_name="liar", node_id=welcome.node_id, incarnation="1")
            assert isinstance(await liar.measure(hello, *samples), BatchSeen)
        own = await api.get(SeriesView, "/nodes/liar/metrics")
        assert own.latest is not None
        for path in ("/nodes/owner/metrics", "/vms/owned/metrics"):
            assert (await api.get(SeriesView, path)).latest is None
        await api.done(await api.delete("owned"))


async def test_an_agent_speaks_to_no_replica_of_another_ca(
    shared_world: World, foreign_cell: CellFiles
) -> None:
    ours = shared_world.cell.node_tls("n1")
    misled = TlsMaterial(
        ca=foreign_cell.ca_file.read_bytes(), certificate=ours.certificate, key=ours.key
    )
    async with _stranger(shared_world, misled) as agent:
        with pytest.raises(Disconnected, match="did not accept a connection"):
            await agent.greet("n1")
    assert "n1" not in {node.name for node in await shared_world.api.nodes()}


def _stranger(world: World, tls: TlsMaterial) -> Stranger:
    return Stranger(world.replica.agents_address, tls)


def _issue(world: World, identity: Identity) -> TlsMaterial:
    """Return a certificate of the world's own CA for any identity."""
    root = world.cell.files.root
    authority = pki.load_authority(root / "ca.crt", root / "ca.key")
    key = pki.new_key()
    certificate = pki.issue(
        authority, identity, ["127.0.0.1"], key.public_key(), SystemClock().now()
    )
    return TlsMaterial(
        ca=(root / "ca.crt").read_bytes(), certificate=certificate, key=pki.key_pem(key)
    )


async def _http2_begins(world: World, files: tuple[Path, Path] | None) -> bool:
    """Tell whether the agents' port speaks HTTP/2 to whoever shows this certificate, or none."""
    context = ssl.create_default_context(cafile=str(world.cell.files.ca_file))
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(*files)
    host, _, port = world.replica.agents_address.partition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    except (ssl.SSLError, ConnectionError):
        return False
    try:
        async with asyncio.timeout(30):
            return await reader.read(1) != b""
    except (ssl.SSLError, ConnectionError):
        return False
    finally:
        writer.transport.abort()
        with suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()
