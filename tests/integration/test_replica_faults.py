"""A replica that is killed, suspended or asked to end: what was accepted ends, guests go on."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.store import keys
from shared.codec import pack, unpack
from shared.model import LeaderKey, VmPhase
from tests.integration.replica_api import Refused, problem_of, until
from tests.integration.simulated_agent import WitnessNode
from tests.integration.storm import Storm
from tests.integration.world import SHORT_LEASE, World, new_world

pytestmark = pytest.mark.etcd


async def test_killed_at_rest_it_takes_its_own_term_over_at_once(world: World) -> None:
    async with world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        (before,) = await world.api.vms()
        world.replica.kill()
        # The lease has two minutes to go: only by resigning for the dead one it leads so soon.
        world.replica.restart()
        await world.api.done(await world.api.act("web", "pause"))
        await world.api.done(await world.api.act("web", "resume"))
        await world.agrees()
        assert world.starts_and_ends(before.id) == (1, 0)
    assert "resigning the term" in world.replica.log_text()


async def test_killed_in_a_storm_it_ends_all_that_it_accepted(world: World) -> None:
    async with world.agent(WitnessNode("n1")), world.agent(WitnessNode("n2")):
        storm = Storm(world)
        await storm.prepare()
        await storm.rage(world.replica.kill)
        world.replica.restart()
        await storm.judge()


async def test_suspended_past_its_lease_it_writes_nothing_and_leads_again_later() -> None:
    async with new_world(SHORT_LEASE) as world, world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        (before,) = await world.api.vms()
        store = world.store()
        try:
            world.replica.stop()
            late = [asyncio.ensure_future(world.api.create(f"late-{n}")) for n in range(8)]
            await until(lambda: _nobody_leads(world), "the end of the lease")
            lease = await store.grant_lease(120)
            me = LeaderKey(replica="another", incarnation="1")
            campaign = await store.campaign(pack(me), lease)
            mark = await store.get(keys.MARK)
            world.replica.resume()
            for answer in await asyncio.gather(*late, return_exceptions=True):
                assert isinstance(answer, Refused), answer
                assert (answer.status, answer.problem.retryable) == (503, True), answer
            assert await store.get(keys.MARK) == mark
            found = await store.get(keys.LEADER)
            assert found is not None
            assert unpack(found.value, LeaderKey) == me
            assert await store.resign(campaign.leader.create_revision)
            await until(lambda: _leads(world), "a replica that leads again")
        finally:
            await store.close()
        await world.api.done(await world.api.create("db"))
        await world.agrees()
        assert {vm.name for vm in await world.api.vms()} == {"web", "db"}
        assert world.starts_and_ends(before.id) == (1, 0)


async def test_asked_to_end_it_resigns_and_leaves_no_complaint(world: World) -> None:
    async with world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        waiting = await world.api.create("huge", vcpus=256)
        operation = f"/api/v1/operations/{waiting.id}"
        poll = asyncio.ensure_future(world.api.send("GET", operation, wait=60))
        async with world.api.stream("/api/v1/events", accept="text/event-stream") as events:
            await world.vm_is("huge", VmPhase.PENDING)
            following = asyncio.ensure_future(events.aread())
            code = await asyncio.to_thread(world.replica.terminate)
            await following
        assert code == 0, world.replica.log_text()
        assert problem_of(await poll).retryable
        assert await _nobody_leads(world)
        assert "Traceback" not in world.replica.log_text()
        # Nothing of the old process is in the way of the next.
        world.replica.restart()
        await world.api.done(await world.api.act("web", "stop"))


async def _nobody_leads(world: World) -> bool:
    store = world.store()
    try:
        return await store.get(keys.LEADER) is None
    finally:
        await store.close()


async def _leads(world: World) -> bool:
    return (await world.api.send("GET", "/readyz")).status_code == 200
