"""What an agent is told of one VM, derived from the VM's record. Pure.

A node that owns the VM is told what should be of it; one that only receives it, or has given it
away, what its part in the migration is.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from controlplane.state import Stored
from shared.model import AttemptState, Node, Power, Term, Vm, attempt_generation
from shared.moves import Leftover, MigrationClaim, MigrationStage
from shared.protocol import Desired, Intent, MigrationOrder, MigrationRole
from shared.units import KIB

_INTENTS: dict[Power, Intent] = {
    Power.RUNNING: Intent.RUN,
    Power.PAUSED: Intent.PAUSE,
    Power.STOPPED: Intent.STOP,
}
# How long a transfer may take, by what it has to move: a slow disk and a shared link of 1 Gbit/s
# bring a GiB over in 20 s, and a guest that writes makes them bring it several times.
TIMEOUT_MIN_S = 300.0
TIMEOUT_S_PER_GIB = 150.0
SIZE_MIN_GIB = 2.0

NodeName = Callable[[str], str]


def desired_of(stored: Stored[Vm], node: Node, term: Term, name_of: NodeName) -> Desired | None:
    """Return the message about a VM for ``node``; None when it has nothing to do with it.

    Of a VM of which only a backup tells no node is told anything. ``name_of`` gives a node's name
    by its id.
    """
    vm = stored.record
    if vm.status.unproven is not None:
        return None
    claim = vm.status.migration
    if vm.status.node == node.id:
        desired = _owned(stored, node, term)
        if claim is None or claim.source != node.id or not claim.generation:
            return desired
        return replace(desired, migration=_order(vm, claim, MigrationRole.SOURCE, name_of))
    if claim is not None and claim.generation and claim.destination == node.id:
        order = _order(vm, claim, MigrationRole.DESTINATION, name_of)
        return _part(stored, node, term, Intent.RECEIVE, claim.generation, order)
    if claim is not None and claim.generation and claim.source == node.id:
        order = _order(vm, claim, MigrationRole.SOURCE, name_of)
        return _part(stored, node, term, Intent.LEAVE, claim.source_generation, order)
    here = [each for each in vm.status.leftovers if each.node == node.id]
    if not here:
        return None
    # The newest first: while its domain is there, nothing older can be swept.
    left = max(here, key=lambda each: each.generation)
    intent = Intent.RECEIVE if left.arrival else Intent.LEAVE
    return _part(stored, node, term, intent, left.generation, _sweep(vm, left))


def _owned(stored: Stored[Vm], node: Node, term: Term) -> Desired:
    """Return the message for the node that the VM is bound to."""
    vm = stored.record
    intent = Intent.REMOVE if vm.deleting else _INTENTS.get(vm.spec.power, Intent.UNKNOWN)
    attempt = vm.status.attempt
    permitted = (
        intent in (Intent.RUN, Intent.PAUSE)
        and attempt is not None
        and attempt.state is AttemptState.PERMITTED
        and attempt.node == node.id
        and attempt.boot_id == node.boot_id
    )
    pending = vm.request is not None and vm.request.number > vm.status.answered_request
    desired = _message(stored, node, term, intent, attempt_generation(vm))
    return replace(desired, permitted=permitted, request=vm.request if pending else None)


def _part(
    stored: Stored[Vm],
    node: Node,
    term: Term,
    intent: Intent,
    generation: int,
    order: MigrationOrder,
) -> Desired:
    return replace(_message(stored, node, term, intent, generation), migration=order)


def _message(
    stored: Stored[Vm], node: Node, term: Term, intent: Intent, generation: int
) -> Desired:
    vm = stored.record
    return Desired(
        term=term,
        vm_id=vm.id,
        revision=stored.revision,
        generation=generation,
        permitted=False,
        boot_id=node.boot_id,
        intent=intent,
        name=vm.name,
        tenant=vm.tenant,
        domain_name=vm.domain_name,
        domain_uuid=vm.domain_uuid,
        spec=vm.spec,
        has_run=vm.status.has_run is True,
    )


def _order(vm: Vm, claim: MigrationClaim, role: MigrationRole, name_of: NodeName) -> MigrationOrder:
    assert claim.destination is not None, "a generation is given out for a node"
    peer = claim.destination if role is MigrationRole.SOURCE else claim.source
    return MigrationOrder(
        operation=claim.operation,
        role=role,
        stage=claim.stage,
        generation=claim.generation,
        source_generation=claim.source_generation,
        boot_id=claim.boot_id,
        peer=name_of(peer),
        copied=claim.copied,
        timeout_s=_timeout_s(vm, claim.copied),
    )


def _sweep(vm: Vm, left: Leftover) -> MigrationOrder:
    """A leftover is swept as a source is finalized, by the generation that it must carry; or, where
    the VM was to come, as a destination is cleaned.
    """
    role, stage = MigrationRole.SOURCE, MigrationStage.FINALIZE
    if left.arrival:
        role, stage = MigrationRole.DESTINATION, MigrationStage.CLEAN
    return MigrationOrder(
        operation="",
        role=role,
        stage=stage,
        generation=left.generation if left.arrival else vm.status.generation,
        source_generation=left.generation,
        boot_id="",
        peer="",
        copied=left.disks,
        purge=vm.deleting,
    )


def _timeout_s(vm: Vm, copied: tuple[str, ...]) -> float:
    disks_gib = sum(
        max(disk.size_gib, SIZE_MIN_GIB) for disk in vm.spec.disks if disk.name in copied
    )
    size_gib = max(vm.spec.memory_mib / KIB, SIZE_MIN_GIB) + disks_gib
    return max(TIMEOUT_MIN_S, TIMEOUT_S_PER_GIB * size_gib)
