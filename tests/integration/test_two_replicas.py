"""Two replicas on one etcd: one leads, the other reads, points to it, and takes over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from controlplane.services.views import ClusterView, EventList
from shared.errors import NoLeader
from tests.integration.etcd_past import check_history
from tests.integration.replica_api import Api, Refused, until
from tests.integration.replica_process import ReplicaProcess
from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import SHORT_LEASE, World, new_world

pytestmark = pytest.mark.etcd


@asynccontextmanager
async def follower(world: World) -> AsyncIterator[tuple[ReplicaProcess, Api]]:
    cell = world.cell
    with ReplicaProcess(cell, "r2", SHORT_LEASE, leads=False) as second:
        async with Api(second.api_url, cell, cell.token) as api:

            async def knows_the_leader() -> bool:
                return len((await api.get(ClusterView, "/cluster")).replicas) == 2

            await until(knows_the_leader, "a follower that knows both replicas")
            yield second, api


async def test_a_follower_reads_and_refuses_writes(world: World) -> None:
    async with follower(world) as (_, api):
        await world.api.create("web")

        async def sees_it() -> bool:
            return [vm.name for vm in await api.vms()] == ["web"]

        await until(sees_it, "the VM on the follower")
        for write in (api.create("db"), api.act("web", "stop"), api.delete("web")):
            with pytest.raises(Refused) as refused:
                await write
            problem = refused.value.problem
            assert (problem.status, problem.code, problem.retryable) == (503, NoLeader.code, True)
        assert [vm.name for vm in await world.api.vms()] == ["web"]


async def test_the_other_takes_over_and_agents_find_it() -> None:
    async with new_world(SHORT_LEASE) as world, follower(world) as (second, api):
        # The agent is told of the follower only: it finds the leader by what that answers.
        node = WitnessNode("n1")
        both = (second.agents_address, world.replica.agents_address)
        async with world.agent(node, replicas=both[:1]):
            await world.api.done(await world.api.create("web"))
        async with world.agent(node, replicas=both):
            web = await world.api.vm("web")
            world.replica.kill()
            operation = await until(lambda: api.create("db"), "a write on the other replica")
            await api.done(operation)
            world.api, first = api, world.api
            await world.agrees()
            assert {vm.name for vm in await api.vms()} == {"web", "db"}
            assert world.starts_and_ends(web.id) == (1, 0)
            world.replica.start()
            await until(lambda: _same_events(first, api), "the same events on both")
        store = world.store()
        try:
            assert set((await check_history(store)).values()) == {1}
        finally:
            await store.close()


async def _same_events(first: Api, second: Api) -> bool:
    events = [await api.get(EventList, "/events", limit=500) for api in (first, second)]
    return bool(events[0].items) and events[0].items == events[1].items
