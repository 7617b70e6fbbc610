"""Two replicas on one etcd: one leads, the other answers whatever is asked, and takes over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from controlplane.services.views import ClusterView, EventList, SeriesView, UsageList
from controlplane.sessions.peer_grpc import PeerDialler
from controlplane.sessions.peer_messages import Exchange, PeerRefused
from tests.integration.etcd_past import check_history
from tests.integration.replica_api import Api, new_vm, problem_of, until
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


async def test_a_follower_answers_every_call(world: World) -> None:
    async with follower(world) as (second, api):
        node = WitnessNode("n1")
        async with world.agent(node, (world.replica.agents_address, second.agents_address)):
            assert (await api.send("GET", "/readyz")).status_code == 200
            leader = (await api.get(ClusterView, "/cluster")).leader
            assert leader is not None
            assert leader == (await world.api.get(ClusterView, "/cluster")).leader
            created = await api.create("web")
            # Whoever wrote through a replica reads it there.
            assert (await api.vm("web")).id == created.target
            await api.done(created)
            assert (await api.done(await api.act("web", "pause"))).kind == "vm.pause"
            console = "/api/v1/vms/web/console-log"
            said = await world.api.send("GET", console)
            assert said.status_code == 200
            assert (await api.send("GET", console)).content == said.content
            await until(partial(_has_figures, api), "figures on the follower")
            await until(partial(_has_figures, world.api), "figures on the leader")
            await api.done(await api.delete("web"))
            assert (await api.send("GET", "/api/v1/vms/web")).status_code == 404


async def test_a_refusal_is_the_leaders_own_and_a_key_holds_everywhere(world: World) -> None:
    async with follower(world) as (_, api):
        spec = {"name": "web", "spec": new_vm("web", power="stopped")["spec"]}
        key = {b"idempotency-key": b"once"}
        first = await api.send("POST", "/api/v1/vms", spec, headers=key)
        assert first.status_code == 202
        again = await world.api.send("POST", "/api/v1/vms", spec, headers=key)
        assert again.json()["id"] == first.json()["id"]
        assert again.headers["idempotency-replayed"] == "true"
        taken = await api.send("POST", "/api/v1/vms", spec)
        assert (taken.status_code, problem_of(taken).code) == (409, "name_taken")
        stale = {b"if-match": b'"1.1"', b"content-type": b"application/merge-patch+json"}
        patched = await api.send("PATCH", "/api/v1/vms/web", {"labels": {"a": "b"}}, headers=stale)
        assert patched.status_code == 412
        del stale[b"if-match"]
        patched = await api.send("PATCH", "/api/v1/vms/web", {"labels": {"a": "b"}}, headers=stale)
        assert (patched.status_code, patched.json()["labels"]) == (200, {"a": "b"})
        seen = {b"x-novacron-min-revision": patched.headers["x-novacron-revision"].encode()}
        read = await world.api.send("GET", "/api/v1/vms/web", headers=seen)
        assert read.json()["labels"] == {"a": "b"}
        assert read.headers["etag"] == patched.headers["etag"]


async def test_events_go_on_at_the_other_replica(world: World) -> None:
    async with follower(world) as (_, api):
        before = (await world.api.send("GET", "/api/v1/events")).json()["revision"]
        for name in ("a", "b", "c"):
            await world.api.create(name, power="stopped")
        half = (await world.api.get(EventList, "/events", since=before, limit=2)).items[-1].id

        async def the_rest(of: Api) -> list[int]:
            found = await of.get(EventList, "/events", since=half, limit=500)
            return [event.seq for event in found.items]

        expected = await the_rest(world.api)
        assert expected == sorted(expected)
        await until(partial(_is, partial(the_rest, api), expected), "the same rest on the follower")


async def test_a_write_outlasts_the_death_of_the_leader() -> None:
    async with new_world(SHORT_LEASE) as world, follower(world) as (_, api):
        world.replica.kill()
        # One request, asked once: it waits until its own replica leads.
        created = await api.create("web", power="stopped")
        assert (await api.vm("web")).id == created.target
        world.api = api


async def test_an_agent_is_no_replica(world: World) -> None:
    dialler = PeerDialler(world.cell.node_tls("n1"))
    try:
        told = await dialler(
            world.replica.agents_address, Exchange(replica="r9", copied_seq=10**9), 5.0
        )
        assert isinstance(told, PeerRefused)
        assert told.problem.code == "forbidden"
    finally:
        await dialler.close()


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


async def _has_figures(api: Api) -> bool:
    node = await api.get(SeriesView, "/nodes/n1/metrics")
    usage = await api.get(UsageList, "/metrics?kind=node")
    return node.latest is not None and usage.items[0].latest is not None


async def _is(look: Callable[[], Awaitable[object]], expected: object) -> bool:
    return await look() == expected


async def _same_events(first: Api, second: Api) -> bool:
    events = [await api.get(EventList, "/events", limit=500) for api in (first, second)]
    return bool(events[0].items) and events[0].items == events[1].items
