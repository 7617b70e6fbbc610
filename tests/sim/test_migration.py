"""Migrations in the simulated cluster: the plain case, and each hard one made on purpose."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.services.drains import drain_node, plan_drain
from controlplane.services.nodes import get_node, set_cordon
from controlplane.services.operations import cancel_operation
from controlplane.services.requests import CordonOrder, DrainOrder
from controlplane.services.vms import delete_vm, get_vm
from shared.model import (
    DiskSpec,
    MigrationSpec,
    ObservedPower,
    OperationState,
    Power,
    VmPhase,
)
from shared.moves import EndState
from shared.states import vm_phase
from tests.sim.bench import ADMIN, Bench, run
from tests.sim.ledger import DeleteAsked


def test_a_drain_empties_a_node_and_tells_beforehand() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        node_name = await bench.where()
        assert node_name is not None
        context = bench.cluster.context()
        for number, disks in enumerate(((), ("shared",), ("default",))):
            await bench.create_on(node_name, f"rest-{number}", disks, Power.STOPPED)
        plan = await plan_drain(context, ADMIN, node_name, DrainOrder())
        assert {v.vm_name: v.action for v in plan.vms} == {
            "web-1": "migrate",
            "rest-0": "release",
            "rest-1": "release",
            "rest-2": "stay",
        }
        assert plan.blocked == 1
        ended = await bench.ended(await drain_node(context, ADMIN, node_name, DrainOrder()))
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert (ended.error.code, len(ended.error.errors)) == ("drain_incomplete", 1)
        assert (await get_node(context, ADMIN, node_name)).cordoned, "it stays closed"
        left = await get_vm(context, ADMIN, "rest-2")
        bench.cluster.observe(DeleteAsked(left.id))
        await bench.ended(await delete_vm(context, ADMIN, "rest-2"))
        ended = await bench.ended(await drain_node(context, ADMIN, node_name, DrainOrder()))
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert (await get_node(context, ADMIN, node_name)).allocated.vms == 0
        await bench.settled()

    run(story)


def test_a_drain_whose_destination_is_gone_moves_the_rest_and_can_be_cancelled() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        home = await bench.where()
        assert home is not None
        context = bench.cluster.context()
        gone, away = (name for name in bench.cluster.nodes if name != home)
        await set_cordon(context, ADMIN, away, CordonOrder(), cordoned=True)
        for number in range(3):
            await bench.create_on(home, f"app-{number}", (), Power.RUNNING, others=(gone,))
        stuck = await drain_node(context, ADMIN, home, DrainOrder())
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        bench.cluster.nodes[gone].lose_power()
        await set_cordon(context, ADMIN, away, CordonOrder(), cordoned=False)
        await bench.until(lambda: sum(w == away for w in bench.places().values()) == 2)
        # Of the first two nobody can tell where they are.
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        await cancel_operation(context, ADMIN, stuck.id)
        assert (await bench.ended(stuck)).state is OperationState.CANCELLED
        assert len(bench.on_the_move()) == 2
        assert not (await get_node(context, ADMIN, home)).cordoned
        bench.cluster.nodes[gone].boot()
        await bench.settled()
        assert sorted(bench.places().values()) == sorted([home, home, away, away])

    run(story, nodes=3)


SPECS: dict[str, dict[str, Any]] = {
    "no disk": {},
    "a disk that is copied": {"disks": (DiskSpec(name="root", size_gib=1),)},
    "a shared disk": {"disks": (DiskSpec(name="root", size_gib=1, pool="shared"),)},
    "strict": {"migration": MigrationSpec(strict=True)},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_vm_moves_and_nothing_is_left(spec: dict[str, Any]) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(**spec)
        before = await bench.where()
        ended = await bench.ended(await bench.migrate())
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert [step.state.value for step in ended.steps] == ["done"] * 7
        assert await bench.where() != before
        await bench.settled()

    run(story)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1])
def test_a_new_leader_that_has_heard_nobody_yet_fails_no_migration(after_s: float) -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        before = await bench.where()
        operation = await bench.migrate()
        await asyncio.sleep(after_s)
        (replica,) = bench.cluster.replicas.values()
        replica.crash()
        replica.start()
        await bench.cluster.until_ready()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert await bench.where() != before
        await bench.settled()

    run(story)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.004])
def test_a_new_leader_that_has_heard_nobody_yet_gives_up_no_drain(after_s: float) -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        node_name = await bench.where()
        assert node_name is not None
        await bench.create_on(node_name, "rests", ("shared",), Power.STOPPED)
        context = bench.cluster.context()
        bench.cluster.observe(DeleteAsked((await get_vm(context, ADMIN, "web-1")).id))
        await bench.ended(await delete_vm(context, ADMIN, "web-1"))
        operation = await drain_node(context, ADMIN, node_name, DrainOrder())
        await asyncio.sleep(after_s)
        (replica,) = bench.cluster.replicas.values()
        replica.crash()
        replica.start()
        await bench.cluster.until_ready()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.SUCCEEDED, ended.error
        await bench.settled()

    run(story)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_guest_that_dies_before_it_goes_on_goes_on_where_it_was(spec: dict[str, Any]) -> None:
    """Its domain over there is one that stays; what has never run has changed nothing."""

    async def story(bench: Bench) -> None:
        await bench.start(**spec)
        before = await bench.where()
        nodes = bench.cluster.nodes.values()
        (destination,) = (node.state for node in nodes if node.name != before)
        operation = await bench.migrate()
        await bench.until(
            lambda: any(domain.stays for domain in destination.domains.values()), look_s=0.001
        )
        (arrival,) = destination.domains.values()
        assert arrival.incoming
        arrival.end(ObservedPower.CRASHED)
        assert arrival.end_state() is EndState.NEVER_RAN
        ended = await bench.ended(operation)
        assert ended.state is OperationState.FAILED
        assert await bench.where() == before
        await bench.settled()
        (vm,) = bench.judge.ledger.vms.values()
        assert (vm_phase(vm), vm.status.crashes) == (VmPhase.RUNNING, 0)
        assert destination.domains == {}

    run(story)
