"""What a drain changes in records: its node's cordon, its journal, and VMs that let go of the node.

The functions below ``RequestDrain`` are effects of the steps in ``controlplane/sagas/drain.py``.
"""

from __future__ import annotations

from datetime import timedelta

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from controlplane.commands.migrations import RequestMigration, with_log_on
from controlplane.commands.nodes import put_cordon
from controlplane.commands.operations import put_vm
from controlplane.commands.sagas import (
    CancelOperation,
    Effect,
    is_past_return,
    open_saga,
    saga_steps,
)
from controlplane.commands.upgrade import MOVES_LEVEL, require_level
from shared.errors import StateConflict
from shared.model import AttemptState, Node, Operation, OperationState, Vm
from shared.moves import DrainJournal, DrainTry, Leftover, Unanswered, VmLeft

DRAIN = "node.drain"
# A node of 100 VMs empties within hours, two at a time; what waits for longer waits for a person.
DRAIN_DEADLINE = timedelta(hours=24)


class RequestDrain(Struct, frozen=True, kw_only=True, tag="request_drain"):
    """Returns the id of the operation; whoever asks again gets the one that is under way.

    Raises NotFound, UpgradeUnfinished, StateConflict while an earlier drain is being undone, or
    when the one under way skips other VMs.
    """

    node_id: str
    reason: str
    skip: tuple[str, ...]
    steps: tuple[str, ...]
    no_return: frozenset[str]
    by: Author

    def decide(self, draft: Draft) -> str:
        node = draft.node(self.node_id)
        require_level(draft, MOVES_LEVEL, "a drain")
        for operation in draft.operations_on(node.id):
            if operation.kind == DRAIN and operation.undoing:
                raise StateConflict(
                    f"{operation.id} is being cancelled: try again when it has ended"
                )
            if operation.kind == DRAIN:
                self._check_same(draft, operation)
                return operation.id
        operation = Operation(
            id=draft.new_id("op"),
            kind=DRAIN,
            target=node.id,
            state=OperationState.RUNNING,
            steps=saga_steps(self.steps, self.no_return),
            by=self.by.principal,
            created_at=draft.now,
            updated_at=draft.now,
            deadline_at=draft.now + DRAIN_DEADLINE,
            saga=DrainJournal(
                reason=self.reason, skip=self.skip, total=sum(1 for _ in draft.vms_on(node.id))
            ),
        )
        open_saga(draft, operation)
        draft.audit(DRAIN, node.id, self.by)
        draft.event(
            "node.drain_requested", node.id, self.by, name=node.name, operation=operation.id
        )
        return operation.id

    def _check_same(self, draft: Draft, under_way: Operation) -> None:
        """Raise StateConflict when other VMs are to be skipped than the drain under way skips."""
        skips = journal_of(under_way).skip
        if set(skips) != set(self.skip):
            names = [vm.name for each in skips if (vm := draft.find(Vm, each)) is not None]
            raise StateConflict(
                f"{under_way.id} drains the node already, and skips "
                f"{', '.join(sorted(names)) or 'no VM'}: wait for it, or cancel it "
                f"(novacron op cancel {under_way.id}) and ask again"
            )


def cordon_for(draft: Draft, operation: Operation) -> Operation:
    """Cordon the node, unless it is already."""
    node = draft.node(operation.target)
    journal = journal_of(operation)
    if node.cordoned:
        return operation
    reason = journal.reason or f"drained by {operation.by}"
    put_cordon(draft, node, Author(operation.by), cordoned=True, reason=reason)
    return replace(operation, saga=replace(journal, cordoned=True))


def uncordon_again(draft: Draft, operation: Operation) -> Operation:
    """Open the node again after a cancelled drain that had closed it.

    After one that failed it stays closed: whoever wanted it empty still has it half empty.
    """
    node = draft.find(Node, operation.target)
    cancelled = operation.state is OperationState.CANCELLING
    if node is not None and node.cordoned and journal_of(operation).cordoned and cancelled:
        put_cordon(draft, node, Author(operation.by), cordoned=False, reason="")
    return operation


