"""One term after the other: takeover from a fresh listing, an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Draft
from controlplane.commands.migrations import MigrationLimits
from controlplane.commands.vms import CreateVm
from controlplane.election import Reign
from controlplane.leader import Founding, Leader, LeaderParts
from controlplane.scheduler.request import SchedulerSettings
from controlplane.sessions.hub import HubSettings
from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.history import History
from controlplane.store.informer import Informer
from controlplane.store.port import Store
from controlplane.telemetry.exporter import unscraped_metrics
from controlplane.telemetry.windows import Windows
from shared.errors import LeadershipLost, NoLeader, NovacronError, ReleaseTooOld
from shared.ids import IdSource
from shared.model import SCHEMA_LEVEL, ApiKey, Cluster
from shared.offload import inline
from shared.protocol import Query, QueryKind
from tests.contract.store_worlds import World, model_world
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN, USER, spec
from tests.unit.test_election import LoopClock

FOUNDING = Founding(
    Cluster(id="cluster-1", cell="abc123", epoch=3, created_at=BORN),
    ApiKey(id="key-1", sha256="", principal="admin", role="admin", created_at=BORN),
)


class PutCluster(Struct, frozen=True, kw_only=True):
    """Writes the cluster's record as it is given."""

    cluster: Cluster

    def decide(self, draft: Draft) -> None:
        draft.put(self.cluster)


LIMIT_S = 5.0


class Replica:
    def __init__(self, world: World) -> None:
        self.world = world
        self.store = cast(Store, world.store)
        self.state = ClusterState()
        self.informer = Informer(self.store, self.state)
        self.history = History(None, inline)
        self.clock = LoopClock()
        self.leader = Leader(
            LeaderParts(
                store=self.store,
                state=self.state,
                informer=self.informer,
                ids=IdSource("abc123", self.clock, random.Random(1)),
                clock=self.clock,
                founding=FOUNDING,
                hub_settings=HubSettings(),
                scheduler=SchedulerSettings(),
                metrics=unscraped_metrics(Windows()),
                limits=MigrationLimits(),
                offload=inline,
                progress=lambda told: None,
                copied=lambda: 0,
            )
        )
        self.following = asyncio.ensure_future(self.informer.run(lambda: None))

    async def win(self) -> asyncio.Future[None]:
        """Win the election and lead."""
        fence = await self.world.lead(3600)
        reign = Reign(fence.leader_revision, self.clock.boottime_s(), 3600.0, self.clock)
        leading = asyncio.ensure_future(self.leader.lead(reign))
        await asyncio.sleep(1)
        return leading

    async def create(self, name: str) -> None:
        await self.leader.submit(
            CreateVm(name=name, tenant="default", labels={}, spec=spec(), by=USER), LIMIT_S
        )

    def names(self) -> set[str]:
        return {stored.record.name for stored in self.state.vms.values()}


@asynccontextmanager
async def replica() -> AsyncIterator[Replica]:
    async with model_world() as (world, _):
        made = Replica(world)
        await asyncio.sleep(1)
        try:
            yield made
        finally:
            made.following.cancel()
            await asyncio.gather(made.following, return_exceptions=True)
            await made.history.close()


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


def test_without_a_term_nothing_is_taken() -> None:
    async def main() -> None:
        async with replica() as it:
            query = Query(id="q", kind=QueryKind.CONSOLE_LOG, vm_id="v", domain_name="v")
            with pytest.raises(NoLeader):
                await it.create("early")
            with pytest.raises(NoLeader):
                await it.leader.ask("node-1", query)
            assert it.leader.term is None

    virtual(main())


def test_a_term_begins_with_a_cluster_and_carries_its_epoch() -> None:
    async def main() -> None:
        async with replica() as it:
            leading = await it.win()
            assert it.state.cluster() == FOUNDING.cluster
            assert it.leader.term is not None
            assert it.leader.term.epoch == 3
            await it.create("web-1")
            assert it.names() == {"web-1"}
            leading.cancel()

    virtual(main())


def test_a_lost_term_ends_everything_and_the_next_one_knows_everything() -> None:
    async def main() -> None:
        async with replica() as it:
            leading = await it.win()
            await it.create("web-1")
            first = it.leader.term
            assert first is not None
            await it.world.store.resign(first.revision)
            with pytest.raises(NovacronError):
                await it.create("web-2")
            with pytest.raises(LeadershipLost):
                await leading
            assert it.leader.term is None
            assert it.leader.hub is None
            assert it.state._observers == []

            leading = await it.win()
            await it.create("web-3")
            assert it.leader.term is not None
            assert it.leader.term > first
            assert it.names() == {"web-1", "web-3"}
            assert len(it.state.api_keys) == 1
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            await asyncio.sleep(5)
            assert it.names() == {"web-1", "web-3"}, "a follower again"

    virtual(main())


def test_a_cluster_above_our_level_is_not_led_and_nothing_of_it_is_touched() -> None:
    async def main() -> None:
        async with replica() as it:
            leading = await it.win()
            assert it.leader.unfit() == ""
            # As a leader of the next release raises it, while this one follows.
            newer = replace(FOUNDING.cluster, schema_level=SCHEMA_LEVEL + 1)
            await it.leader.submit(PutCluster(cluster=newer), LIMIT_S)
            term = it.leader.term
            assert term is not None
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            await it.world.store.resign(term.revision)
            await asyncio.sleep(5)
            revision = it.state.revision

            leading = await it.win()
            with pytest.raises(ReleaseTooOld, match="upgrade this replica"):
                await leading
            assert "upgrade this replica" in it.leader.unfit()
            assert it.leader.term is None
            assert it.state.cluster() == newer
            with pytest.raises(NoLeader):
                await it.create("web-1")
            listing = await it.store.list(keys.STATE)
            assert max(item.mod_revision for item in listing.items) <= revision

    virtual(main())


def test_numbers_of_history_go_on_over_terms() -> None:
    async def main() -> None:
        async with replica() as it:
            for name in ("a", "b", "c"):
                leading = await it.win()
                await it.create(name)
                term = it.leader.term
                assert term is not None
                leading.cancel()
                await asyncio.gather(leading, return_exceptions=True)
                await it.world.store.resign(term.revision)
            assert sorted(it.state.history) == list(range(1, it.state.last_seq + 1))

    virtual(main())
