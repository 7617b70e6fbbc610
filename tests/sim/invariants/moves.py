"""Of guests on the move: who owns them, and what must not be done to them meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from shared.model import AttemptState, Vm
from shared.moves import MigrationClaim, MigrationStage
from tests.sim.ledger import Committed, Ended, Ledger, SetOut, SimEvent


def moves_are_begun_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I6: A guest sets out once under each claim, whatever crashed in between."""
    if isinstance(event, SetOut) and (event.vm_id, event.generation) in before.set_out:
        yield f"{event.vm_id} sets out once more to become generation {event.generation}"


def owner_has_the_guest(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I22: A VM changes its owner only when its guest has come to the new one."""
    for vm, claim in _claims_before(before, event):
        attempt = vm.status.attempt
        if attempt is None or attempt.generation != claim.generation:
            continue
        node = before.nodes.get(attempt.node)
        where = before.seen.get((vm.id, attempt.generation))
        if node is None or where != node.name:
            yield f"{vm.id} is given to {attempt.node} as {attempt.generation}, it is not there"


def claim_outlives_the_guest(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I22: A claim is not given up while the destination has the guest that it was made for."""
    for vm, claim in _claims_before(before, event):
        attempt = vm.status.attempt
        owned = attempt is not None and attempt.generation >= claim.generation
        node = before.nodes.get(claim.destination or "")
        if vm.status.migration is not None or owned or node is None:
            continue
        if before.running.get((node.name, vm.id)) == claim.generation:
            yield f"{vm.id} runs on {node.name}, where nobody looks for it any more"


def arrived_guest_is_not_cleaned(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I22: A guest that has run on its destination is never ended as a failed move's remains."""
    if not isinstance(event, Ended) or not event.by_agent:
        return
    vm = before.vms.get(event.vm_id)
    claim = None if vm is None else vm.status.migration
    if claim is None or claim.stage is MigrationStage.FINALIZE:
        return
    arrived = (event.vm_id, event.generation) in before.ran
    if arrived and event.generation == claim.generation:
        yield f"{event.vm_id} has run on {event.node}, and is cleaned up there"


def start_has_no_rival(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I21: No start is permitted while another node may still have the guest."""
    if not isinstance(event, Committed):
        return
    for _, vm_id, record in event.records:
        vm = before.vms.get(vm_id)
        if not isinstance(record, Vm) or vm is None or record.status.attempt is None:
            continue
        permitted = record.status.attempt.state is AttemptState.PERMITTED
        known = vm.status.attempt is not None and (
            vm.status.attempt.generation == record.status.attempt.generation
        )
        rivals = any(not left.empty for left in vm.status.leftovers)
        if permitted and not known and (rivals or vm.status.migration is not None):
            yield f"{vm_id} may start anew, and may run elsewhere"


def _claims_before(before: Ledger, event: SimEvent) -> Iterator[tuple[Vm, MigrationClaim]]:
    """Yield the VMs that a commit writes and that were claimed with a generation before it."""
    if not isinstance(event, Committed):
        return
    for _, vm_id, record in event.records:
        vm = before.vms.get(vm_id)
        claim = None if vm is None else vm.status.migration
        if isinstance(record, Vm) and claim is not None and claim.generation:
            yield record, claim
