"""Generations: given out one at a time, ended by proof only; crashes, back-off, lost nodes."""

from __future__ import annotations

from itertools import product

import pytest
from msgspec.structs import replace

from controlplane.commands.attempts import (
    PLACED,
    RESTART_CAP,
    BindVm,
    EndAttempt,
    NotePlacement,
    PermitStart,
)
from controlplane.commands.draft import Draft
from controlplane.commands.upgrade import MOVES_LEVEL
from controlplane.commands.vms import DeleteVm
from controlplane.sessions.desired import desired_of
from shared.errors import StateConflict
from shared.model import (
    AttemptState,
    Cluster,
    HaSpec,
    ObservedPower,
    OperationState,
    Power,
    Problem,
    Term,
    Vm,
    VmPhase,
    condition,
    may_have_run,
)
from shared.problems import problem
from shared.states import RUNNING_POWERS, VmAction, vm_phase
from tests.unit.core_world import BORN, CELL, LEADER, USER, CoreWorld, no_check


def bound(world: CoreWorld, name: str = "web-1") -> str:
    vm_id, _ = world.create(name)
    world.bind(vm_id)
    return vm_id


def permit_refused(world: CoreWorld, vm_id: str) -> bool:
    refused = world.refused(PermitStart(vm_id=vm_id, by=LEADER, check=no_check))
    return isinstance(refused, StateConflict)


def no_room(draft: Draft, vm: Vm, node_id: str) -> None:
    raise StateConflict("no room")


def test_binding_is_checked_on_the_draft_and_happens_once() -> None:
    world = CoreWorld()
    vm_id, _ = world.create()
    bind = BindVm(vm_id=vm_id, node_id=world.node_id, by=LEADER, check=no_room)
    assert str(world.refused(bind)) == "no room"
    assert world.vm(vm_id).status.node is None

    world.bind(vm_id)
    with pytest.raises(StateConflict):
        world.bind(vm_id)
    assert world.vm(vm_id).status.node == world.node_id


@pytest.mark.parametrize("why", ["stopped", "deleting"])
def test_what_should_not_run_is_neither_bound_nor_permitted(why: str) -> None:
    world = CoreWorld()
    unbound, _ = world.create("unbound")
    vm_id = bound(world, name="bound")
    if why == "stopped":
        world.act(unbound, VmAction.STOP)
        world.act(vm_id, VmAction.STOP)
        with pytest.raises(StateConflict):
            world.bind(unbound)
    else:
        world.apply(DeleteVm(vm_id=vm_id, by=USER))

    assert permit_refused(world, vm_id)


def test_a_permit_names_the_node_its_boot_and_a_new_generation() -> None:
    world = CoreWorld()
    vm_id = bound(world)

    assert world.permit(vm_id) == 1

    attempt = world.vm(vm_id).status.attempt
    assert attempt is not None
    assert (attempt.generation, attempt.node, attempt.boot_id) == (1, world.node_id, "boot-1")
    assert attempt.state is AttemptState.PERMITTED


def test_a_permit_needs_room_and_the_attempt_before_to_be_over() -> None:
    world = CoreWorld()
    vm_id = bound(world)
    world.refused(PermitStart(vm_id=vm_id, by=LEADER, check=no_room))
    assert world.vm(vm_id).status.generation == 0
    world.permit(vm_id)
    assert permit_refused(world, vm_id)
    world.report(vm_id, ObservedPower.RUNNING)
    assert permit_refused(world, vm_id)
    world.report(vm_id, ObservedPower.CRASHED)

    assert world.permit(vm_id) == 2


