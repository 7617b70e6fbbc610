"""What a migration changes in a VM's record: its claim, stage by stage, and who owns the VM.

A claim is the VM's one open migration and shuts every other request out. Its generation is given
out here, for one attempt on one node in one boot of it. Ownership moves in one transaction. The
functions below ``RequestMigration`` are effects of the steps in ``controlplane/sagas/migrate.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from controlplane.commands.operations import put_vm, vm_gone_from_node
from controlplane.commands.sagas import Effect, open_saga, saga_steps
from controlplane.commands.upgrade import MOVES_LEVEL, require_level
from shared.errors import StateConflict
from shared.model import (
    Attempt,
    AttemptState,
    NodeState,
    ObservedPower,
    Operation,
    OperationState,
    Vm,
    VmPhase,
    VmStatus,
    attempt_generation,
)
from shared.moves import (
    Leftover,
    MigrationClaim,
    MigrationFigures,
    MigrationJournal,
    MigrationStage,
)
from shared.states import vm_phase

MIGRATE = "vm.migrate"
MOVABLE_PHASES = frozenset({VmPhase.RUNNING, VmPhase.PAUSED})
# Long enough for the longest transfer that its own limits allow, with a queue before it; what it
# ends is a saga that waits for a node that never comes back.
MIGRATION_DEADLINE = timedelta(hours=12)

# The stages in which nothing is moved (any more).
MOTIONLESS = frozenset({MigrationStage.LOOK, MigrationStage.CLEAN, MigrationStage.RESUME})
# A VM that has been on more nodes than this has no log of the first ones any more.
LOGS_MAX = 16

NodeCheck = Callable[[Draft, Vm, str], None]


class MigrationLimits(Struct, frozen=True, kw_only=True):
    """How many migrations run at once. Each takes a node's link and a core at both of its ends;
    more of them make none of them faster, and the guests that write most converge last.
    """

    cluster: int = 5
    out_of_node: int = 2
    into_node: int = 2


class RequestMigration(Struct, frozen=True, kw_only=True, tag="request_migration"):
    """Returns the id of the operation. Raises NotFound, StateConflict, UpgradeUnfinished."""

    vm_id: str
    destination: str | None
    steps: tuple[str, ...]
    no_return: frozenset[str]
    by: Author
    parent: str | None = None

    def decide(self, draft: Draft) -> str:
        vm = draft.vm(self.vm_id)
        check_movable(draft, vm)
        assert vm.status.node is not None, "what runs is bound"
        if self.destination is not None and draft.node(self.destination).id == vm.status.node:
            raise StateConflict(
                f"{vm.name!r} runs on {draft.node(self.destination).name!r} already"
            )
        operation = Operation(
            id=draft.new_id("op"),
            kind=MIGRATE,
            target=vm.id,
            tenant=vm.tenant,
            state=OperationState.RUNNING,
            steps=saga_steps(self.steps, self.no_return),
            by=self.by.principal,
            created_at=draft.now,
            updated_at=draft.now,
            deadline_at=draft.now + MIGRATION_DEADLINE,
            saga=MigrationJournal(source=vm.status.node, requested=self.destination),
            parent=self.parent,
        )
        open_saga(draft, operation)
        claim = MigrationClaim(
            operation=operation.id,
            stage=MigrationStage.REQUESTED,
            source=vm.status.node,
            source_generation=attempt_generation(vm),
        )
        draft.audit(MIGRATE, vm.id, self.by, vm.tenant)
        _event(draft, "vm.migrate_requested", vm, self.by.principal, operation=operation.id)
        _put_claim(draft, vm, claim)
        return operation.id


def check_movable(draft: Draft, vm: Vm) -> None:
    """Raise StateConflict, UpgradeUnfinished unless a migration of ``vm`` may be asked for."""
    require_level(draft, MOVES_LEVEL, "live migration")
    claim = vm.status.migration
    if claim is not None:
        raise StateConflict(f"{vm.name!r} is being migrated already, by {claim.operation}")
    attempt = vm.status.attempt
    phase = vm_phase(vm)
    if phase not in MOVABLE_PHASES or attempt is None or attempt.node != vm.status.node:
        raise StateConflict(
            f"cannot migrate {vm.name!r} while it is {phase.value}: it must be Running or Paused"
        )


def admit(destination: str, limits: MigrationLimits) -> Effect:
    """Book the slots of both nodes. Raises StateConflict while there is none."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        vm, claim = claimed(draft, operation)
        others = [each for each in draft.claims() if each.operation != operation.id]
        full = no_slot(
            others,
            claim.source,
            destination,
            limits,
            lambda node_id: draft.node(node_id).state is NodeState.READY,
        )
        if full:
            raise StateConflict(full)
        _put_claim(draft, vm, replace(claim, destination=destination))
        return _journal(operation, destination=destination)

    return effect


