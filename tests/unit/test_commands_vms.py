"""What users ask of VMs: names, verbs in phases, operations that end exactly once."""

from __future__ import annotations

import pytest

from controlplane.commands.attempts import BindVm, ObserveVm
from controlplane.commands.operations import ExpireOperation
from controlplane.commands.vms import CreateVm, DeleteVm
from shared.errors import NameTaken, NotFound, StateConflict
from shared.model import ObservedPower, OperationState, Power, RequestKind, StepState, VmPhase
from shared.protocol import VmReport
from shared.states import VmAction, vm_phase
from tests.unit.core_world import LEADER, USER, CoreWorld, no_check, spec


def test_a_name_is_taken_once_per_tenant_until_its_vm_is_gone() -> None:
    world = CoreWorld()
    vm_id, _ = world.create("web-1")
    again = CreateVm(name="web-1", tenant="default", labels={}, spec=spec(), by=USER)

    assert isinstance(world.refused(again), NameTaken)
    world.apply(CreateVm(name="web-1", tenant="other", labels={}, spec=spec(), by=USER))
    world.apply(DeleteVm(vm_id=vm_id, by=USER))
    world.apply(again)


def test_a_create_succeeds_when_the_vm_runs() -> None:
    world = CoreWorld()
    vm_id, operation_id = world.create()
    seen = [world.state.operations[operation_id].record.phase]
    world.bind(vm_id)
    seen.append(world.state.operations[operation_id].record.phase)
    world.permit(vm_id)
    seen.append(world.state.operations[operation_id].record.phase)
    world.report(vm_id, ObservedPower.RUNNING)

    assert seen == ["place", "permit", "run"]
    done = world.ended(operation_id)
    assert done.state is OperationState.SUCCEEDED
    assert [step.state for step in done.steps] == [StepState.DONE] * 3
    assert done.by == USER.principal


def test_a_vm_created_stopped_is_done_at_once() -> None:
    world = CoreWorld()
    vm_id, operation_id = world.create(power=Power.STOPPED)

    assert world.ended(operation_id).state is OperationState.SUCCEEDED
    assert vm_phase(world.vm(vm_id)) is VmPhase.STOPPED
    world.act(vm_id, VmAction.START)
    assert vm_phase(world.vm(vm_id)) is VmPhase.PENDING


@pytest.mark.parametrize("action", [VmAction.START, VmAction.RESUME])
def test_an_action_out_of_phase_is_refused(action: VmAction) -> None:
    world = CoreWorld()
    vm_id = world.running()

    with pytest.raises(StateConflict):
        world.act(vm_id, action)
    assert world.open_operations(vm_id) == []


def test_pause_and_resume() -> None:
    world = CoreWorld()
    vm_id = world.running()
    pause = world.act(vm_id, VmAction.PAUSE)
    assert world.vm(vm_id).spec.power is Power.PAUSED
    assert world.open_operations(vm_id) == ["vm.pause"]
    world.report(vm_id, ObservedPower.PAUSED)
    assert world.ended(pause).state is OperationState.SUCCEEDED

    resume = world.act(vm_id, VmAction.RESUME)
    world.report(vm_id, ObservedPower.RUNNING)
    assert world.ended(resume).state is OperationState.SUCCEEDED


def test_a_stop_ends_when_nothing_runs_and_a_start_begins_a_new_generation() -> None:
    world = CoreWorld()
    vm_id = world.running()
    stop = world.act(vm_id, VmAction.STOP)
    world.report(vm_id, ObservedPower.RUNNING)
    assert world.open_operations(vm_id) == ["vm.stop"]
    world.report(vm_id, ObservedPower.STOPPED)
    assert world.ended(stop).state is OperationState.SUCCEEDED

    start = world.act(vm_id, VmAction.START)
    assert world.permit(vm_id) == 2
    # What is said of the generation before does not make the new start true.
    world.report(vm_id, ObservedPower.RUNNING, generation=1)
    assert world.open_operations(vm_id) == ["vm.start"]
    world.report(vm_id, ObservedPower.RUNNING)
    assert world.ended(start).state is OperationState.SUCCEEDED


def test_a_later_wish_cancels_an_earlier_operation() -> None:
    world = CoreWorld()
    vm_id, create = world.create()
    stop = world.act(vm_id, VmAction.STOP)

    ended = world.ended(create)
    assert ended.state is OperationState.CANCELLED
    assert ended.error is not None
    assert ended.error.code == "superseded"
    assert world.ended(stop).state is OperationState.SUCCEEDED


def test_asking_again_for_what_is_under_way_is_the_same_operation() -> None:
    """What is open on a VM must fit into one transaction, however often its user asks."""
    world = CoreWorld()
    vm_id = world.running()

    asked = {world.act(vm_id, VmAction.STOP) for _ in range(200)}
    world.report(vm_id, ObservedPower.STOPPED)

    assert len(asked) == 1
    assert world.ended(asked.pop()).state is OperationState.SUCCEEDED