@pytest.mark.parametrize(("power", "used"), list(product(ObservedPower, (False, True))))
def test_only_a_proof_ends_an_attempt(power: ObservedPower, used: bool) -> None:
    """Neither a node that may yet start it, nor one that cannot tell, proves anything."""
    world = CoreWorld()
    vm_id = bound(world)
    world.permit(vm_id)

    world.report(vm_id, power, permit_used=used)

    attempt = world.vm(vm_id).status.attempt
    assert attempt is not None
    if power in RUNNING_POWERS:
        assert attempt.state is AttemptState.RUNNING
    elif used and power is not ObservedPower.UNKNOWN:
        assert attempt.state is AttemptState.ENDED
    else:
        assert attempt.state is AttemptState.PERMITTED
        assert permit_refused(world, vm_id)


@pytest.mark.parametrize(("power", "generation"), list(product(ObservedPower, (0, 2, 7))))
def test_a_report_on_another_generation_moves_nothing(
    power: ObservedPower, generation: int
) -> None:
    world = CoreWorld()
    vm_id = world.running()
    before = world.vm(vm_id)

    world.report(vm_id, power, generation=generation, permit_used=True)

    after = world.vm(vm_id)
    assert after.status.attempt == before.status.attempt
    assert after.status.power_seen is before.status.power_seen
    assert after.spec == before.spec
    assert after.status.crashes == 0


def at_level(level: int) -> CoreWorld:
    world = CoreWorld()
    record = Cluster(id="cluster-1", cell=CELL, schema_level=level, created_at=BORN)
    world.state.put(record, world.state.revision + 1)
    return world


@pytest.mark.parametrize(("power", "used"), list(product(ObservedPower, (False, True))))
def test_what_was_started_or_may_have_been_has_run(power: ObservedPower, used: bool) -> None:
    """FAILED and ABSENT say that no guest was there; with any other word its disks were made."""
    world = at_level(MOVES_LEVEL)
    vm_id = bound(world)
    world.permit(vm_id)
    assert world.vm(vm_id).status.has_run is False
    world.report(vm_id, power, permit_used=used)

    over = {ObservedPower.STOPPED, ObservedPower.SHUT_OFF, ObservedPower.CRASHED}
    ran = power in RUNNING_POWERS or (used and power in over)
    assert world.vm(vm_id).status.has_run is ran
    world.report(vm_id, ObservedPower.FAILED, permit_used=True)
    if power is ObservedPower.SHUT_OFF and used:
        world.act(vm_id, VmAction.START)
    world.permit(vm_id)
    assert world.vm(vm_id).status.has_run is ran, "it stays so"


def test_the_release_before_is_not_given_that_a_vm_has_run() -> None:
    world = at_level(MOVES_LEVEL - 1)
    vm_id = world.running()
    world.report(vm_id, ObservedPower.CRASHED)
    world.permit(vm_id)
    assert world.vm(vm_id).status.has_run is None


@pytest.mark.parametrize("rests", [False, True])
def test_once_the_level_is_raised_what_ran_before_has_run(rests: bool) -> None:
    """At its next report, or at its next permit: nobody knows any more how its attempts went."""
    world = at_level(MOVES_LEVEL - 1)
    vm_id = world.running()
    new_id = bound(world, "new")
    if rests:
        world.report(vm_id, ObservedPower.CRASHED)
    (cluster,) = world.state.clusters.values()
    world.state.put(replace(cluster.record, schema_level=MOVES_LEVEL), world.state.revision + 1)
    assert may_have_run(world.vm(vm_id))
    assert not may_have_run(world.vm(new_id))
    if rests:
        world.permit(vm_id)
    else:
        world.report(vm_id, ObservedPower.RUNNING)
    assert world.permit(new_id) == 1

    assert world.vm(vm_id).status.has_run is True
    assert world.vm(new_id).status.has_run is False


def late_start(world: CoreWorld) -> str:
    """Return a VM whose generation 1 was reported over, and that is permitted as generation 2."""
    vm_id, _ = world.create("web-1")
    world.bind(vm_id)
    world.permit(vm_id)
    world.report(vm_id, ObservedPower.STOPPED)
    world.permit(vm_id)
    return vm_id