def no_slot(
    claims: Iterable[MigrationClaim],
    source: str,
    destination: str,
    limits: MigrationLimits,
    answers: Callable[[str], bool],
) -> str:
    """Return why a migration has to wait for others to end; empty when it has not.

    One whose node does not answer, or that is undone, may stay open for days, and moves nothing
    meanwhile: it holds no slot.
    """
    admitted = [
        c
        for c in claims
        if c.destination is not None
        and c.stage not in MOTIONLESS
        and answers(c.source)
        and answers(c.destination)
    ]
    if len(admitted) >= limits.cluster:
        return f"{len(admitted)} migrations are under way in the cluster (limit {limits.cluster})"
    out = sum(c.source == source for c in admitted)
    if out >= limits.out_of_node:
        return f"{out} VMs are leaving the source node (limit {limits.out_of_node})"
    into = sum(c.destination == destination for c in admitted)
    if into >= limits.into_node:
        return f"{into} VMs are coming to the destination (limit {limits.into_node})"
    return ""


def claim_destination(check: NodeCheck, copied: tuple[str, ...]) -> Effect:
    """Give out the destination's generation, and room there; ``copied`` are disks that move along.

    Raises StateConflict when there is no room any more.
    """

    def effect(draft: Draft, operation: Operation) -> Operation:
        vm, claim = claimed(draft, operation)
        assert claim.destination is not None, "a destination was chosen before"
        check(draft, vm, claim.destination)
        node = draft.node(claim.destination)
        generation = vm.status.generation + 1
        given = replace(
            claim,
            stage=MigrationStage.PREPARE,
            generation=generation,
            boot_id=node.boot_id,
            copied=copied,
        )
        status = replace(vm.status, generation=generation)
        _event(
            draft,
            "vm.migrating",
            vm,
            operation.by,
            operation=operation.id,
            source=claim.source,
            destination=claim.destination,
            generation=generation,
        )
        _put_claim(draft, replace(vm, status=status), given)
        return _journal(operation, generation=generation)

    return effect


def to_stage(stage: MigrationStage, *, unclean: bool = False) -> Effect:
    """Go on to a stage; ``unclean``: see ``MigrationClaim``."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        vm, claim = claimed(draft, operation)
        _put_claim(draft, vm, replace(claim, stage=stage, unclean=claim.unclean or unclean))
        return operation

    return effect


def switch(power_seen: ObservedPower) -> Effect:
    """Move the VM to its destination, in this one transaction; there it was seen in that power."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        return _switch(draft, operation, power_seen)

    return effect


def _switch(draft: Draft, operation: Operation, power_seen: ObservedPower) -> Operation:
    vm, claim = claimed(draft, operation)
    assert claim.destination is not None, "it was claimed"
    attempt = Attempt(
        generation=claim.generation,
        node=claim.destination,
        boot_id=claim.boot_id,
        state=AttemptState.RUNNING,
        permitted_at=draft.now,
    )
    status = replace(
        with_log_on(vm.status, claim.source, claim.destination),
        node=claim.destination,
        attempt=attempt,
        power_seen=power_seen,
        crashes=0,
        fault=None,
    )
    _event(
        draft,
        "vm.migrated",
        vm,
        operation.by,
        operation=operation.id,
        source=claim.source,
        destination=claim.destination,
        generation=claim.generation,
    )
    _put_claim(draft, replace(vm, status=status), replace(claim, stage=MigrationStage.FINALIZE))
    return operation


