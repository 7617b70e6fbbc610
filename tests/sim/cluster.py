"""A whole cluster in one process: model etcd, replicas, nodes with agents, the network between.

Owns what a disk, a kernel and a supervisor would: what survives a process, its death and its next
start. Everything that acts is the product's own code. With a real loop, the system's clock and no
faults it serves the simulated demo; under the virtual loop and one seed, the simulation.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime

from msgspec import Struct

from agent.hypervisor import HypervisorFacts
from agent.simulated_driver import simulated_facts
from agent.simulated_fabric import SimulatedFabric
from controlplane.app import ControlPlane
from controlplane.election import ElectionSettings
from controlplane.leader import Founding
from controlplane.services.context import Context
from controlplane.sessions import following
from controlplane.sessions.hub import HubSettings
from controlplane.sessions.peer_messages import PEER_METHOD, PeerAnswer, PeerRequest
from controlplane.store import comparison
from controlplane.store.etcd_members import Limits
from shared.clock import Clock
from shared.errors import NoLeader
from shared.ids import new_cell
from shared.model import SCHEMA_LEVEL, ApiKey, Cluster
from shared.protocol import (
    SESSION_METHOD,
    TELEMETRY_METHOD,
    AgentMessage,
    LeaderMessage,
    TelemetryAnswer,
    TelemetryMessage,
)
from tests.sim.clocks import HostClock
from tests.sim.etcd import Commit, EtcdHosts
from tests.sim.ledger import SimEvent, committed
from tests.sim.network import Kinds, Network, NetworkSettings
from tests.sim.node import SHARED_POOL, SimNode
from tests.sim.replica import SimReplica
from tests.sim.trace import Trace
from tests.sim.virtual_loop import VirtualLoop, true_time_s

log = logging.getLogger(__name__)

AGENT_PORT = 8444
METHODS = {
    SESSION_METHOD: Kinds(by_server=AgentMessage, by_client=LeaderMessage),
    TELEMETRY_METHOD: Kinds(by_server=TelemetryMessage, by_client=TelemetryAnswer),
    PEER_METHOD: Kinds(by_server=PeerRequest, by_client=PeerAnswer, lasting=False),
}

Observer = Callable[[SimEvent], None]


class _MachineClock:
    """What a machine's processes are told of time, by its own clock."""

    def __init__(self, clock: HostClock) -> None:
        self._clock = clock

    def now(self) -> datetime:
        return self._clock.date(true_time_s())

    def boottime_s(self) -> float:
        return self._clock.own_s(true_time_s())


class ClusterSettings(Struct, frozen=True, kw_only=True):
    """How large it is, and the product's own times. ``telemetry``: agents also send samples.

    ``held_up_share`` of the calls to libvirt take seconds.
    """

    replicas: int = 1
    members: int = 1
    nodes: int = 3
    node_cpus: int = 8
    node_memory_mib: int = 8192
    telemetry: bool = False
    held_up_share: float = 0.05
    network: NetworkSettings = NetworkSettings()
    election: ElectionSettings = ElectionSettings()
    sessions: HubSettings = HubSettings()
    store: Limits = Limits()
    exchange_period_s: float = following.PERIOD_S
    comparison_period_s: float = comparison.PERIOD_S