def test_a_start_that_was_carried_out_late_is_taken_up_again() -> None:
    world = CoreWorld()
    vm_id = late_start(world)

    world.report(vm_id, ObservedPower.RUNNING, generation=1, permit_used=True, highest_used=2)

    status = world.vm(vm_id).status
    assert status.attempt is not None
    assert (status.attempt.generation, status.attempt.state) == (1, AttemptState.RUNNING)
    assert status.generation == 2, "what was given out is never given out again"
    told = desired_of(world.state.vms[vm_id], world.node(), Term(1, 1), str)
    assert told is not None
    assert told.generation == 1
    world.report(vm_id, ObservedPower.CRASHED, generation=1, permit_used=True, highest_used=2)
    assert world.permit(vm_id) == 3


@pytest.mark.parametrize(
    ("power", "highest_used"), [(ObservedPower.RUNNING, 1), (ObservedPower.STOPPED, 2)]
)
def test_a_later_permit_that_may_still_be_used_is_not_given_up(
    power: ObservedPower, highest_used: int
) -> None:
    world = CoreWorld()
    vm_id = late_start(world)

    world.report(vm_id, power, generation=1, permit_used=True, highest_used=highest_used)

    attempt = world.vm(vm_id).status.attempt
    assert attempt is not None
    assert (attempt.generation, attempt.state) == (2, AttemptState.PERMITTED)


def test_the_same_report_twice_writes_once() -> None:
    world = CoreWorld()
    vm_id = world.running()
    before = (world.vm(vm_id), world.state.last_seq)

    world.report(vm_id, ObservedPower.RUNNING, revision=77)

    assert (world.vm(vm_id), world.state.last_seq) == before


def test_an_attempt_that_ended_may_be_seen_running_after_all() -> None:
    world = CoreWorld()
    vm_id = world.running()
    world.report(vm_id, ObservedPower.FAILED)
    world.report(vm_id, ObservedPower.RUNNING)

    assert permit_refused(world, vm_id)
    assert vm_phase(world.vm(vm_id)) is VmPhase.RUNNING


def test_a_guest_that_powers_itself_off_stays_off() -> None:
    world = CoreWorld()
    vm_id = world.running()
    world.report(vm_id, ObservedPower.SHUT_OFF)

    assert world.vm(vm_id).spec.power is Power.STOPPED
    assert vm_phase(world.vm(vm_id)) is VmPhase.STOPPED
    assert world.state.vm_ids_to_start() == []


def test_a_create_whose_guest_ran_and_left_before_anyone_looked_succeeds() -> None:
    world = CoreWorld()
    vm_id, create = world.create()
    world.bind(vm_id)
    world.permit(vm_id)
    world.report(vm_id, ObservedPower.SHUT_OFF)

    assert world.ended(create).state is OperationState.SUCCEEDED


def delay_s(world: CoreWorld, vm_id: str) -> float:
    not_before = world.vm(vm_id).status.not_before
    assert not_before is not None
    return round((not_before - world.clock.at).total_seconds())


def test_crashes_hold_the_next_attempt_back_longer_and_longer() -> None:
    world = CoreWorld()
    vm_id = world.running()
    delays = []
    for _ in range(12):
        world.report(vm_id, ObservedPower.CRASHED)
        delays.append(delay_s(world, vm_id))
        world.permit(vm_id)

    assert delays[:4] == [1, 2, 4, 8]
    assert delays[-1] == RESTART_CAP.total_seconds()


def test_a_guest_that_ran_long_begins_a_new_row_of_back_off() -> None:
    world = CoreWorld()
    vm_id = world.running()
    for _ in range(4):
        world.report(vm_id, ObservedPower.CRASHED)
        world.permit(vm_id)
    world.report(vm_id, ObservedPower.RUNNING)
    world.age(minutes=6)
    world.report(vm_id, ObservedPower.CRASHED)

    assert world.vm(vm_id).status.crashes == 1
    assert delay_s(world, vm_id) == 1