def move_vm(vm_id: str, steps: tuple[str, ...], no_return: frozenset[str]) -> Effect:
    """Ask for a VM's migration to wherever it fits, and write down which one that is."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        request = RequestMigration(
            vm_id=vm_id,
            destination=None,
            steps=steps,
            no_return=no_return,
            by=Author(operation.by),
            parent=operation.id,
        )
        journal = journal_of(operation)
        before = next((each for each in journal.tries if each.vm == vm_id), None)
        attempt = DrainTry(
            vm=vm_id,
            operation=request.decide(draft),
            count=1 if before is None else before.count + 1,
            at=draft.now,
        )
        others = tuple(each for each in journal.tries if each.vm != vm_id)
        return replace(operation, saga=replace(journal, tries=(*others, attempt)))

    return effect


def release_vm(vm_id: str, new_node: str | None) -> Effect:
    """Bind a VM at rest to another node that sees its disks; without disks, to none.

    What is left of it on the old node is swept. One with disks is never without a node: somebody
    has to delete them one day.
    """

    def effect(draft: Draft, operation: Operation) -> Operation:
        vm = draft.vm(vm_id)
        attempt = vm.status.attempt
        at_rest = attempt is None or attempt.state is AttemptState.ENDED
        here = vm.status.node == operation.target and vm.status.unproven is None
        if not (here and at_rest) or vm.deleting or vm.status.migration is not None:
            raise StateConflict(f"{vm.name!r} is not at rest on the node any more")
        assert new_node is not None or not vm.spec.disks, "disks need a node"
        generation = 0 if attempt is None else attempt.generation
        left = Leftover(node=operation.target, generation=generation)
        leftovers = (*vm.status.leftovers, left)
        status = with_log_on(vm.status, operation.target, new_node)
        status = replace(status, node=new_node, attempt=None, leftovers=leftovers)
        by = Author(operation.by)
        draft.event(
            "vm.released", vm.id, by, tenant=vm.tenant, node=operation.target, new_node=new_node
        )
        put_vm(draft, replace(vm, status=status))
        return operation

    return effect


def refuse_release(vm_id: str, reason: str) -> Effect:
    """Write down that a VM at rest stays, because of what its new node has answered."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        journal = journal_of(operation)
        stays = VmLeft(vm=vm_id, name=draft.vm(vm_id).name, reason=reason)
        others = tuple(each for each in journal.refused if each.vm != vm_id)
        return replace(operation, saga=replace(journal, refused=(*others, stays)))

    return effect


def note_answer(node_id: str, *, answered: bool) -> Effect:
    """Write down that a node does not answer, from now on, or that it does again."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        journal = journal_of(operation)
        silent = tuple(each for each in journal.unanswered if each.node != node_id)
        if not answered:
            silent = (*silent, Unanswered(node_id, draft.now))
        return replace(operation, saga=replace(journal, unanswered=silent))

    return effect


def cancel_moves(draft: Draft, operation: Operation) -> Operation:
    """Cancel the migrations of a drain that can be cancelled; the others end by themselves."""
    for attempt in journal_of(operation).tries:
        child = draft.find(Operation, attempt.operation)
        if child is not None and not is_past_return(child):
            CancelOperation(operation_id=child.id, by=Author(operation.by)).decide(draft)
    return operation


def drained(draft: Draft, operation: Operation) -> Operation:
    """Say that the node is empty. Raises StateConflict when it is not."""
    node = draft.node(operation.target)
    if any(True for _ in draft.vms_on(node.id)):
        raise StateConflict(f"{node.name!r} is not empty")
    draft.event("node.drained", node.id, Author(operation.by), name=node.name)
    return replace(operation, saga=replace(journal_of(operation), left=()))


def note_ends(ends: tuple[DrainTry, ...]) -> Effect:
    """Write down how migrations have ended. One that was asked for anew meanwhile is left alone."""
    by_operation = {each.operation: each for each in ends}

    def effect(draft: Draft, operation: Operation) -> Operation:
        journal = journal_of(operation)
        tries = tuple(by_operation.get(each.operation, each) for each in journal.tries)
        return replace(operation, saga=replace(journal, tries=tries))

    return effect


def note_left(left: tuple[VmLeft, ...]) -> Effect:
    """Write down which VMs are still there, and why."""

    def effect(draft: Draft, operation: Operation) -> Operation:
        return replace(operation, saga=replace(journal_of(operation), left=left))

    return effect


def journal_of(operation: Operation) -> DrainJournal:
    assert isinstance(operation.saga, DrainJournal), "a drain's journal"
    return operation.saga
