"""One replica, wired: everything that a replica is except its network servers.

``controlplane/__main__.py`` hands in the real ports, the simulation its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from msgspec import Struct

from controlplane.commands.migrations import MigrationLimits
from controlplane.election import Election, ElectionSettings
from controlplane.issuer import Issues
from controlplane.leader import Founding, Leader, LeaderParts
from controlplane.reconcilers import loop
from controlplane.reconcilers.history import CopyHistory, ForgetHistory
from controlplane.scheduler.request import SchedulerSettings
from controlplane.services import admission
from controlplane.services.context import Context, Leadership
from controlplane.sessions import following
from controlplane.sessions.following import Following
from controlplane.sessions.hub import Hub, HubSettings
from controlplane.sessions.leader_link import LeaderLink, PeerCall
from controlplane.sessions.peer_messages import AgentList
from controlplane.sessions.peer_reads import PeerReads
from controlplane.sessions.peers import PeerAnswers
from controlplane.sessions.telemetry import TelemetryServer
from controlplane.state import ClusterState
from controlplane.store import comparison
from controlplane.store.comparison import Comparison
from controlplane.store.history import History
from controlplane.store.informer import Informer
from controlplane.store.port import ETCD_QUOTA_BYTES, Store
from controlplane.store.space import StoreSpace
from controlplane.telemetry.exporter import Metrics
from controlplane.telemetry.progress import ProgressBoard
from controlplane.telemetry.windows import WINDOW_S, Windows
from shared.admission import Issued, Renewal
from shared.clock import Clock
from shared.codec import pack
from shared.errors import NovacronError
from shared.ids import IdSource
from shared.model import (
    FinishedOperation,
    HistoryEntry,
    LeaderKey,
    Operation,
    Record,
    Replica,
    Term,
    Vm,
)
from shared.offload import Offload
from shared.protocol import MigrationProgress

log = logging.getLogger(__name__)

# A replica's own registration is for people; it may be a while behind its process.
REGISTRATION_TTL_S = 15
REGISTRATION_PERIOD_S = 5.0
EXPIRE_PERIOD_S = 60.0
# A person turns pages within minutes. What was is kept for at least this long, and at most twice.
PAST_PERIOD_S = 300.0


class ReplicaSettings(Struct, frozen=True, kw_only=True):
    """Who a replica is, and its times; ``incarnation`` is new for each process."""

    name: str
    incarnation: str
    url: str
    agent_address: str
    version: str
    election: ElectionSettings = ElectionSettings()
    sessions: HubSettings = HubSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    migrations: MigrationLimits = MigrationLimits()
    exchange_period_s: float = following.PERIOD_S
    comparison_period_s: float = comparison.PERIOD_S
    store_quota_bytes: int = ETCD_QUOTA_BYTES


class Ports(Struct, frozen=True):
    """What a replica is given of the world.

    ``settle_memory`` is called once the cluster has been listed, which stays for long: a process
    that has its memory to itself keeps its collector from looking at all of it again and again.
    ``issuer`` is there where this replica holds the nodes' CAs.
    """

    store: Store
    history: History
    clock: Clock
    rng: random.Random
    founding: Founding
    offload: Offload
    windows: Windows
    metrics: Metrics
    peers: PeerCall
    settle_memory: Callable[[], None]
    issuer: Issues | None = None


class ControlPlane:
    def __init__(self, settings: ReplicaSettings, ports: Ports) -> None:
        self._settings = settings
        self._ports = ports
        self._ids = IdSource(ports.founding.cluster.cell, ports.clock, ports.rng)
        self.state = ClusterState()
        self.informer = Informer(ports.store, self.state, ports.metrics.store_mismatches)
        self._comparison = Comparison(
            ports.store, self.state, self.informer, settings.comparison_period_s
        )
        self._space = StoreSpace(ports.store, settings.store_quota_bytes, ports.metrics.store_space)
        self.windows = ports.windows
        self.progress = ProgressBoard(ports.clock)
        self.telemetry = TelemetryServer(self.state, self.windows)
        self._reads = PeerReads(ports.windows, self._peer_addresses, ports.peers)
        self._copy = CopyHistory(self.state, ports.history, self._reads)
        self._forget = ForgetHistory(self.state, ports.history, ports.clock)
        self._me = LeaderKey(
            replica=settings.name, incarnation=settings.incarnation, url=settings.url
        )
        self._registration = Replica(
            name=settings.name,
            incarnation=settings.incarnation,
            url=settings.url,
            agent_address=settings.agent_address,
            version=settings.version,
            started_at=ports.clock.now(),
        )
        self._election = Election(
            ports.store,
            self._me,
            settings.election,
            ports.clock,
            ports.rng,
            self.informer.leader_key.next,
        )
        self.leader = Leader(
            LeaderParts(
                store=ports.store,
                state=self.state,
                informer=self.informer,
                ids=self._ids,
                clock=ports.clock,
                founding=ports.founding,
                hub_settings=settings.sessions,
                scheduler=settings.scheduler,
                metrics=ports.metrics,
                limits=settings.migrations,
                offload=ports.offload,
                progress=self._note_progress,
                copied=self._copied_by_majority,
            )
        )
        self._link = LeaderLink(self.leader, self.state, self._leading_peer, ports.peers)
        self._following = Following(
            settings.name,
            self._leading_peer,
            lambda: self._copy.copied_seq,
            self.progress,
            ports.peers,
            settings.exchange_period_s,
        )
        self.peers = PeerAnswers(
            ports.founding.cluster.cell,
            self.leader,
            self.state,
            ports.history,
            ports.windows,
            self.progress,
            self._agents,
        )

    async def run(self) -> None:
        """Follow, copy and forget history, stand for election: until cancelled."""
        ready = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            # Before anything is read, which may take seconds: nobody leads until then.
            tasks.create_task(self._election.give_back())
            tasks.create_task(self.informer.run(ready.set))
            await ready.wait()
            self._ports.settle_memory()
            # From here on, not before: what was listed was counted by an earlier process.
            self.state.observe(self._record_changed)
            self.state.observe_history(self._entry_added)
            tasks.create_task(loop.run(self._copy, self.state.changes))
            tasks.create_task(loop.run_periodically(self._forget))
            tasks.create_task(self._comparison.run())
            tasks.create_task(loop.run_periodically(self._space))
            tasks.create_task(self._expire_windows())
            tasks.create_task(self._forget_past())
            tasks.create_task(self._election.run(self.leader.lead, self.leader.unfit))
            tasks.create_task(self._following.run())
            tasks.create_task(self._stay_registered())

    def hand_over(self) -> None:
        """Let another replica lead; this one goes on following, for requests under way."""
        self._election.retire()
        self.leader.give_up()

    def hub(self) -> Hub | None:
        """Return the sessions of the present term, if this replica leads."""
        return self.leader.hub

    def leader_address(self) -> str | None:
        """Return where agents find the leader, as far as this replica knows."""
        leader = self._election.leader
        replica = None if leader is None else self.informer.replicas.get(leader.replica)
        return None if replica is None else replica.agent_address

    def leadership(self) -> Leadership:
        leader, cluster = self._election.leader, self.state.cluster()
        if leader is None or cluster is None:
            return Leadership()
        term = Term(cluster.epoch, self._election.leader_revision)
        return Leadership(leader.replica, leader.url, str(term), leader.since)

    def replicas(self) -> tuple[Replica, ...]:
        return tuple(replica for _, replica in sorted(self.informer.replicas.items()))

    def agent_versions(self) -> dict[str, str]:
        """Return what the agents in session with the leader say they are, by node id."""
        return self._agents().versions

    def context(self) -> Context:
        """Return what the services work with."""
        return Context(
            state=self.state,
            submit=self._link.submit,
            ask=self._link.ask,
            history=self._ports.history,
            figures=self._reads,
            progress=self.progress,
            store=self._ports.store,
            space=self._space,
            clock=self._ports.clock,
            scheduler=self._settings.scheduler,
            leadership=self.leadership,
            replicas=self.replicas,
            agents=self.agent_versions,
            offload=self._ports.offload,
            version=self._settings.version,
            new_id=self._ids.new,
            issuer=self._ports.issuer,
        )

    async def renew(self, name: str, serial: str, renewal: Renewal) -> Issued:
        """Give a node new certificates; see ``services.admission.renew``."""
        return await admission.renew(self.context(), name, serial, renewal)

    def _agents(self) -> AgentList:
        hub = self.leader.hub
        return self._following.agents if hub is None else hub.agents()

    def _leading_peer(self) -> str | None:
        """Return where the leader is when it is another replica, as far as this one knows."""
        leader = self._election.leader
        mine = leader is None or leader.replica == self._settings.name
        return None if mine else self.leader_address()

    def _peer_addresses(self) -> tuple[str, ...]:
        return tuple(r.agent_address for r in self.replicas() if r.name != self._settings.name)

    def _copied_by_majority(self) -> int:
        """Return up to which entry of history a majority of the registered replicas has a copy."""
        others = (r.name for r in self.replicas() if r.name != self._settings.name)
        copied = sorted((self._copy.copied_seq, *map(self.peers.copied.by, others)), reverse=True)
        return copied[len(copied) // 2]

    def _record_changed(self, before: Record | None, after: Record | None) -> None:
        if isinstance(after, Operation) and before is None:
            self._ports.metrics.operation_entered(after.kind, after.state)
        elif isinstance(before, Vm) and after is None:
            self.windows.forget(before.id)

    def _note_progress(self, told: MigrationProgress) -> None:
        """Take what an agent tells of a migration, unless that has ended meanwhile."""
        if told.operation in self.state.operations:
            self.progress.put(
                told.operation,
                told.percent,
                told.eta_s,
                bytes_done=told.bytes_done,
                bytes_total=told.bytes_total,
            )

    def _entry_added(self, entry: HistoryEntry) -> None:
        if isinstance(entry, FinishedOperation):
            self._ports.metrics.operation_entered(entry.operation.kind, entry.operation.state)
            self.progress.forget(entry.operation.id)

    async def _expire_windows(self) -> None:
        """Drop objects whose agent has sent nothing for as long as a window reaches back."""
        while True:
            await asyncio.sleep(EXPIRE_PERIOD_S)
            self.windows.expire(self._ports.clock.now().timestamp() - WINDOW_S)

    async def _forget_past(self) -> None:
        while True:
            await asyncio.sleep(PAST_PERIOD_S)
            self.state.past.turn(self.state.revision)

    async def _stay_registered(self) -> None:
        """Keep this replica's own record under a lease; write it anew when the lease is gone."""
        lease = 0
        while True:
            try:
                if lease == 0 or await self._ports.store.renew_lease(lease) <= 0:
                    lease = await self._ports.store.grant_lease(REGISTRATION_TTL_S)
                    await self._ports.store.register_replica(
                        self._settings.name, pack(self._registration), lease
                    )
            except NovacronError as error:
                log.warning("the replica is not registered: %s", error)
                lease = 0
            await asyncio.sleep(REGISTRATION_PERIOD_S)
