"""etcd that dies or is suspended: reads go on, writes are refused, nothing is lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shared.errors import OutcomeUnknown
from shared.model import VmPhase
from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import Refused, until
from tests.integration.simulated_agent import WitnessNode
from tests.integration.storm import Storm
from tests.integration.world import World, new_world

pytestmark = pytest.mark.etcd

Fault = Callable[[EtcdCluster], None]


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
        # The second one comes when the leader has ceased to write by itself.
        perhaps = {name for name in ("early", "late") if await _is_refused_unknown(world, name)}
        heal(world.etcd)
        db = await until(lambda: world.api.create("db"), "a write that is accepted")
        await world.api.done(db)
        await world.agrees()
        there = {vm.name for vm in await world.api.vms()}
        assert {"web", "db"} <= there <= {"web", "db", *perhaps}
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


async def _is_refused_unknown(world: World, name: str) -> bool:
    """Ask for a VM while etcd is away, and read meanwhile; tell whether it may yet come to be."""
    write = asyncio.ensure_future(world.api.create(name))
    assert [vm.name for vm in await world.api.vms()] == ["web"]
    assert (await world.api.vm("web")).status.phase is VmPhase.RUNNING
    with pytest.raises(Refused) as refused:
        await write
    assert (refused.value.status, refused.value.problem.retryable) == (503, True)
    assert [vm.name for vm in await world.api.vms()] == ["web"]
    return refused.value.problem.code == OutcomeUnknown.code
