"""A VM's claim, stage by stage: who may ask, what is given out once, and who owns the VM when."""

from __future__ import annotations

from itertools import product

import pytest
from msgspec.structs import replace

from controlplane.commands.attempts import BindVm, EndAttempt, ObserveVm, PermitStart
from controlplane.commands.draft import Author, Command, Draft
from controlplane.commands.migrations import (
    HearOfLeftover,
    MigrationLimits,
    admit,
    claim_destination,
    close_claim,
    drop_claim,
    no_slot,
    to_stage,
)
from controlplane.commands.sagas import FinishStep
from controlplane.commands.vms import ActOnVm, DeleteVm
from controlplane.sagas.migrate import MIGRATION
from shared.errors import NotFound, StateConflict, UpgradeUnfinished
from shared.model import (
    SCHEMA_LEVEL,
    AttemptState,
    Cluster,
    HaSpec,
    ObservedPower,
    OperationState,
    Power,
    Vm,
)
from shared.moves import Leftover, MigrationClaim, MigrationJournal, MigrationStage
from shared.protocol import VmReport
from shared.states import VmAction
from tests.unit.core_world import BORN, LEADER, USER, no_check
from tests.unit.move_world import MoveWorld

FULL = MigrationLimits(cluster=3, out_of_node=2, into_node=2)


def test_a_request_opens_the_saga_and_the_claim_together() -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving("admit")

    operation, claim = world.operation(operation_id), world.claim(vm_id)
    assert (operation.state, operation.phase) == (OperationState.RUNNING, "admit")
    assert operation.saga == MigrationJournal(source=world.node_id)
    assert claim == MigrationClaim(
        operation=operation_id,
        stage=MigrationStage.REQUESTED,
        source=world.node_id,
        source_generation=1,
    )
    assert "vm.migrate_requested" in world.events()


@pytest.mark.parametrize("state", ["pending", "starting", "stopped", "crashed", "deleting", "old"])
def test_only_what_runs_is_moved(state: str) -> None:
    world = MoveWorld()
    if state in ("pending", "starting"):
        vm_id, _ = world.create(ha=HaSpec(restart=False))
        if state == "starting":
            world.bind(vm_id)
            world.permit(vm_id)
    else:
        vm_id = world.running()
    if state == "stopped":
        world.act(vm_id, VmAction.STOP)
    elif state == "crashed":
        world.report(vm_id, ObservedPower.CRASHED)
    elif state == "deleting":
        world.apply(DeleteVm(vm_id=vm_id, by=USER))
    elif state == "old":
        old = Cluster(id="c", cell="abc123", created_at=BORN, schema_level=SCHEMA_LEVEL - 1)
        world.state.put(old, 99)

    expected = UpgradeUnfinished if state == "old" else StateConflict
    assert isinstance(world.refused(world.request(vm_id)), expected)


def test_a_paused_vm_may_move() -> None:
    world = MoveWorld()
    vm_id = world.running()
    world.act(vm_id, VmAction.PAUSE)
    world.report(vm_id, ObservedPower.PAUSED)

    world.migrate(vm_id)
    assert world.claim(vm_id).stage is MigrationStage.REQUESTED


@pytest.mark.parametrize(
    ("destination", "error"), [("own", StateConflict), ("node-nowhere", NotFound)]
)
def test_a_destination_is_another_node_that_there_is(
    destination: str, error: type[Exception]
) -> None:
    world = MoveWorld()
    wanted = world.node_id if destination == "own" else destination

    assert isinstance(world.refused(world.request(world.running(), wanted)), error)


@pytest.mark.parametrize("step", MIGRATION.names)
def test_a_claim_shuts_every_other_request_out(step: str) -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving(step)
    commands: list[Command[object]] = [
        world.request(vm_id),
        DeleteVm(vm_id=vm_id, by=USER),
        *(ActOnVm(vm_id=vm_id, action=action, by=USER) for action in VmAction),
    ]

    for command in commands:
        assert operation_id in str(world.refused(command)), command


def test_a_generation_is_given_out_once_and_counts_on_both_nodes() -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving("claim")
    assert not world.state.vm_ids_on(world.other_id)
    world.finish(operation_id, "claim", claim_destination(no_check, ("root",)))

    claim = world.claim(vm_id)
    assert (claim.generation, claim.boot_id, claim.copied) == (2, "boot-1", ("root",))
    assert world.vm(vm_id).status.generation == 2
    assert world.vm(vm_id).status.attempt.generation == 1  # type: ignore[union-attr]
    assert world.state.vm_ids_on(world.node_id) == world.state.vm_ids_on(world.other_id)
    again = FinishStep(
        operation_id=operation_id, step="claim", effect=claim_destination(no_check, ())
    )
    assert isinstance(world.refused(again), StateConflict)


