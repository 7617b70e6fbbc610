"""What the two nodes of a migration are told of its VM, from the request until nothing is left."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.sagas.migrate import MIGRATION
from controlplane.sessions.desired import TIMEOUT_MIN_S, desired_of
from shared.model import DiskSpec, Power, Term
from shared.moves import MigrationStage
from shared.protocol import Desired, Intent, MigrationRole
from shared.states import VmAction
from tests.unit.move_world import MoveWorld

TERM = Term(1, 7)


def told(world: MoveWorld, vm_id: str, node_id: str) -> Desired | None:
    return desired_of(
        world.state.vms[vm_id], world.node(node_id), TERM, lambda each: world.node(each).name
    )


# Per step: the stage, then for source and destination: intent, generation, role in an order.
Told = tuple[Intent, int, MigrationRole | None] | None
_Role, _Stage = MigrationRole, MigrationStage
ALONE: tuple[Told, Told] = ((Intent.RUN, 1, None), None)
BOTH: tuple[Told, Told] = (
    (Intent.RUN, 1, _Role.SOURCE),
    (Intent.RECEIVE, 2, _Role.DESTINATION),
)
STEPS: dict[str, tuple[MigrationStage, tuple[Told, Told]]] = {
    "admit": (_Stage.REQUESTED, ALONE),
    "precheck": (_Stage.REQUESTED, ALONE),
    "claim": (_Stage.REQUESTED, ALONE),
    "prepare": (_Stage.PREPARE, BOTH),
    "transfer": (_Stage.TRANSFER, BOTH),
    "switch": (_Stage.TRANSFER, BOTH),
    "finalize": (_Stage.FINALIZE, ((Intent.LEAVE, 1, _Role.SOURCE), (Intent.RUN, 2, None))),
}


def test_every_step_is_told() -> None:
    assert tuple(STEPS) == MIGRATION.names


@pytest.mark.parametrize("step", STEPS)
def test_each_node_is_told_its_part(step: str) -> None:
    world = MoveWorld()
    third_id = world.join("n3")
    vm_id, operation_id = world.moving(step)
    stage, expected = STEPS[step]

    for node_id, part in zip((world.node_id, world.other_id), expected, strict=True):
        message = told(world, vm_id, node_id)
        if part is None:
            assert message is None
            continue
        assert message is not None
        order = message.migration
        assert not message.permitted
        role = None if order is None else order.role
        assert (message.intent, message.generation, role) == part
        if order is not None:
            peer = "n2" if role is _Role.SOURCE else "n1"
            assert (order.operation, order.stage, order.peer) == (operation_id, stage, peer)
            assert (order.source_generation, order.generation) == (1, 2)
            assert (order.boot_id, order.copied) == ("boot-1", ("root",))
            assert order.target is None, "what holds a secret is in no record"
    assert told(world, vm_id, third_id) is None


@pytest.mark.parametrize("stage", set(MigrationStage) - {MigrationStage.REQUESTED})
def test_every_stage_is_told_to_both(stage: MigrationStage) -> None:
    world = MoveWorld()
    vm_id, _ = world.moving("transfer")
    vm = world.vm(vm_id)
    claim = replace(world.claim(vm_id), stage=stage)
    world.state.put(replace(vm, status=replace(vm.status, migration=claim)), 99)

    for node_id in (world.node_id, world.other_id):
        message = told(world, vm_id, node_id)
        assert message is not None
        assert message.migration is not None
        assert message.migration.stage is stage


def test_a_paused_vm_stays_wanted_paused_at_its_source() -> None:
    world = MoveWorld()
    vm_id = world.running()
    world.act(vm_id, VmAction.PAUSE)
    world.report(vm_id, world.vm(vm_id).status.power_seen.PAUSED)
    operation_id = world.migrate(vm_id)
    for step in ("admit", "precheck", "claim"):
        world.finish(operation_id, step, world.effects().get(step, lambda draft, op: op))

    source, destination = (told(world, vm_id, each) for each in (world.node_id, world.other_id))
    assert source is not None
    assert destination is not None
    assert (source.intent, destination.intent) == (Intent.PAUSE, Intent.RECEIVE)
    assert destination.spec.power is Power.PAUSED


def test_a_leftover_is_swept_by_its_generation_and_without_an_operation() -> None:
    world = MoveWorld()
    vm_id = world.left_over()
    message = told(world, vm_id, world.node_id)

    assert message is not None
    assert (message.intent, message.generation) == (Intent.LEAVE, 1)
    order = message.migration
    assert order is not None
    assert (order.operation, order.role, order.stage) == ("", _Role.SOURCE, _Stage.FINALIZE)
    assert (order.source_generation, order.copied, order.peer) == (1, ("root",), "")
    owner = told(world, vm_id, world.other_id)
    assert owner is not None
    assert (owner.intent, owner.migration) == (Intent.RUN, None)


@pytest.mark.parametrize(
    ("memory_mib", "disks_gib", "timeout_s"),
    [
        (512, (), TIMEOUT_MIN_S),
        (4096, (), 600.0),
        (4096, (10,), 2100.0),
        (512, (1,), 600.0),  # what is small counts as 2 GiB
        (512, (1, 500), 600.0),  # the second is not copied
    ],
)
def test_a_transfer_may_take_as_long_as_its_size_allows(
    memory_mib: int, disks_gib: tuple[int, ...], timeout_s: float
) -> None:
    world = MoveWorld()
    names = ("root", "data")
    disks = tuple(
        DiskSpec(name=name, size_gib=size) for name, size in zip(names, disks_gib, strict=False)
    )
    vm_id, _ = world.moving("transfer", memory_mib=memory_mib, disks=disks)
    message = told(world, vm_id, world.node_id)

    assert message is not None
    assert message.migration is not None
    assert message.migration.timeout_s == timeout_s
