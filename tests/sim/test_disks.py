"""Disks that are not where they should be: what has run never boots from an empty one instead."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from controlplane.sagas.drain import MOVES_AT_ONCE
from controlplane.sagas.release import ASK_LIMIT
from controlplane.services.drains import drain_node
from controlplane.services.requests import DrainOrder
from controlplane.services.views import OperationView
from controlplane.services.vms import act_on_vm
from shared.model import DiskSpec, OperationState, Power, VmPhase
from shared.moves import DrainJournal
from shared.states import VmAction, vm_phase
from tests.sim.bench import ADMIN, Bench, run
from tests.sim.node import SHARED_POOL, SimNode

POOLS = ("default", SHARED_POOL)


class Mounts:
    """The file systems of a node's pools, which can be missing from their mount points."""

    def __init__(self, node: SimNode, *pools: str) -> None:
        self._volumes = node.state.pools
        self._kept = {pool: self._volumes[pool] for pool in pools}

    def unmount(self) -> None:
        """Leave empty directories, in which new files can be made."""
        for pool in self._kept:
            self._volumes[pool] = {}

    def mount(self) -> None:
        self._volumes.update(self._kept)

    def are_empty(self) -> bool:
        return not any(self._volumes[pool] for pool in self._kept)


async def at_rest_on_one_of_two(bench: Bench) -> tuple[SimNode, SimNode]:
    """Return the node of a stopped VM with a shared disk, ``rest``, and the other node."""
    await bench.cluster.start()
    await bench.cluster.until_ready()
    home, away = bench.cluster.nodes.values()
    await bench.create_on(home.name, "rest", (SHARED_POOL,), Power.STOPPED)
    return home, away


async def drain(bench: Bench, node: SimNode) -> OperationView:
    return await drain_node(bench.cluster.context(), ADMIN, node.name, DrainOrder())


def reason(ended: OperationView) -> str:
    assert ended.state is OperationState.FAILED
    assert ended.error is not None
    (left,) = ended.error.errors
    assert left.pointer == "/vms/rest"
    return left.message


def test_a_node_that_loses_its_pools_over_a_boot_starts_nothing_on_empty_disks() -> None:
    async def story(bench: Bench) -> None:
        disks = tuple(DiskSpec(name=pool, size_gib=1, pool=pool) for pool in POOLS)
        vm_id = await bench.start(disks=disks)
        node = bench.cluster.nodes[await bench.where() or ""]
        mounts = Mounts(node, *POOLS)
        node.lose_power()
        mounts.unmount()
        node.boot()
        vms = bench.judge.ledger.vms
        await bench.until(lambda: vms[vm_id].status.crashes >= 2)
        assert vm_phase(vms[vm_id]) is VmPhase.CRASHED
        fault = vms[vm_id].status.fault
        assert fault is not None
        assert fault.code == "disk_missing"
        assert mounts.are_empty()

        mounts.mount()
        await bench.settled()
        assert vm_phase(vms[vm_id]) is VmPhase.RUNNING

    run(story)


def test_a_drain_lets_nothing_go_to_a_node_that_does_not_see_its_disks() -> None:
    async def story(bench: Bench) -> None:
        home, away = await at_rest_on_one_of_two(bench)
        mounts = Mounts(away, SHARED_POOL)
        mounts.unmount()
        why = reason(await bench.ended(await drain(bench, home)))
        assert away.name in why
        assert "no volume" in why
        assert bench.places() == {"rest": home.name}
        assert mounts.are_empty()

        mounts.mount()
        ended = await bench.ended(await drain(bench, home))
        assert ended.state is OperationState.SUCCEEDED, ended.error
        await bench.until(lambda: bench.places() == {"rest": away.name})
        await bench.settled()

    run(story)


def test_a_start_fails_on_a_node_that_has_lost_sight_of_the_disks_since() -> None:
    async def story(bench: Bench) -> None:
        home, away = await at_rest_on_one_of_two(bench)
        assert (await bench.ended(await drain(bench, home))).state is OperationState.SUCCEEDED
        mounts = Mounts(away, SHARED_POOL)
        mounts.unmount()
        start = await act_on_vm(bench.cluster.context(), ADMIN, "rest", VmAction.START)
        ended = await bench.ended(start)
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert ended.error.code == "disk_missing"
        assert mounts.are_empty()
        mounts.mount()
        await bench.settled()

    run(story)


def test_a_drain_waits_for_a_node_that_cannot_look_but_not_for_ever() -> None:
    async def story(bench: Bench) -> None:
        home, away = await at_rest_on_one_of_two(bench)
        away.libvirtd.go_away()
        waits = await drain(bench, home)
        await asyncio.sleep(ASK_LIMIT.total_seconds() / 2)
        away.libvirtd.come_back()
        assert (await bench.ended(waits)).state is OperationState.SUCCEEDED
        await bench.settled()

    async def longer(bench: Bench) -> None:
        home, away = await at_rest_on_one_of_two(bench)
        await bench.create_on(home.name, "diskless", (), Power.STOPPED)
        away.libvirtd.go_away()
        gives_up = await drain(bench, home)
        assert away.name in reason(await bench.ended(gives_up, 2 * ASK_LIMIT.total_seconds()))
        bound = [vm.name for vm in bench.judge.ledger.vms.values() if vm.status.node]
        assert bound == ["rest"], "the other one went"
        away.libvirtd.come_back()
        await bench.settled()

    run(story)
    run(longer)


def test_a_node_that_does_not_answer_for_a_moment_late_in_a_drain_is_asked_again() -> None:
    async def story(bench: Bench) -> None:
        bench.cluster.fabric.times = replace(bench.cluster.fabric.times, transfer_s=100.0)
        await bench.cluster.start()
        await bench.cluster.until_ready()
        home, away = bench.cluster.nodes.values()
        for number in range(MOVES_AT_ONCE):
            await bench.create_on(home.name, f"app-{number}", (), Power.RUNNING)
        await bench.create_on(home.name, "rest", (SHARED_POOL,), Power.RUNNING)
        busy = await drain(bench, home)
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        await asyncio.sleep(ASK_LIMIT.total_seconds() + 20)
        away.libvirtd.go_away()
        stop = await act_on_vm(bench.cluster.context(), ADMIN, "rest", VmAction.STOP)
        await bench.ended(stop)
        await asyncio.sleep(3)
        away.libvirtd.come_back()
        await bench.until(lambda: bench.places()["rest"] == away.name)
        ended = await bench.ended(busy, 1000)
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert isinstance(ended.details, DrainJournal)
        assert (ended.details.refused, ended.details.unanswered) == ((), ())
        await bench.settled()

    run(story)
