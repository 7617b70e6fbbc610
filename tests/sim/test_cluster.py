"""The cluster as others use it: on a real loop without faults; and death as it must be."""

from __future__ import annotations

import asyncio
import random

import pytest

from controlplane.services.context import Permission, Principal, Scope
from controlplane.services.operations import get_operation
from controlplane.services.requests import NewVm
from controlplane.services.vms import create_vm
from shared.clock import SystemClock
from shared.errors import NoLeader
from shared.model import BootSpec, OperationState, VmSpec
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.invariants import Judge, everything_settles
from tests.sim.process import Process, adopt_by_context, outside
from tests.sim.virtual_loop import run_virtual

ADMIN = Principal("admin", frozenset(Permission), Scope())
NEW_VM = NewVm(
    name="web-1", spec=VmSpec(vcpus=1, memory_mib=512, boot=BootSpec(kernel="tiny-kernel"))
)


async def test_it_serves_on_a_real_loop() -> None:
    judge = Judge()
    settings = ClusterSettings(replicas=1, nodes=3, telemetry=True)
    cluster = SimCluster(settings, random.Random(1), clock=SystemClock(), observe=judge.take)
    with pytest.raises(NoLeader):
        cluster.context()
    await cluster.start()
    try:
        async with asyncio.timeout(20):
            await cluster.until_ready()
        operation = await create_vm(cluster.context(), ADMIN, NEW_VM)
        ended = await get_operation(cluster.context(), ADMIN, operation.id, 20)
        assert ended.state is OperationState.SUCCEEDED
        found = [node.found() for node in cluster.nodes.values()]
        assert not list(everything_settles(judge.ledger, found))
        assert cluster.control_plane("replica-1").leader.term is not None
    finally:
        await cluster.stop()


def test_a_dead_process_has_no_effect_any_more() -> None:
    effects: list[str] = []

    async def effect(process: Process, name: str) -> None:
        process.check()
        effects.append(name)

    async def work(process: Process) -> None:
        try:
            await effect(process, "first")
            await asyncio.sleep(10)
        finally:
            await effect(process, "in its clean-up")

    async def on_the_wire(process: Process) -> None:
        async def arrive() -> None:
            await asyncio.sleep(10)
            effects.append("request")

        outside(arrive(), "request")
        await work(process)

    async def main() -> None:
        process = Process("host", "host.1")
        process.spawn(on_the_wire(process), "main")
        await asyncio.sleep(1)
        process.kill()
        await process.gone()
        await asyncio.sleep(20)

    run_virtual(main(), adopt_by_context)
    assert effects == ["first", "request"]


def test_a_process_can_die_at_any_effect() -> None:
    async def main() -> list[int]:
        process = Process("host", "host.1")
        counted: list[int] = []

        async def work() -> None:
            for number in range(10):
                process.check()
                counted.append(number)
                await asyncio.sleep(1)

        process.spawn(work(), "main")
        await process.alive_until(4)
        await process.gone()
        return counted

    # The first three checks pass, the fourth is where it dies.
    assert run_virtual(main(), adopt_by_context) == [0, 1, 2]


def test_a_node_that_lost_power_runs_nothing_until_permitted_anew() -> None:
    judge = Judge()

    async def main() -> None:
        cluster = SimCluster(ClusterSettings(nodes=1), random.Random(2), observe=judge.take)
        await cluster.start()
        await cluster.until_ready()
        operation = await create_vm(cluster.context(), ADMIN, NEW_VM)
        await get_operation(cluster.context(), ADMIN, operation.id, 60)
        node = cluster.nodes["node-1"]
        assert list(node.found().running.values()) == [1]
        node.lose_power()
        assert not node.found().running
        await asyncio.sleep(10)
        node.boot()
        await asyncio.sleep(120)
        assert list(node.found().running.values()) == [2]
        assert not list(everything_settles(judge.ledger, [node.found()]))
        await cluster.stop()

    run_virtual(main(), adopt_by_context)


def test_a_replica_whose_history_cannot_be_written_goes_on_serving() -> None:
    judge = Judge()

    async def main() -> None:
        cluster = SimCluster(ClusterSettings(nodes=1), random.Random(3), observe=judge.take)
        await cluster.start()
        await cluster.until_ready()
        await asyncio.sleep(10)
        replica = cluster.replicas["replica-1"]
        process, disk = replica.process, replica._disk
        copied = await disk.copied_seq()
        disk._database.execute("PRAGMA query_only = ON")
        operation = await create_vm(cluster.context(), ADMIN, NEW_VM)
        ended = await get_operation(cluster.context(), ADMIN, operation.id, 60)
        assert ended.state is OperationState.SUCCEEDED
        await asyncio.sleep(60)
        assert replica.process is process
        state = cluster.context().state
        assert await disk.copied_seq() == copied < state.last_seq

        disk._database.execute("PRAGMA query_only = OFF")
        await asyncio.sleep(10)
        assert await disk.copied_seq() == state.last_seq
        assert not list(everything_settles(judge.ledger, [cluster.nodes["node-1"].found()]))
        await cluster.stop()

    run_virtual(main(), adopt_by_context)