def close_claim(figures: MigrationFigures | None, *, swept: bool, empty: bool = False) -> Effect:
    """End the claim; a source that is not swept is remembered: ``empty``, it has no guest."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        vm, claim = claimed(draft, operation)
        leftovers = vm.status.leftovers
        if not swept:
            left = Leftover(
                node=claim.source,
                generation=claim.source_generation,
                disks=claim.copied,
                empty=empty,
            )
            leftovers = (*leftovers, left)
            _event(draft, "vm.leftover", vm, operation.by, node=claim.source)
        status = replace(vm.status, migration=None, leftovers=leftovers)
        put_vm(draft, replace(vm, status=status))
        return _journal(operation, figures=figures)

    return effect


def drop_claim(draft: Draft, operation: Operation) -> Operation:
    """End the claim of a migration that did not happen; the VM is where it was.

    A destination that has not removed all that was made there is remembered.
    """
    vm = draft.find(Vm, operation.target)
    claim = None if vm is None else vm.status.migration
    if vm is None or claim is None or claim.operation != operation.id:
        return operation
    if claim.generation:
        detail = "" if operation.error is None else operation.error.detail
        _event(
            draft,
            "vm.migration_undone",
            vm,
            operation.by,
            operation=operation.id,
            destination=claim.destination,
            detail=detail,
        )
    leftovers = vm.status.leftovers
    if claim.unclean and claim.destination is not None:
        left = Leftover(
            node=claim.destination,
            generation=claim.generation,
            disks=claim.copied,
            empty=True,
            arrival=True,
        )
        leftovers = (*leftovers, left)
        _event(draft, "vm.leftover", vm, operation.by, node=claim.destination)
    put_vm(draft, replace(vm, status=replace(vm.status, migration=None, leftovers=leftovers)))
    return operation


class HearOfLeftover(Struct, frozen=True, kw_only=True):
    """Takes what a node tells of a leftover: ``gone``, or else that it has no guest, only files."""

    vm_id: str
    node_id: str
    generation: int
    gone: bool

    def decide(self, draft: Draft) -> None:
        vm = draft.find(Vm, self.vm_id)
        if vm is None:
            return
        heard = [self._heard(left) for left in vm.status.leftovers]
        leftovers = tuple(left for left in heard if left is not None)
        if leftovers == vm.status.leftovers:
            return
        vm = replace(vm, status=replace(vm.status, leftovers=leftovers))
        if self.gone and vm.deleting and vm.status.node is None:
            vm_gone_from_node(draft, vm, Author("leader"))
        else:
            put_vm(draft, vm)

    def _heard(self, left: Leftover) -> Leftover | None:
        if (left.node, left.generation) != (self.node_id, self.generation):
            return left
        return None if self.gone else replace(left, empty=True)


def with_log_on(status: VmStatus, left: str, new: str | None) -> VmStatus:
    """Note that a VM leaves its console log behind on a node; its new one begins a fresh one."""
    others = (node for node in status.logs_on if node not in (left, new))
    return replace(status, logs_on=(*others, left)[-LOGS_MAX:])


def claimed(draft: Draft, operation: Operation) -> tuple[Vm, MigrationClaim]:
    """Return the VM and its claim, if it is still this operation's. Raises StateConflict."""
    vm = draft.vm(operation.target)
    claim = vm.status.migration
    if claim is None or claim.operation != operation.id:
        raise StateConflict(f"{operation.id} has no claim on {vm.name!r} any more")
    return vm, claim


def _put_claim(draft: Draft, vm: Vm, claim: MigrationClaim) -> None:
    put_vm(draft, replace(vm, status=replace(vm.status, migration=claim)))


def _journal(operation: Operation, **changes: object) -> Operation:
    assert isinstance(operation.saga, MigrationJournal), "a migration's journal"
    return replace(operation, saga=replace(operation.saga, **changes))


def _event(draft: Draft, kind: str, vm: Vm, by: str, **data: object) -> None:
    draft.event(kind, vm.id, Author(by), tenant=vm.tenant, **data)