class SimCluster:
    """``observe`` is told of every commit and of every guest that starts or ends."""

    def __init__(
        self,
        settings: ClusterSettings,
        rng: random.Random,
        *,
        clock: Clock | None = None,
        trace: Trace | None = None,
        founding: Founding | None = None,
        observe: Observer | None = None,
        schema_level: int = SCHEMA_LEVEL,
    ) -> None:
        self.settings = settings
        self.rng = rng
        self._clock = clock
        self._host_clocks: dict[str, HostClock] = {}
        self.clock = self.clock_of("")
        self.trace = trace or Trace()
        self.founding = founding or _founding(rng, self.clock, schema_level)
        self._observer = observe
        self.network = Network(self.part(), self.trace, METHODS, settings.network)
        self.fabric = SimulatedFabric(linked=self._linked)
        self.etcd = EtcdHosts(settings.members, self.part(), self._committed)
        names = [f"replica-{number + 1}" for number in range(settings.replicas)]
        self._addresses = tuple(f"{name}:{AGENT_PORT}" for name in names)
        self.replicas = {name: SimReplica(self, name) for name in names}
        self.nodes: dict[str, SimNode] = {}
        for _ in range(settings.nodes):
            self.add_node()

    def add_node(self) -> SimNode:
        """Set a further node up; it joins once its agent is started."""
        name = f"node-{len(self.nodes) + 1}"
        node = self.nodes[name] = SimNode(self, name, self._addresses)
        return node

    async def start(self) -> None:
        for replica in self.replicas.values():
            replica.start()
        for node in self.nodes.values():
            node.start_agent()

    async def stop(self) -> None:
        """End every process in order; guests and data are simply dropped."""
        for node in self.nodes.values():
            await node.stop_agent()
        for replica in self.replicas.values():
            await replica.stop()
        await self.etcd.close()

    async def until_ready(self) -> None:
        """Wait until a replica leads and every node is ready."""
        while not self._is_ready():  # noqa: ASYNC110 - what it waits for is spread over parts
            await asyncio.sleep(0.05)

    def control_plane(self, name: str) -> ControlPlane:
        """Return a replica's present process. Raises NoLeader while it is down."""
        control_plane = self.replicas[name].control_plane
        if control_plane is None:
            raise NoLeader(f"{name} is down")
        return control_plane

    def leading(self) -> ControlPlane | None:
        """Return the replica that leads, as it says itself."""
        for replica in self.replicas.values():
            if replica.control_plane is not None and replica.control_plane.leader.term is not None:
                return replica.control_plane
        return None

    def context(self) -> Context:
        """Return what services work with on the leading replica. Raises NoLeader."""
        leading = self.leading()
        if leading is None:
            raise NoLeader("no replica leads at present")
        return leading.context()

    def host_clock(self, host: str) -> HostClock:
        """Return a machine's own clock; nobody's, for an empty name, is always right."""
        return self._host_clocks.setdefault(host, HostClock())

    def set_rate(self, host: str, rate: float) -> None:
        """Let a machine's clock run at another rate, its timers too."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop), "real clocks are as they are"
        loop.change_rate(self.host_clock(host), rate)

    def right_clocks(self) -> None:
        for host, clock in self._host_clocks.items():
            clock.date_off_s = 0.0
            if clock.rate != 1.0:
                self.set_rate(host, 1.0)

    def clock_of(self, host: str) -> Clock:
        """Return the clock that a machine's processes are given."""
        return self._clock or _MachineClock(self.host_clock(host))

    def part(self) -> random.Random:
        """Return a source of randomness of its own, so that parts do not disturb each other."""
        return random.Random(self.rng.getrandbits(64))

    def observe(self, event: SimEvent) -> None:
        """Tell of something that happened, and keep it in the trace."""
        self.trace.note(_line(event))
        if self._observer is not None:
            self._observer(event)

    def facts(self) -> HypervisorFacts:
        """Return what every node's hypervisor says of itself."""
        return simulated_facts(
            cpus=self.settings.node_cpus,
            memory_mib=self.settings.node_memory_mib,
            pools=("default", SHARED_POOL),
            shared_pools=(SHARED_POOL,),
        )

    def _linked(self, one: str, other: str) -> bool:
        """Whether bytes pass between two nodes: neither is cut off nor without power."""
        powered = all(self.nodes[name].powered for name in (one, other))
        return powered and self.network.linked(one, other)

    def _is_ready(self) -> bool:
        leading = self.leading()
        if leading is None or leading.hub() is None:
            return False
        hub = leading.hub()
        ids = [leading.state.node_id_by_name(name) for name in self.nodes]
        return hub is not None and all(each is not None and hub.trusts(each) for each in ids)

    def _committed(self, commit: Commit) -> None:
        changes = [(e.kv.key, None if e.deleted else e.kv.value) for e in commit.events]
        named = ", ".join(key.removeprefix("/novacron/") for key, _ in changes)
        self.trace.note(f"revision {commit.revision} by {commit.writer}: {named}")
        if self._observer is not None:
            self._observer(committed(commit.revision, commit.writer, changes))


def _founding(rng: random.Random, clock: Clock, schema_level: int) -> Founding:
    cell = new_cell(rng)
    now = clock.now()
    return Founding(
        Cluster(id=f"cluster-{cell}", cell=cell, created_at=now, schema_level=schema_level),
        ApiKey(id=f"key-{cell}", sha256="", principal="admin", role="admin", created_at=now),
    )


def _line(event: SimEvent) -> str:
    return repr(event)