def test_no_generation_is_given_out_without_room() -> None:
    def no_room(draft: Draft, vm: Vm, node_id: str) -> None:
        raise StateConflict("no room")

    world = MoveWorld()
    vm_id, operation_id = world.moving("claim")
    effect = claim_destination(no_room, ())
    refused = world.refused(FinishStep(operation_id=operation_id, step="claim", effect=effect))

    assert str(refused) == "no room"
    assert world.vm(vm_id).status.generation == 1


def test_the_switch_moves_everything_in_one_transaction() -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving("switch")
    before = world.state.revision
    world.finish(operation_id, "switch", world.effects()["switch"])

    status = world.vm(vm_id).status
    assert world.state.revision == before + 1
    assert status.node == world.other_id
    assert status.attempt is not None
    assert (status.attempt.node, status.attempt.generation) == (world.other_id, 2)
    assert (status.attempt.boot_id, status.attempt.state) == ("boot-1", AttemptState.RUNNING)
    assert world.claim(vm_id).stage is MigrationStage.FINALIZE
    assert world.events()[-1] == "vm.migrated"


def test_a_move_that_is_undone_leaves_the_vm_where_it_was() -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving("transfer")
    before = world.vm(vm_id)
    world.fail(operation_id, "transfer")
    world.undo(operation_id, "transfer", to_stage(MigrationStage.CLEAN))
    world.undo(operation_id, "prepare")
    world.undo(operation_id, "admit", drop_claim)

    after = world.vm(vm_id)
    status = replace(before.status, migration=None)
    assert after == replace(before, status=status, updated_at=after.updated_at)
    assert after.status.generation == 2, "what was given out is never used again"
    assert "vm.migration_undone" in world.events()


def test_a_claim_is_dropped_by_its_own_migration_only() -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving("prepare")
    other = replace(world.operation(operation_id), id="op-other")
    draft = Draft(world.state, world.ids, world.clock.now())

    assert drop_claim(draft, other) == other
    assert draft.vm(vm_id).status.migration is not None
    with pytest.raises(StateConflict):
        to_stage(MigrationStage.TRANSFER)(draft, other)


CLAIM = MigrationClaim(
    operation="op", stage=MigrationStage.REQUESTED, source="a", source_generation=1
)
TO_B, TO_C = replace(CLAIM, destination="b"), replace(CLAIM, destination="c")


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ((), ""),
        ((CLAIM,) * 9, ""),  # those that wait themselves take no slot
        ((TO_C,), ""),
        ((TO_C,) * 2, "leaving"),
        ((replace(TO_B, source="x"),) * 2, "coming"),
        ((replace(TO_C, source="x"),) * 3, "in the cluster"),
        # Nobody knows when one ends whose node is away.
        ((replace(TO_C, destination="away"),) * 9, ""),
        ((replace(TO_B, source="away"),) * 9, ""),
    ],
)
def test_slots_are_those_of_both_nodes_and_of_the_cluster(
    claims: tuple[MigrationClaim, ...], says: str
) -> None:
    full = no_slot(claims, "a", "b", FULL, lambda node_id: node_id != "away")

    assert says in full
    assert bool(full) is bool(says)


def test_a_slot_is_booked_on_the_draft() -> None:
    world = MoveWorld()
    limits = MigrationLimits(cluster=1)
    _, first = world.moving("admit", "web-1")
    _, second = world.moving("admit", "web-2")
    effect = admit(world.other_id, limits)
    world.finish(first, "admit", effect)

    refused = world.refused(FinishStep(operation_id=second, step="admit", effect=effect))
    assert "1 migrations are under way" in str(refused)


def seen(node_id: str, vm_id: str, power: ObservedPower, generation: int) -> ObserveVm:
    report = VmReport(
        vm_id=vm_id,
        generation=generation,
        power=power,
        permit_used=True,
        highest_used=generation,
        removed=power is ObservedPower.ABSENT,
    )
    return ObserveVm(node_id=node_id, report=report, by=Author("agent"))


@pytest.mark.parametrize(
    ("step", "power"),
    list(product(("prepare", "transfer", "switch"), (ObservedPower.ABSENT, ObservedPower.CRASHED))),
)
def test_no_report_of_one_end_decides_while_it_moves(step: str, power: ObservedPower) -> None:
    world = MoveWorld()
    vm_id, _ = world.moving(step)
    before = world.vm(vm_id)
    for node_id, generation in product((world.node_id, world.other_id), (1, 2)):
        world.apply(seen(node_id, vm_id, power, generation))

    assert world.vm(vm_id) == before


