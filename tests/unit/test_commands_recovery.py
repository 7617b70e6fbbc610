"""A restored VM: left alone until nodes have told, then where its guest is, or wanted by nobody."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.commands.attempts import BindVm, EndAttempt, ObserveVm, PermitStart
from controlplane.commands.draft import Author
from controlplane.commands.migrations import RequestMigration
from controlplane.commands.recovery import DeclareGone, EndRecovery, NoteTold
from controlplane.commands.vm_patch import ChangeVm, VmPatch
from controlplane.commands.vms import DeleteVm
from controlplane.scheduler.snapshot import loads_of
from controlplane.sessions.desired import desired_of
from shared.errors import StateConflict
from shared.model import (
    AttemptState,
    AuditRecord,
    NodeState,
    ObservedPower,
    Power,
    Term,
    Vm,
    VmPhase,
    condition,
)
from shared.moves import EndState, Leftover, MigrationClaim, MigrationStage
from shared.protocol import Intent, VmReport
from shared.states import VmAction, vm_phase
from tests.unit.core_world import LEADER, USER, no_check
from tests.unit.restored_world import DOWN, EPOCH, FLOOR, HELD, RUNNING, RestoredWorld


def restored() -> tuple[RestoredWorld, str]:
    """Return a world in which ``web-1`` ran on n1 as generation 1 when it was backed up."""
    world = RestoredWorld()
    vm_id = world.running()
    world.restore()
    return world, vm_id


def what_is_told(world: RestoredWorld, vm_id: str, node_id: str) -> Intent | None:
    stored, node = world.state.vms[vm_id], world.state.nodes[node_id].record
    told = desired_of(stored, node, Term(EPOCH, 1), lambda node_id: node_id)
    return None if told is None else told.intent


def doubt(vm: Vm) -> str | None:
    """Return what is not known of a VM."""
    found = condition(vm, "Recovered")
    return None if found is None else found.reason


# --- until the nodes have told --------------------------------------------------------------------


def test_nothing_happens_to_a_vm_whose_nodes_have_not_told() -> None:
    world, vm_id = restored()
    before = world.state.vms[vm_id]
    report = VmReport(vm_id=vm_id, generation=1, power=ObservedPower.STOPPED, permit_used=True)
    world.apply(ObserveVm(node_id=world.node_id, report=report, by=Author("agent:n1")))
    assert what_is_told(world, vm_id, world.node_id) is None
    assert vm_phase(before.record) is VmPhase.UNKNOWN
    for action in VmAction:
        with pytest.raises(StateConflict, match="restored from a backup"):
            world.act(vm_id, action)
    for command in (
        DeleteVm(vm_id=vm_id, by=USER),
        PermitStart(vm_id=vm_id, by=LEADER, check=no_check),
        EndAttempt(vm_id=vm_id, by=LEADER),
        RequestMigration(
            vm_id=vm_id, destination=None, steps=("admit",), no_return=frozenset(), by=USER
        ),
    ):
        assert isinstance(world.refused(command), StateConflict)
    assert world.state.vms[vm_id] is before
    assert world.state.vm_ids_to_start() == world.state.vm_ids_to_place() == []
    world.join("n1", boot_id="boot-2")
    assert world.state.lost_attempts() == []
    assert world.state.unproven_vm_ids() == [vm_id]


def test_labels_may_change_meanwhile() -> None:
    world, vm_id = restored()
    world.apply(ChangeVm(vm_id=vm_id, patch=VmPatch(labels={"tier": "gold"}), by=USER))
    assert world.vm(vm_id).labels == {"tier": "gold"}


def test_a_new_vm_waits_for_the_end_of_the_recovery() -> None:
    world, _ = restored()
    new, _ = world.create("web-2")
    bind = BindVm(vm_id=new, node_id=world.node_id, by=LEADER, check=no_check)
    assert "restored from a backup" in str(world.refused(bind))
    end(world)
    world.apply(bind)
    world.apply(PermitStart(vm_id=new, by=LEADER, check=no_check))


def end(world: RestoredWorld) -> None:
    for node_id in (world.node_id, world.two):
        world.apply(NoteTold(node_id=node_id, unrecorded=(), by=LEADER))
    world.apply(EndRecovery(by=LEADER))


def test_every_node_that_may_have_it_keeps_room_for_it() -> None:
    world = RestoredWorld()
    vm_id = world.running()
    vm = world.vm(vm_id)
    claim = MigrationClaim(
        operation="op-1",
        stage=MigrationStage.TRANSFER,
        source=world.node_id,
        source_generation=1,
        destination=world.two,
        generation=2,
    )
    world.put(replace(vm, status=replace(vm.status, migration=claim)))
    world.restore()
    vm = world.vm(vm_id)
    world.put(replace(vm, status=replace(vm.status, migration=None)))
    loads = loads_of(world.vm(vm_id))
    assert {node: load.vcpus for node, load in loads.items()} == {world.node_id: 1, world.two: 1}
    assert set(world.state.vm_ids_on(world.two)) == {vm_id}


# --- running guests win ---------------------------------------------------------------------------


def test_a_guest_that_runs_where_the_backup_has_it_goes_on() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id, world.seen("n1", 1, RUNNING))
    assert vm.status.attempt is not None
    assert (vm.status.attempt.generation, vm.status.attempt.state) == (1, AttemptState.RUNNING)
    assert vm.status.unproven is None
    assert vm_phase(vm) is VmPhase.RUNNING
    assert what_is_told(world, vm_id, world.node_id) is Intent.RUN
    assert "vm.adopted" not in world.events()


def test_a_guest_that_has_moved_since_is_adopted_where_it_runs() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id, world.seen("n2", 4, RUNNING), world.seen("n1", 1, DOWN))
    assert (vm.status.node, vm.status.attempt and vm.status.attempt.generation) == (world.two, 4)
    assert vm.status.generation == FLOOR
    assert vm.status.has_run
    assert vm.status.logs_on == (world.node_id,)
    assert what_is_told(world, vm_id, world.node_id) is None
    assert what_is_told(world, vm_id, world.two) is Intent.RUN
    adopted = list(world.state.history.values())[-1]
    assert getattr(adopted, "kind", "") == "vm.adopted"
    assert getattr(adopted, "data", {})["left_alone_on"] == ["n1 (generation 1)"]


def test_a_guest_that_was_started_since_is_not_stopped() -> None:
    world = RestoredWorld()
    vm_id = world.running()
    world.act(vm_id, VmAction.STOP)
    world.report(vm_id, ObservedPower.STOPPED)
    world.restore()
    vm = world.settle(vm_id, world.seen("n1", 2, RUNNING))
    assert vm.spec.power is Power.RUNNING
    assert what_is_told(world, vm_id, world.node_id) is Intent.RUN


def test_a_paused_guest_is_never_ended_and_goes_on_if_the_backup_wants_it_to() -> None:
    for wanted, found in ((Power.STOPPED, Power.PAUSED), (Power.RUNNING, Power.RUNNING)):
        world, vm_id = restored()
        vm = world.vm(vm_id)
        world.put(replace(vm, spec=replace(vm.spec, power=wanted)))
        vm = world.settle(vm_id, world.seen("n1", 1, HELD))
        assert vm.spec.power is found
        assert vm.status.power_seen is ObservedPower.PAUSED


def test_what_was_to_be_swept_is_not_any_more() -> None:
    world = RestoredWorld()
    vm_id = world.running()
    vm = world.vm(vm_id)
    left = Leftover(node=world.two, generation=1, disks=("root",))
    world.put(replace(vm, status=replace(vm.status, leftovers=(left,))))
    world.restore()
    vm = world.settle(vm_id, world.seen("n2", 3, RUNNING))
    assert vm.status.leftovers == ()
    assert what_is_told(world, vm_id, world.two) is Intent.RUN


def test_what_is_being_deleted_is_deleted_where_it_is() -> None:
    world = RestoredWorld()
    vm_id = world.running()
    world.apply(DeleteVm(vm_id=vm_id, by=USER))
    world.restore()
    world.settle(vm_id, world.seen("n1", 1, RUNNING))
    assert what_is_told(world, vm_id, world.node_id) is Intent.REMOVE


# --- what rests, and what is nowhere --------------------------------------------------------------


def test_what_rests_is_started_again_under_a_generation_that_was_never_used() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id, world.seen("n1", 7, DOWN))
    assert vm.status.attempt is not None
    assert (vm.status.attempt.generation, vm.status.attempt.state) == (7, AttemptState.ENDED)
    assert vm.spec.power is Power.RUNNING
    assert "restored" in str(world.refused(PermitStart(vm_id=vm_id, by=LEADER, check=no_check)))
    end(world)
    assert world.permit(vm_id) == FLOOR + 1


def test_what_rests_elsewhere_is_started_there() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id, world.seen("n2", 4, DOWN), world.seen("n1", 1, DOWN))
    assert vm.status.node == world.two


def test_a_guest_that_switched_itself_off_stays_off() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id, world.seen("n1", 1, DOWN, power=ObservedPower.SHUT_OFF))
    assert (vm.spec.power, doubt(vm)) == (Power.STOPPED, None)
    assert vm_phase(vm) is VmPhase.STOPPED


def test_one_whose_move_had_begun_is_not_started_by_itself() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id, world.seen("n1", 1, DOWN, departing=True))
    assert (vm.spec.power, doubt(vm)) == (Power.STOPPED, "moved_away")


def test_what_no_node_has_is_started_by_nobody_but_its_user() -> None:
    world, vm_id = restored()
    vm = world.settle(vm_id)
    assert (vm.spec.power, vm.status.node) == (Power.STOPPED, world.node_id)
    assert doubt(vm) == "not_found"
    assert "vm.not_found" in world.events()
    end(world)
    assert world.state.vm_ids_to_start() == []
    world.act(vm_id, VmAction.START)
    assert world.permit(vm_id) == FLOOR + 1
    assert doubt(world.vm(vm_id)) is None


def test_one_that_was_never_placed_waits_for_its_user_too() -> None:
    world = RestoredWorld()
    vm_id, _ = world.create()
    idle, _ = world.create("web-2", power=Power.STOPPED)
    world.restore()
    vm = world.settle(vm_id)
    assert (vm.spec.power, vm.status.node) == (Power.STOPPED, None)
    assert doubt(vm) == "not_found"
    assert doubt(world.settle(idle)) is None


# --- what cannot be decided -----------------------------------------------------------------------


def test_two_that_run_are_both_left_alone_until_one_has_ended() -> None:
    world, vm_id = restored()
    both = (world.seen("n1", 1, RUNNING), world.seen("n2", 2, RUNNING))
    vm = world.settle(vm_id, *both)
    assert vm.status.unproven is not None
    assert "twice" in vm.status.unproven.why
    assert doubt(vm) == "unproven"
    assert set(vm.status.unproven.nodes) == {world.node_id, world.two}
    for node_id in (world.node_id, world.two):
        assert what_is_told(world, vm_id, node_id) is None
    told = world.events()
    assert told.count("vm.unproven") == 1
    world.settle(vm_id, *both)
    assert world.events() == told

    vm = world.settle(vm_id, world.seen("n1", 1, DOWN), world.seen("n2", 2, RUNNING))
    assert vm.status.unproven is None
    assert doubt(vm) is None
    assert vm.status.node == world.two


def test_one_that_ran_on_a_node_that_is_silent_now_is_not_found_elsewhere() -> None:
    world, vm_id = restored()
    world.settle(vm_id, world.seen("n1", 1, RUNNING), world.seen("n2", 2, RUNNING))
    vm = world.settle(vm_id, world.seen("n1", 1, RUNNING), heard=(world.node_id,))
    assert vm.status.unproven is not None
    assert "n2" in vm.status.unproven.why


def test_what_a_node_told_before_it_booted_is_not_taken() -> None:
    world, vm_id = restored()
    early = world.settle_command(vm_id, world.seen("n1", 1, RUNNING, boot_id="boot-0"))
    assert isinstance(world.refused(early), StateConflict)


# --- nodes that are gone, or come late ------------------------------------------------------------


def gone(world: RestoredWorld, node_id: str) -> None:
    world.put(replace(world.node(node_id), state=NodeState.SILENT))
    world.apply(DeclareGone(node_id=node_id, by=USER))


def test_a_node_is_declared_gone_only_when_somebody_waits_for_it_and_it_is_silent() -> None:
    world = RestoredWorld()
    command = DeclareGone(node_id=world.two, by=USER)
    assert "nobody waits" in str(world.refused(command))
    world.restore()
    assert "is heard" in str(world.refused(command))
    gone(world, world.two)
    assert world.node(world.two).recovery.gone
    audit = [e.action for e in world.state.history.values() if isinstance(e, AuditRecord)]
    assert audit == ["node.declare_gone"]
    world.apply(command)
    assert world.events().count("node.declared_gone") == 1


def test_recovery_ends_once_every_node_has_told_or_is_gone() -> None:
    world, _ = restored()
    assert isinstance(world.refused(EndRecovery(by=LEADER)), StateConflict)
    gone(world, world.two)
    assert isinstance(world.refused(EndRecovery(by=LEADER)), StateConflict)
    world.apply(NoteTold(node_id=world.node_id, unrecorded=(), by=LEADER))
    world.apply(EndRecovery(by=LEADER))
    cluster = world.state.cluster()
    assert cluster is not None
    assert cluster.restored is not None
    assert not cluster.restored.recovering


def test_a_vm_of_a_node_that_is_gone_starts_nowhere_else() -> None:
    world, vm_id = restored()
    gone(world, world.node_id)
    vm = world.settle(vm_id, heard=(world.two,))
    assert vm.status.unproven is not None
    assert "n1" in vm.status.unproven.why
    assert vm.spec.power is Power.RUNNING
    moved = world.settle(vm_id, world.seen("n2", 3, RUNNING), heard=(world.two,))
    assert moved.status.node == world.two


def test_a_node_that_is_not_gone_after_all_has_to_tell_again() -> None:
    world, vm_id = restored()
    end(world)
    world.settle(vm_id, world.seen("n1", 1, RUNNING), world.seen("n2", 2, RUNNING))
    gone(world, world.two)
    world.join("n2")
    assert not world.node(world.two).recovery.gone
    assert world.node(world.two).recovery.told != EPOCH
    assert "node.came_back" in world.events()


def late(world: RestoredWorld, vm_id: str, end_state: EndState) -> None:
    world.apply(world.settle_command(vm_id, world.seen("n2", 5, end_state), heard=(world.two,)))


def test_a_guest_on_a_node_that_comes_late_is_no_reason_to_touch_another_that_runs() -> None:
    world, vm_id = restored()
    world.settle(vm_id, world.seen("n1", 1, RUNNING))
    end(world)
    late(world, vm_id, DOWN)
    assert world.vm(vm_id).status.unproven is None
    late(world, vm_id, RUNNING)
    unproven = world.vm(vm_id).status.unproven
    assert unproven is not None
    assert set(unproven.nodes) == {world.node_id, world.two}
    assert what_is_told(world, vm_id, world.node_id) is None
    assert what_is_told(world, vm_id, world.two) is None


def test_a_guest_on_a_node_that_comes_late_is_adopted_if_nothing_else_runs() -> None:
    world, vm_id = restored()
    world.settle(vm_id)
    end(world)
    late(world, vm_id, RUNNING)
    vm = world.vm(vm_id)
    assert (vm.status.node, vm.spec.power) == (world.two, Power.RUNNING)
    assert what_is_told(world, vm_id, world.two) is Intent.RUN


def test_vms_that_no_record_is_of_are_told_once_and_shown() -> None:
    world, _ = restored()
    for _ in range(2):
        world.apply(NoteTold(node_id=world.two, unrecorded=("vm-9", "vm-10"), by=LEADER))
    assert world.node(world.two).recovery.unrecorded == ("vm-9", "vm-10")
    assert world.events().count("node.unrecorded_vms") == 1
    world.apply(NoteTold(node_id=world.two, unrecorded=(), by=LEADER))
    assert world.node(world.two).recovery.unrecorded == ()


def test_a_report_to_a_leader_of_before_the_restore_counts_for_nothing() -> None:
    world, vm_id = restored()
    world.settle(vm_id, world.seen("n1", 1, RUNNING))
    for epoch, state in ((1, AttemptState.RUNNING), (EPOCH, AttemptState.ENDED)):
        report = VmReport(
            vm_id=vm_id, generation=1, power=ObservedPower.STOPPED, permit_used=True, epoch=epoch
        )
        world.apply(ObserveVm(node_id=world.node_id, report=report, by=Author("agent:n1")))
        attempt = world.vm(vm_id).status.attempt
        assert attempt is not None
        assert attempt.state is state
