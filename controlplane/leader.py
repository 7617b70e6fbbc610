"""One term, from takeover to its end: the applier, the sessions and the reconcilers.

On takeover all state is listed at a revision not older than the term; from then on the leader's
own commits are what advances it. When the term ends, everything here ends with it. A cluster whose
schema level is above this release's is never led: what newer releases wrote would be dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from msgspec import Struct

from controlplane.commands.cluster import MakeCluster
from controlplane.commands.draft import Author, Command
from controlplane.commands.migrations import MigrationLimits
from controlplane.commands.upgrade import why_too_old
from controlplane.election import Reign, SteppedDown
from controlplane.reconcilers import loop
from controlplane.reconcilers.boots import EndLostAttempts
from controlplane.reconcilers.capacity import KeptSnapshot
from controlplane.reconcilers.compaction import CompactStore
from controlplane.reconcilers.deadlines import ExpireOperations
from controlplane.reconcilers.history import TrimCopiedHistory
from controlplane.reconcilers.idempotency import ForgetOldKeys
from controlplane.reconcilers.placement import PlaceVms
from controlplane.reconcilers.recovery import Recover
from controlplane.reconcilers.silence import NoteSilence
from controlplane.reconcilers.starts import PermitStarts
from controlplane.sagas.context import SagaParts
from controlplane.sagas.engine import SagaEngine
from controlplane.sagas.workflows import SAGAS
from controlplane.scheduler.request import SchedulerSettings
from controlplane.services.context import Result
from controlplane.sessions.hub import Hub, HubSettings
from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.applier import Applier
from controlplane.store.informer import Informer
from controlplane.store.port import Store
from controlplane.telemetry.exporter import Metrics
from shared.clock import Clock
from shared.errors import LeadershipLost, NoLeader, NovacronError, ReleaseTooOld
from shared.ids import IdSource
from shared.model import ApiKey, Cluster, Term
from shared.offload import Offload
from shared.protocol import MigrationProgress, Query

log = logging.getLogger(__name__)

# Between the command to step down and the end of the term: its answer, and that of other commands
# of the same moment, goes out before peers see that somebody else leads.
ANSWERS_FIRST_S = 0.1


class Founding(Struct, frozen=True):
    """What a new cluster begins with, made by ``novacron init``."""

    cluster: Cluster
    admin_key: ApiKey


class LeaderParts(Struct, frozen=True):
    """What outlives a term and is handed to each."""

    store: Store
    state: ClusterState
    informer: Informer
    ids: IdSource
    clock: Clock
    founding: Founding
    hub_settings: HubSettings
    scheduler: SchedulerSettings
    metrics: Metrics
    limits: MigrationLimits
    offload: Offload
    progress: Callable[[MigrationProgress], None]
    copied: Callable[[], int]


class Leader:
    """The place where requests find the present term, if this replica holds one."""

    def __init__(self, parts: LeaderParts) -> None:
        self._parts = parts
        self._applier: Applier | None = None
        self.hub: Hub | None = None
        self.terms_led = 0

    @property
    def term(self) -> Term | None:
        return None if self._applier is None else self._applier.term

    def unfit(self) -> str:
        """Return why this replica must not lead, as far as it has read by now; empty if it may."""
        return why_too_old(self._parts.state.cluster())

    @property
    def leads(self) -> bool:
        return self._applier is not None

    def give_up(self) -> None:
        """Have the present term, if there is one, end soon: what is being written comes first."""
        if self._applier is not None:
            self._applier.given_up.set()

    async def submit(self, command: Command[Result], limit_s: float) -> Result:
        """Commit a command under the present term. Raises NoLeader when there is none here."""
        if self._applier is None:
            raise NoLeader("this replica does not lead at present; try again shortly")
        return await self._applier.submit(command, limit_s)

    async def ask(self, node_id: str, query: Query) -> bytes:
        if self.hub is None:
            raise NoLeader("this replica does not lead at present; try again shortly")
        return await self.hub.ask(node_id, query)

    async def lead(self, reign: Reign) -> None:
        """Take over and lead until cancelled. Raises LeadershipLost, SteppedDown, ReleaseTooOld."""
        parts = self._parts
        parts.informer.audit_only()
        applier: Applier | None = None
        hub: Hub | None = None
        capacity: KeptSnapshot | None = None
        try:
            applier = await self._take_over(reign)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(applier.run())
                tasks.create_task(_until_given_up(applier))
                cluster = await self._found(applier)
                hub = Hub(
                    applier,
                    parts.state,
                    cluster.id,
                    parts.hub_settings,
                    parts.ids,
                    parts.progress,
                )
                # From here on it leads; what it does by itself begins when all is counted.
                self._applier, self.hub = applier, hub
                self.terms_led += 1
                parts.metrics.leading(True)
                log.info("the term %s has begun", applier.term)
                capacity = KeptSnapshot(parts.state, hub, parts.scheduler)
                await capacity.build(parts.offload)
                sagas = self._sagas(applier, hub, capacity)
                hub.on_migration_report(sagas.wake)
                tasks.create_task(sagas.run())
                for reconciler in self._reconcilers(applier, hub, capacity):
                    tasks.create_task(loop.run(reconciler, parts.state.changes))
                for chore in self._chores(applier, hub):
                    tasks.create_task(loop.run_periodically(chore))
        except BaseExceptionGroup as group:
            raise _plain(group) from group
        finally:
            self._applier, self.hub = None, None
            parts.metrics.leading(False)
            if applier is not None:
                applier.close(LeadershipLost(f"the term {applier.term} is over"))
            if hub is not None:
                hub.close()
            if capacity is not None:
                capacity.close()
            parts.informer.follow_again()

    async def _take_over(self, reign: Reign) -> Applier:
        parts = self._parts
        await parts.informer.load(reign.leader_revision)
        mark = await parts.store.get(keys.MARK)
        known = parts.state.cluster()
        if too_old := why_too_old(known):
            raise ReleaseTooOld(too_old)
        epoch = (known or parts.founding.cluster).epoch
        term = Term(epoch, reign.leader_revision)
        return Applier(
            parts.store, parts.state, term, mark, parts.ids, parts.clock, reign.until_writable
        )

    async def _found(self, applier: Applier) -> Cluster:
        founding = self._parts.founding
        by = Author("novacron init")
        await applier.submit(
            MakeCluster(cluster=founding.cluster, admin_key=founding.admin_key, by=by)
        )
        return self._parts.state.cluster() or founding.cluster

    def _sagas(self, applier: Applier, hub: Hub, capacity: KeptSnapshot) -> SagaEngine:
        parts = self._parts
        saga_parts = SagaParts(
            state=parts.state,
            nodes=hub,
            capacity=capacity,
            submit=applier.submit,
            clock=parts.clock,
            limits=parts.limits,
            offload=parts.offload,
            since=parts.clock.now(),
        )
        return SagaEngine(saga_parts, SAGAS)

    def _reconcilers(
        self, applier: Applier, hub: Hub, capacity: KeptSnapshot
    ) -> list[loop.Reconciler]:
        """Return the loops that every change may give something to do: a pass costs little."""
        parts = self._parts
        return [
            PlaceVms(applier, parts.state, capacity, parts.metrics),
            PermitStarts(applier, parts.state, hub, capacity, parts.clock),
            EndLostAttempts(applier, parts.state),
        ]

    def _chores(self, applier: Applier, hub: Hub) -> list[loop.Reconciler]:
        """Return the loops that only time gives something to do."""
        parts = self._parts
        return [
            NoteSilence(applier, parts.state, hub, parts.hub_settings),
            ExpireOperations(applier, parts.state, parts.clock),
            TrimCopiedHistory(applier, parts.state, parts.copied),
            CompactStore(parts.store, parts.state),
            ForgetOldKeys(applier, parts.state, parts.clock),
            Recover(applier, parts.state, hub),
        ]


async def _until_given_up(applier: Applier) -> None:
    """Raise SteppedDown soon after a command has asked for the end of the term."""
    await applier.given_up.wait()
    await asyncio.sleep(ANSWERS_FIRST_S)
    raise SteppedDown(f"the term {applier.term} was given up")


def _plain(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what ended a term as one error: a defect if there is one, else that it was lost."""
    foreseen, defects = group.split(NovacronError)
    if defects is not None:
        return defects
    assert foreseen is not None, "a group holds something"
    lost = foreseen.subgroup(LeadershipLost)
    error: BaseException = lost or foreseen
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