def test_without_restart_a_crash_is_the_end_and_a_start_begins_anew() -> None:
    world = CoreWorld()
    vm_id = world.running(ha=HaSpec(restart=False))
    world.report(vm_id, ObservedPower.CRASHED)
    assert vm_phase(world.vm(vm_id)) is VmPhase.STOPPED

    start = world.act(vm_id, VmAction.START)
    assert world.vm(vm_id).status.crashes == 0
    world.permit(vm_id)
    world.report(vm_id, ObservedPower.FAILED, fault=a_fault())

    ended = world.ended(start)
    assert (ended.state, ended.error) == (OperationState.FAILED, a_fault())


def a_fault() -> Problem:
    return problem("hypervisor", "no such kernel")


def test_starts_that_fail_in_a_row_fail_the_operation_and_not_the_vm() -> None:
    world = CoreWorld()
    vm_id, create = world.create()
    world.bind(vm_id)
    for _ in range(3):
        assert create in world.state.operations
        world.permit(vm_id)
        world.report(vm_id, ObservedPower.FAILED, fault=a_fault())

    ended = world.ended(create)
    assert (ended.state, ended.error) == (OperationState.FAILED, a_fault())
    assert world.state.vm_ids_to_start() == [vm_id]


def test_a_stop_that_was_asked_for_is_no_crash() -> None:
    world = CoreWorld()
    vm_id = world.running()
    world.act(vm_id, VmAction.STOP)
    world.report(vm_id, ObservedPower.STOPPED)

    assert world.vm(vm_id).status.crashes == 0
    assert "vm.crashed" not in world.events()


def test_a_new_boot_ends_attempts_and_the_same_boot_does_not() -> None:
    world = CoreWorld()
    vm_id = world.running()
    end = EndAttempt(vm_id=vm_id, by=LEADER)
    assert isinstance(world.refused(end), StateConflict)

    world.join("n1", boot_id="boot-2")
    world.apply(end)
    world.apply(end)

    assert world.events().count("vm.lost_with_node") == 1
    assert world.vm(vm_id).status.power_seen is ObservedPower.STOPPED
    assert world.permit(vm_id) == 2
    attempt = world.vm(vm_id).status.attempt
    assert attempt is not None
    assert attempt.boot_id == "boot-2"


@pytest.mark.parametrize("power", [ObservedPower.CRASHED, ObservedPower.STOPPED])
def test_what_a_node_says_in_a_new_boot_is_no_crash(power: ObservedPower) -> None:
    world = CoreWorld()
    vm_id = world.running()
    world.join("n1", boot_id="boot-2")

    world.report(vm_id, power)
    assert world.events().count("vm.lost_with_node") == 1
    assert "vm.crashed" not in world.events()
    vm = world.vm(vm_id)
    assert (vm.status.crashes, vm.spec.power) == (0, Power.RUNNING)
    world.apply(EndAttempt(vm_id=vm_id, by=LEADER))
    assert world.events().count("vm.lost_with_node") == 1
    assert world.permit(vm_id) == 2


def test_why_a_vm_waits_is_written_once_and_forgotten_when_it_is_placed() -> None:
    world = CoreWorld()
    vm_id, _ = world.create()
    note = NotePlacement(vm_id=vm_id, message="no node fits")
    world.apply(note)
    first = condition(world.vm(vm_id), PLACED)
    revision = world.state.vms[vm_id].revision
    world.apply(note)
    assert world.state.vms[vm_id].revision == revision
    world.apply(NotePlacement(vm_id=vm_id, message="still none"))
    second = condition(world.vm(vm_id), PLACED)
    assert first is not None
    assert second is not None
    assert (first.status, second.since) == (False, first.since)

    world.bind(vm_id)
    placed = condition(world.vm(vm_id), PLACED)
    assert placed is not None
    assert placed.status
    assert len(world.vm(vm_id).status.conditions) == 1