def test_after_the_switch_only_the_new_owner_is_heard() -> None:
    world = MoveWorld()
    vm_id, _ = world.moving("finalize")
    before = world.vm(vm_id)
    world.apply(seen(world.node_id, vm_id, ObservedPower.ABSENT, 1))
    assert world.vm(vm_id) == before
    world.apply(seen(world.other_id, vm_id, ObservedPower.CRASHED, 2))

    attempt = world.vm(vm_id).status.attempt
    assert attempt is not None
    assert attempt.state is AttemptState.ENDED


@pytest.mark.parametrize("step", ["prepare", "transfer", "switch"])
def test_a_boot_of_the_source_proves_nothing_while_it_moves(step: str) -> None:
    world = MoveWorld()
    vm_id, _ = world.moving(step)
    world.join("n1", boot_id="boot-2")

    assert isinstance(world.refused(EndAttempt(vm_id=vm_id, by=LEADER)), StateConflict)


def test_a_boot_of_the_new_owner_ends_its_attempt() -> None:
    world = MoveWorld()
    vm_id, _ = world.moving("finalize")
    world.join("n2", boot_id="boot-2")
    world.apply(EndAttempt(vm_id=vm_id, by=LEADER))

    assert world.vm(vm_id).status.attempt.state is AttemptState.ENDED  # type: ignore[union-attr]


def test_a_leftover_blocks_starts_until_its_node_has_swept_it() -> None:
    world = MoveWorld()
    vm_id = world.left_over()
    assert world.vm(vm_id).status.leftovers == (
        Leftover(node=world.node_id, generation=1, disks=("root",)),
    )
    world.apply(seen(world.other_id, vm_id, ObservedPower.CRASHED, 2))
    start = PermitStart(vm_id=vm_id, by=LEADER, check=no_check)
    assert isinstance(world.refused(start), StateConflict)
    assert vm_id not in world.state.vm_ids_to_start()

    for node_id, generation in ((world.other_id, 1), (world.node_id, 2)):
        world.apply(HearOfLeftover(vm_id=vm_id, node_id=node_id, generation=generation, gone=True))
        assert world.vm(vm_id).status.leftovers, "it is another's"
    world.apply(HearOfLeftover(vm_id=vm_id, node_id=world.node_id, generation=1, gone=True))
    assert world.vm(vm_id).status.leftovers == ()
    assert vm_id in world.state.vm_ids_to_start()
    assert world.apply(start) == 3


def test_a_leftover_keeps_an_unbound_vm_from_being_bound() -> None:
    world = MoveWorld()
    vm_id = world.left_over()
    vm = world.vm(vm_id)
    status = replace(vm.status, node=None, attempt=None)
    world.state.put(replace(vm, status=status), world.state.revision + 1)
    bind = BindVm(vm_id=vm_id, node_id=world.other_id, by=LEADER, check=no_check)

    assert isinstance(world.refused(bind), StateConflict)
    assert vm_id not in world.state.vm_ids_to_place()


def test_a_deleted_vm_is_gone_when_its_last_leftover_is() -> None:
    """Also the log that its former node keeps of it."""
    world = MoveWorld()
    vm_id = world.left_over()
    delete = world.apply(DeleteVm(vm_id=vm_id, by=USER))
    world.apply(seen(world.other_id, vm_id, ObservedPower.ABSENT, 2))
    assert world.vm(vm_id).status.node is None
    for left in world.vm(vm_id).status.leftovers:
        assert vm_id in world.state.vms
        sweep = HearOfLeftover(
            vm_id=vm_id, node_id=left.node, generation=left.generation, gone=True
        )
        world.apply(sweep)

    assert vm_id not in world.state.vms
    assert world.ended(delete).state is OperationState.SUCCEEDED


def test_a_source_that_was_swept_leaves_no_leftover() -> None:
    world = MoveWorld()
    vm_id, operation_id = world.moving("finalize")
    world.finish(operation_id, "finalize", close_claim(None, swept=True))

    status = world.vm(vm_id).status
    assert (status.migration, status.leftovers) == (None, ())
    assert world.ended(operation_id).state is OperationState.SUCCEEDED
    assert not world.state.vm_ids_on(world.node_id)
    assert world.vm(vm_id).spec.power is Power.RUNNING
