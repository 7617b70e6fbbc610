"""etcd that dies or is suspended: reads go on, writes are refused, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import Refused
from tests.integration.simulated_agent import WitnessNode
from tests.integration.storm import Storm
from tests.integration.world import World, new_world

pytestmark = pytest.mark.etcd

Fault = Callable[[EtcdCluster], None]

# Longer than a leader writes without having renewed its lease (3 s), and than the lease (5 s).
SUSPENDED_S = 6.0


def die(etcd: EtcdCluster) -> None:
    etcd.kill(0)


def come_back(etcd: EtcdCluster) -> None:
    etcd.restart(0)


def hang(etcd: EtcdCluster) -> None:
    etcd.stop(0)


def go_on(etcd: EtcdCluster) -> None:
    etcd.resume(0)


FAULTS = pytest.mark.parametrize(
    ("fault", "heal"), [(die, come_back), (hang, go_on)], ids=["killed", "suspended"]
)


@FAULTS
async def test_at_rest_reads_go_on_and_writes_are_refused(fault: Fault, heal: Fault) -> None:
    async with new_world() as world, world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        (before,) = await world.api.vms()
        fault(world.etcd)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_stays_away(SUSPENDED_S))
            tasks.create_task(_refuses_and_answers(world))
        # What comes after the leader has ceased to write is refused too.
        await _refuses_and_answers(world)
        heal(world.etcd)
        await _writes_again(world, "db")
        await world.agrees()
        there = {vm.name for vm in await world.api.vms()}
        # Of the refused ones only those may be there whose answer left that open.
        assert {"web", "db"} <= there <= {"web", "db", "late"}
        assert world.starts_and_ends(before.id) == (1, 0)


@FAULTS
async def test_in_a_storm_what_was_accepted_ends(fault: Fault, heal: Fault) -> None:
    async with (
        new_world() as world,
        world.agent(WitnessNode("n1")),
        world.agent(WitnessNode("n2")),
    ):
        storm = Storm(world)
        await storm.prepare()
        await storm.rage(lambda: fault(world.etcd))
        heal(world.etcd)
        await storm.judge()


async def _stays_away(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _refuses_and_answers(world: World) -> None:
    write = asyncio.ensure_future(world.api.create("late"))
    assert [vm.name for vm in await world.api.vms()] == ["web"]
    assert (await world.api.vm("web")).name == "web"
    with pytest.raises(Refused) as refused:
        await write
    assert refused.value.status == 503
    assert refused.value.problem.retryable
    assert [vm.name for vm in await world.api.vms()] == ["web"]


async def _writes_again(world: World, name: str) -> None:
    async def look() -> bool:
        try:
            await world.api.create(name)
        except Refused as refused:
            if refused.problem.code != "name_taken":
                raise
        return True

    from tests.integration.replica_api import until

    await until(look, "a write that is accepted")
