"""A leader that goes by intent hands over at once: nobody waits for its lease, no write is lost."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial

import pytest

from controlplane.services.views import ClusterView, EventList, LeaderView
from controlplane.store import keys
from controlplane.store.port import KeyValue
from shared.codec import unpack
from shared.model import LeaderKey
from tests.integration.replica_api import Api, Lost, new_vm, until
from tests.integration.test_two_replicas import follower
from tests.integration.world import LONG_LEASE, World, new_world

pytestmark = pytest.mark.etcd

STEP_DOWN = "/api/v1/cluster/actions/step-down"


async def leader(api: Api) -> LeaderView:
    async def look() -> LeaderView | None:
        return (await api.get(ClusterView, "/cluster")).leader

    return await until(look, "a leader")


async def leader_key(world: World) -> KeyValue:
    store = world.store()
    try:
        found = await store.get(keys.LEADER)
        assert found is not None
        return found
    finally:
        await store.close()


async def stepped_down(api: Api) -> list[dict[str, str]]:
    """Return what is told of leaders that stepped down."""
    events = (await api.get(EventList, "/events", limit=500)).items
    return [event.data for event in events if event.kind == "cluster.leader_stepped_down"]


async def leads(api: Api, replica: str) -> bool:
    return (await leader(api)).replica == replica


async def test_a_leader_that_is_asked_to_step_down_by_way_of_the_other(world: World) -> None:
    async with follower(world) as (_, api):
        before = await leader(world.api)
        key = {b"idempotency-key": b"once"}
        answer = await api.send("POST", STEP_DOWN, headers=key)
        assert answer.status_code == 200
        assert answer.json()["leader"]["replica"] == before.replica == "r1"
        # What is asked meanwhile waits for whoever leads next, and is done.
        for each in (api, world.api):
            name = f"web-{id(each)}"
            created = await each.create(name, power="stopped")
            assert (await each.vm(name)).id == created.target
        # r1's lease has two minutes to go: r2 leads because the key was given back.
        await until(partial(leads, api, "r2"), "the other leads")
        await until(partial(leads, world.api, "r2"), "r1 knows of it")
        after = await leader(api)
        assert after.term != before.term
        assert after.since is not None
        assert before.since is not None
        assert after.since > before.since
        assert await stepped_down(api) == [{"replica": "r1", "term": before.term}]
        assert "resigned the term" in world.replica.log_text()
        # The same request again dethrones nobody else.
        again = await api.send("POST", STEP_DOWN, headers=key)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
        assert (await leader(api)).term == after.term
        assert len(await stepped_down(api)) == 1


async def test_the_only_replica_leads_again(world: World) -> None:
    before = await leader(world.api)
    assert (await world.api.send("POST", STEP_DOWN)).status_code == 200

    async def another_term() -> bool:
        return (await leader(world.api)).term != before.term

    await until(another_term, "another term of the same replica")
    await world.api.create("web", power="stopped")
    assert (await leader(world.api)).replica == before.replica


async def test_asked_to_end_it_hands_over_although_its_lease_lives(world: World) -> None:
    async with follower(world) as (_, api):
        old = await leader_key(world)
        ending = asyncio.ensure_future(asyncio.to_thread(world.replica.terminate))
        # One request, asked once: it waits until its own replica leads.
        created = await api.create("web", power="stopped")
        assert (await api.vm("web")).id == created.target
        assert await ending == 0
        new = await leader_key(world)
        assert unpack(new.value, LeaderKey).replica == "r2"
        assert new.create_revision > old.create_revision
        store = world.store()
        try:
            assert await store.renew_lease(old.lease) > 0
        finally:
            await store.close()
        log = world.replica.log_text()
        assert f"resigned the term {old.create_revision}" in log
        assert "Traceback" not in log
        world.api = api


@pytest.mark.parametrize("stops", ["leader", "follower"])
async def test_requests_under_way_at_a_stop_are_answered_as_ever(stops: str) -> None:
    """A replica that ends goes on following until they have: no 500, no doubt, no refusal."""
    async with new_world(LONG_LEASE) as world, follower(world) as (replica, api):
        ending, its_api = (world.replica, world.api) if stops == "leader" else (replica, api)
        answers: list[int] = []

        async def write_on(writer: int) -> None:
            for number in itertools.count():
                body = new_vm(f"web-{writer}-{number}", power="stopped")
                try:
                    answer = await its_api.send("POST", "/api/v1/vms", body)
                except Lost:
                    return  # it listens no more
                answers.append(answer.status_code)

        writing = [asyncio.ensure_future(write_on(writer)) for writer in range(8)]

        async def written() -> bool:
            return len(answers) > 40

        await until(written, "writes")
        assert await asyncio.to_thread(ending.terminate) == 0
        await asyncio.gather(*writing)
        assert set(answers) == {202}
        assert "Traceback" not in ending.log_text()
        world.api = api if stops == "leader" else world.api


async def test_writes_of_every_replica_go_on_over_many_hand_overs() -> None:
    async with new_world(LONG_LEASE) as world, follower(world) as (_, api):
        done = 0

        async def write_on(each: Api, stop: asyncio.Event) -> None:
            nonlocal done
            while not stop.is_set():
                await each.create(f"web-{done}-{id(each)}", power="stopped")
                done += 1

        stop = asyncio.Event()
        writing = [asyncio.ensure_future(write_on(each, stop)) for each in (api, world.api)]
        for _ in range(4):
            before, seen = await leader(api), done

            async def accepted() -> bool:
                return (await world.api.send("POST", STEP_DOWN)).status_code == 200

            await until(accepted, "a leader that steps down")

            async def moved(term: str = before.term) -> bool:
                return (await leader(api)).term != term

            await until(moved, "another term")

            async def written(at_least: int = seen + 4) -> bool:
                return done >= at_least

            await until(written, "writes under the next term")
        stop.set()
        # Every one was accepted: nothing was refused, and nothing is unknown.
        await asyncio.gather(*writing)

        async def all_are_there() -> bool:
            # What was written through one replica comes to the other a moment later.
            return len({vm.name for vm in await api.vms()}) == done

        await until(all_are_there, "every VM that was accepted")
