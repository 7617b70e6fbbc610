"""Processes of the previous release: a replica and an agent, wired to the same world.

They run their own code (``previous.py``). Disk, etcd, libvirt and the network are the present
ones, behind ports that translate; what goes over streams are bytes, as ever.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from controlplane.store.history import History
from shared.errors import Disconnected, NotFound, NovacronError
from shared.offload import Offload, inline
from shared.protocol import SESSION_METHOD
from tests.previous_release import VERSION
from tests.sim.agent_ports import LogOfProcess, ProcessHypervisor
from tests.sim.etcd_link import EtcdLink
from tests.sim.network import Serve, Stream
from tests.sim.previous import Translated, load, to_previous
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

# As its controlplane/sessions/grpc_server.py waits for a hello before it says who leads.
GREETING_TIMEOUT_S = 15.0


def make_replica(
    cluster: SimCluster,
    name: str,
    address: str,
    process: Process,
    disk: tuple[History, Offload],
    rng: random.Random,
) -> tuple[Any, Any]:
    """Return its ``ControlPlane`` and its ``EtcdStore``."""
    app, windows = load("controlplane.app"), load("controlplane.telemetry.windows").Windows()
    links = [Translated(EtcdLink(cluster.network, process, each)) for each in cluster.etcd.members]
    store = load("controlplane.store.etcd_pool").EtcdStore(links, rng)
    ports = app.Ports(
        store=store,
        history=_history(*disk),
        clock=cluster.clock_of(name),
        rng=rng,
        founding=to_previous(cluster.founding),
        offload=inline,
        windows=windows,
        metrics=load("controlplane.telemetry.exporter").unscraped_metrics(windows),
    )
    settings = app.ReplicaSettings(
        name=name,
        incarnation=process.incarnation,
        url=f"https://{name}:8443",
        agent_address=address,
        version=VERSION,
        election=to_previous(cluster.settings.election),
        sessions=to_previous(cluster.settings.sessions),
    )
    return app.ControlPlane(settings, ports), store


def replica_kinds() -> dict[str, Any]:
    return {SESSION_METHOD: load("shared.protocol").AgentMessage}


def serve_as(control_plane: Any, cell: str) -> Serve:
    """Return what such a replica does with a session that an agent has opened."""
    tls, protocol = load("shared.tls"), load("shared.protocol")

    async def serve(method: str, stream: Stream, host: str) -> None:
        hub = control_plane.hub()
        try:
            if hub is not None:
                await hub.serve(stream, tls.Identity(cell, tls.Role.AGENT, host))
                return
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await stream.receive()
            await stream.send(protocol.NotLeader(agent_address=control_plane.leader_address()))
        except (Disconnected, TimeoutError, NovacronError):
            return

    return serve


def make_agent(
    cluster: SimCluster,
    name: str,
    replicas: tuple[str, ...],
    boot_id: str,
    hypervisor: ProcessHypervisor,
    log: LogOfProcess,
    rng: random.Random,
    process: Process,
) -> Any:
    """Return its ``Agent``."""
    app, session = load("agent.app"), load("agent.session")
    answers = load("shared.protocol").LeaderMessage

    async def dial(address: str) -> Stream:
        return await cluster.network.dial(address, SESSION_METHOD, answers)

    facts = session.NodeFacts(
        name=name,
        address=name,
        labels={},
        boot_id=boot_id,
        incarnation=process.incarnation,
        agent_version=VERSION,
    )
    ports = app.AgentPorts(
        hypervisor=Translated(hypervisor), log=log, offload=log.offload, dial=dial, rng=rng
    )
    return app.Agent(facts, replicas, ports)


async def serve_use_case(
    use_case: Callable[..., Awaitable[Any]], context: Any, *arguments: Any, **named: Any
) -> Any:
    """Do what the previous release does for the same request, and return its own answer.

    Raises NotFound for what it lacks.
    """
    module = use_case.__module__
    try:
        found = getattr(load(module), use_case.__name__)
    except (ModuleNotFoundError, AttributeError):
        raise NotFound(f"0.1 has no {module}.{use_case.__name__}") from None
    return await found(
        context, *map(to_previous, arguments), **{k: to_previous(v) for k, v in named.items()}
    )


def _history(disk: History, offload: Offload) -> Any:
    """Return its view of a replica's SQLite, whose tables have not changed."""
    kind = load("controlplane.store.history").History
    history = kind.__new__(kind)
    history._offload, history._database = offload, disk._database
    return history
