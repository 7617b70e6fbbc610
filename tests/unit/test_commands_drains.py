"""Drains: one at a time for a node, its cordon, the moves it asks for, and what it lets go of."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.commands.draft import Author
from controlplane.commands.drains import (
    cancel_moves,
    cordon_for,
    drained,
    journal_of,
    move_vm,
    note_ends,
    note_left,
    refuse_release,
    release_vm,
    uncordon_again,
)
from controlplane.commands.nodes import SetCordon
from controlplane.commands.sagas import CancelOperation, FinishStep, Note, unchanged
from controlplane.commands.vms import DeleteVm
from controlplane.sagas.migrate import MIGRATION
from shared.errors import NotFound, StateConflict
from shared.model import DiskSpec, ObservedPower, OperationState
from shared.moves import Leftover, VmLeft
from shared.states import VmAction
from tests.unit.core_world import USER
from tests.unit.move_world import MoveWorld

DISK = (DiskSpec(name="root", size_gib=1),)


def draining(world: MoveWorld, step: str = "evacuate") -> str:
    """Return a drain of ``n1`` that has come to ``step``."""
    operation_id = world.apply(world.drain())
    if step == "evacuate":
        world.finish(operation_id, "cordon", cordon_for)
    return operation_id


def at_rest(world: MoveWorld, disks: tuple[DiskSpec, ...] = ()) -> str:
    vm_id = world.running(disks=disks)
    world.act(vm_id, VmAction.STOP)
    world.report(vm_id, ObservedPower.STOPPED)
    return vm_id


def move(world: MoveWorld, operation_id: str, vm_id: str) -> str:
    world.note(operation_id, "evacuate", move_vm(vm_id, MIGRATION.names, MIGRATION.no_return))
    return next(
        each.operation
        for each in journal_of(world.operation(operation_id)).tries
        if each.vm == vm_id
    )


def test_why_a_vm_is_not_let_go_is_written_down_once() -> None:
    world = MoveWorld()
    vm_id = at_rest(world)
    operation_id = draining(world)
    for reason in ("nobody knows", "its disk is not there"):
        world.note(operation_id, "evacuate", refuse_release(vm_id, reason))

    stays = VmLeft(vm=vm_id, name="web-1", reason="its disk is not there")
    assert journal_of(world.operation(operation_id)).refused == (stays,)
    assert world.vm(vm_id).status.node == world.node_id


def test_whoever_asks_again_gets_the_drain_that_is_under_way() -> None:
    world = MoveWorld()
    world.running()
    first = world.apply(world.drain(reason="repair"))

    assert world.apply(world.drain(by=Author("another"))) == first
    assert journal_of(world.operation(first)).total == 1
    assert journal_of(world.operation(first)).reason == "repair"
    assert isinstance(world.refused(world.drain("node-nowhere")), NotFound)


def test_a_drain_that_would_skip_others_is_not_the_one_under_way() -> None:
    world = MoveWorld()
    vm_id = world.running()
    first = world.apply(world.drain(skip=(vm_id,)))

    assert world.apply(world.drain(skip=(vm_id, vm_id))) == first
    refused = world.refused(world.drain())
    assert isinstance(refused, StateConflict)
    assert first in str(refused)
    assert world.vm(vm_id).name in str(refused)


def test_while_a_drain_is_undone_no_other_is_taken() -> None:
    world = MoveWorld()
    operation_id = draining(world)
    world.apply(CancelOperation(operation_id=operation_id, by=USER))

    assert operation_id in str(world.refused(world.drain()))


@pytest.mark.parametrize("cordoned", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_only_a_cancelled_drain_opens_a_node_that_it_has_closed(
    cordoned: bool, cancelled: bool
) -> None:
    world = MoveWorld()
    close = SetCordon(node_id=world.node_id, cordoned=True, reason="mine", by=USER)
    if cordoned:
        world.apply(close)
    operation_id = draining(world)
    assert world.node().cordoned
    assert world.node().cordon_reason == ("mine" if cordoned else "drained by user-1")
    if cancelled:
        world.apply(CancelOperation(operation_id=operation_id, by=USER))
    else:
        world.fail(operation_id, "evacuate")
    world.undo(operation_id, "evacuate")
    world.undo(operation_id, "cordon", uncordon_again)

    assert world.node().cordoned is (cordoned or not cancelled)


def test_a_node_is_not_opened_while_it_is_drained() -> None:
    world = MoveWorld()
    operation_id = draining(world)
    uncordon = SetCordon(node_id=world.node_id, cordoned=False, reason="", by=USER)

    assert operation_id in str(world.refused(uncordon))


def test_a_move_is_written_down_with_the_request_for_it_and_counted() -> None:
    world = MoveWorld()
    vm_id = world.running()
    operation_id = draining(world)
    first = move(world, operation_id, vm_id)
    child = world.operation(first)
    assert (child.parent, child.target, child.by) == (operation_id, vm_id, "user-1")
    assert world.claim(vm_id).operation == first
    world.fail(first, "admit")
    world.undo(first, "admit")
    vm = world.vm(vm_id)
    world.state.put(
        replace(vm, status=replace(vm.status, migration=None)), world.state.revision + 1
    )
    second = move(world, operation_id, vm_id)

    (tried,) = journal_of(world.operation(operation_id)).tries
    assert (tried.vm, tried.operation, tried.count) == (vm_id, second, 2)


def test_an_end_is_written_down_unless_another_try_was_begun_meanwhile() -> None:
    world = MoveWorld()
    first, second = world.running("web-1"), world.running("web-2")
    operation_id = draining(world)
    for vm_id in (first, second):
        move(world, operation_id, vm_id)
    before = journal_of(world.operation(operation_id)).tries
    ended = replace(before[0], ended_at=world.clock.now(), code="cancelled", detail="by user-1")
    gone = replace(before[1], operation="op-earlier", code="cancelled")
    world.note(operation_id, "evacuate", note_ends((ended, gone)))

    assert journal_of(world.operation(operation_id)).tries == (ended, before[1])


@pytest.mark.parametrize("new", [True, False])
def test_what_rests_is_let_go_and_swept(new: bool) -> None:
    world = MoveWorld()
    vm_id = at_rest(world)
    operation_id = draining(world)
    new_node = world.other_id if new else None
    world.note(operation_id, "evacuate", release_vm(vm_id, new_node))

    status = world.vm(vm_id).status
    assert (status.node, status.attempt) == (new_node, None)
    assert status.leftovers == (Leftover(node=world.node_id, generation=1),)
    assert "vm.released" in world.events()


@pytest.mark.parametrize("why", ["runs", "elsewhere", "deleting", "claimed"])
def test_nothing_else_is_let_go(why: str) -> None:
    world = MoveWorld()
    vm_id = at_rest(world) if why in ("elsewhere", "deleting") else world.running()
    if why == "elsewhere":
        operation_id = world.apply(world.drain(world.other_id))
        world.finish(operation_id, "cordon", cordon_for)
    else:
        operation_id = draining(world)
    if why == "deleting":
        world.apply(DeleteVm(vm_id=vm_id, by=USER))
    if why == "claimed":
        world.migrate(vm_id)
    effect = release_vm(vm_id, world.other_id)
    refused = world.refused(Note(operation_id=operation_id, step="evacuate", effect=effect))

    assert isinstance(refused, StateConflict)


def test_a_vm_with_disks_is_never_without_a_node() -> None:
    world = MoveWorld()
    vm_id = at_rest(world, disks=DISK)
    operation_id = draining(world)
    with pytest.raises(AssertionError, match="disks"):
        world.note(operation_id, "evacuate", release_vm(vm_id, None))


def test_a_node_with_something_left_on_it_is_not_drained() -> None:
    world = MoveWorld()
    world.left_over()
    operation_id = draining(world)
    finish = FinishStep(operation_id=operation_id, step="evacuate", effect=drained)

    assert isinstance(world.refused(finish), StateConflict)


def test_an_empty_node_is_drained() -> None:
    world = MoveWorld()
    operation_id = draining(world)
    left = (VmLeft(vm="vm-1", name="web-1", reason="it is being deleted"),)
    world.note(operation_id, "evacuate", note_left(left))
    world.finish(operation_id, "evacuate", drained)

    ended = world.ended(operation_id)
    assert ended.state is OperationState.SUCCEEDED
    assert journal_of(ended).left == ()
    assert "node.drained" in world.events()


def test_cancelling_recalls_what_can_be_and_leaves_the_rest_alone() -> None:
    world = MoveWorld()
    early, late = world.running("web-1"), world.running("web-2")
    operation_id = draining(world)
    early_id, late_id = move(world, operation_id, early), move(world, operation_id, late)
    for step in MIGRATION.names[:-1]:
        world.finish(late_id, step, world.effects().get(step, unchanged))
    world.apply(CancelOperation(operation_id=operation_id, by=USER))
    world.undo(operation_id, "evacuate", cancel_moves)

    assert world.operation(early_id).state is OperationState.CANCELLING
    assert world.operation(late_id).state is OperationState.RUNNING
    assert world.operation(late_id).phase == "finalize"


def test_what_cannot_leave_is_told() -> None:
    world = MoveWorld()
    operation_id = draining(world)
    left = (VmLeft(vm="vm-1", name="web-1", reason="it is too large"),)
    world.note(operation_id, "evacuate", note_left(left))

    assert journal_of(world.operation(operation_id)).left == left