def test_a_request_is_numbered_and_one_at_a_time() -> None:
    world = CoreWorld()
    vm_id = world.running()
    reboot = world.act(vm_id, VmAction.REBOOT)
    request = world.vm(vm_id).request
    assert request is not None
    assert (request.number, request.kind, request.generation) == (1, RequestKind.REBOOT, 1)
    with pytest.raises(StateConflict, match="under way"):
        world.act(vm_id, VmAction.RESET)

    world.report(vm_id, ObservedPower.RUNNING, answered_request=1)
    assert world.ended(reboot).state is OperationState.SUCCEEDED
    world.act(vm_id, VmAction.RESET)
    request = world.vm(vm_id).request
    assert request is not None
    assert request.number == 2


def test_a_request_that_another_wish_replaced_is_cancelled() -> None:
    world = CoreWorld()
    vm_id = world.running()
    reboot = world.act(vm_id, VmAction.REBOOT)

    world.act(vm_id, VmAction.PAUSE)

    assert world.ended(reboot).state is OperationState.CANCELLED


def test_a_request_to_a_guest_that_ended_fails() -> None:
    world = CoreWorld()
    vm_id = world.running()
    reboot = world.act(vm_id, VmAction.REBOOT)
    world.report(vm_id, ObservedPower.CRASHED)

    ended = world.ended(reboot)
    assert ended.state is OperationState.FAILED
    assert ended.error is not None
    assert ended.error.code == "guest_not_running"


def test_a_shutdown_wants_the_vm_stopped_and_a_stop_may_follow() -> None:
    world = CoreWorld()
    vm_id = world.running()
    shutdown = world.act(vm_id, VmAction.SHUTDOWN)
    assert world.vm(vm_id).spec.power is Power.STOPPED
    stop = world.act(vm_id, VmAction.STOP)
    assert world.vm(vm_id).request is None
    world.report(vm_id, ObservedPower.STOPPED)

    assert {world.ended(each).state for each in (shutdown, stop)} == {OperationState.SUCCEEDED}


def test_a_vm_without_a_node_is_deleted_at_once() -> None:
    world = CoreWorld()
    vm_id, create = world.create()
    delete = world.apply(DeleteVm(vm_id=vm_id, by=USER))

    assert vm_id not in world.state.vms
    assert world.ended(create).state is OperationState.CANCELLED
    assert world.ended(delete).state is OperationState.SUCCEEDED
    late = BindVm(vm_id=vm_id, node_id=world.node_id, by=LEADER, check=no_check)
    assert isinstance(world.refused(late), NotFound)


def test_a_bound_vm_is_deleted_when_its_node_has_nothing_of_it() -> None:
    world = CoreWorld()
    vm_id = world.running()
    reboot = world.act(vm_id, VmAction.REBOOT)
    delete = world.apply(DeleteVm(vm_id=vm_id, by=USER))
    assert world.ended(reboot).state is OperationState.CANCELLED
    assert vm_phase(world.vm(vm_id)) is VmPhase.DELETING
    assert isinstance(world.refused(DeleteVm(vm_id=vm_id, by=USER)), StateConflict)

    world.report(vm_id, ObservedPower.STOPPED)
    assert vm_id in world.state.vms
    # Said of an earlier generation: a permit could still be on its way.
    world.report(vm_id, ObservedPower.ABSENT, permit_used=True, removed=True, generation=0)
    assert vm_id in world.state.vms
    world.report(vm_id, ObservedPower.ABSENT, permit_used=True, removed=True)

    assert vm_id not in world.state.vms
    assert world.ended(delete).state is OperationState.SUCCEEDED
    assert world.events().count("vm.deleted") == 1


def test_only_the_node_a_vm_is_bound_to_speaks_of_it() -> None:
    world = CoreWorld()
    vm_id = world.running()
    before = world.vm(vm_id)
    from_elsewhere = world.node_id
    world.node_id = world.join("n2")

    world.report(vm_id, ObservedPower.CRASHED)

    assert world.vm(vm_id) == before
    assert before.status.node == from_elsewhere
    gone = VmReport(vm_id="vm-gone", generation=1, power=ObservedPower.RUNNING, permit_used=True)
    world.apply(ObserveVm(node_id=world.node_id, report=gone, by=LEADER))
    assert "vm-gone" not in world.state.vms


def test_a_deadline_fails_an_operation_once() -> None:
    world = CoreWorld()
    vm_id = world.running()
    stop = world.act(vm_id, VmAction.STOP)
    expire = ExpireOperation(operation_id=stop, by=LEADER)
    assert isinstance(world.refused(expire), StateConflict)

    world.age(minutes=16)
    world.apply(expire)
    world.apply(expire)
    world.report(vm_id, ObservedPower.STOPPED)

    ended = world.ended(stop)
    assert ended.state is OperationState.FAILED
    assert ended.error is not None
    assert ended.error.code == "deadline_exceeded"


def test_a_vm_that_fitted_nowhere_for_a_day_is_no_longer_wanted() -> None:
    world = CoreWorld()
    vm_id, create = world.create()
    world.age(hours=25)
    world.apply(ExpireOperation(operation_id=create, by=LEADER))

    assert world.ended(create).state is OperationState.FAILED
    assert vm_phase(world.vm(vm_id)) is VmPhase.STOPPED
    assert world.state.vm_ids_to_place() == []
