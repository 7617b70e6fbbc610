"""What must hold at every step, one function each; and what must hold once everything is healed.

An invariant is a function ``(before, event) -> iterator of complaints`` over the ledger as it was
before the event. It knows nothing of how the product works. The same functions are meant for other
recorded histories than the simulation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import Struct

from controlplane.scheduler.request import SchedulerSettings, memory_needed_mib
from controlplane.state import ClusterState
from shared.model import (
    AttemptState,
    FinishedOperation,
    Node,
    NodeState,
    Operation,
    Power,
    Vm,
    attempt_generation,
)
from shared.moves import MigrationClaim, MigrationStage
from tests.sim.ledger import (
    Acknowledged,
    Committed,
    Died,
    Ended,
    Erased,
    Ledger,
    Resumed,
    SetOut,
    SimEvent,
    Started,
    StillRuns,
)

Invariant = Callable[[Ledger, SimEvent], Iterator[str]]

# An agent that sees a guest come back holds it at once; a call to libvirt may take 8 s.
HELD_WITHIN_S = 10.0


class Violation(AssertionError):
    """An invariant does not hold; ``name`` is its function's."""

    def __init__(self, name: str, complaint: str) -> None:
        super().__init__(f"{name}: {complaint}")
        self.name = name


class Found(Struct, frozen=True, kw_only=True):
    """What is really there on one node when everything has come to rest.

    ``running`` (also paused, by whomever) and ``defined`` are generations by VM id; ``volumes`` are
    names.
    """

    node: str
    running: dict[str, int]
    paused: tuple[str, ...]
    defined: dict[str, int]
    volumes: tuple[str, ...]
    shared_volumes: tuple[str, ...] = ()


class Judge:
    """Judges each event as it comes, and remembers what it has seen."""

    def __init__(self, invariants: Iterable[Invariant] | None = None) -> None:
        self.ledger = Ledger()
        self._invariants = tuple(INVARIANTS if invariants is None else invariants)

    def take(self, event: SimEvent) -> None:
        """Raise Violation when the event may not happen after what happened before.

        What a restore writes is judged once it is whole.
        """
        restores = self.ledger.restoring and isinstance(event, Committed)
        for invariant in () if restores else self._invariants:
            for complaint in invariant(self.ledger, event):
                raise Violation(invariant.__name__, complaint)
        self.ledger.take(event)


def single_runner(before: Ledger, event: SimEvent) -> Iterator[str]:
    """At any instant a VM's guest runs at most once, on at most one node."""
    if isinstance(event, Resumed) and event.by_libvirt:
        return  # libvirt 9.0 does that when a relay breaks; the product has to end it
    if isinstance(event, Started | Resumed):
        for (node, vm_id), generation in before.running.items():
            if vm_id == event.vm_id:
                yield f"{vm_id} starts on {event.node}, and {generation} of it runs on {node}"


def generation_used_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A generation is started at most once, anywhere, whatever crashed in between."""
    if isinstance(event, Started):
        where = before.started.get((event.vm_id, event.generation))
        if where is not None:
            yield f"generation {event.generation} of {event.vm_id} was started on {where} before"


def start_was_permitted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """Nothing starts without a committed permit for that generation, node and boot."""
    if not isinstance(event, Started):
        return
    permit = before.permits.get((event.vm_id, event.generation))
    if permit is None:
        yield f"generation {event.generation} of {event.vm_id} was never given out"
        return
    node_id, boot_id = permit
    if before.names.get(node_id) != event.node:
        yield f"{event.vm_id} starts on {event.node}, its permit is for {node_id}"
    if boot_id != event.boot_id:
        yield f"{event.vm_id} starts in boot {event.boot_id}, its permit is for {boot_id}"


def returned_guest_is_held(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A guest that libvirt let go on beside another is held soon, by an agent that can."""
    if not isinstance(event, StillRuns) or event.attended_s < HELD_WITHIN_S:
        return
    for node, vm_id in before.running:
        if vm_id == event.vm_id and node != event.node:
            yield f"{vm_id} runs on {node}, and for {event.attended_s} s again on {event.node}"


def moves_are_begun_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A guest sets out once under each claim, whatever crashed in between."""
    if isinstance(event, SetOut) and (event.vm_id, event.generation) in before.set_out:
        yield f"{event.vm_id} sets out once more to become generation {event.generation}"


def owner_has_the_guest(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A VM changes its owner only when its guest has come to the new one."""
    for vm, claim in _claims_before(before, event):
        attempt = vm.status.attempt
        if attempt is None or attempt.generation != claim.generation:
            continue
        node = before.nodes.get(attempt.node)
        where = before.seen.get((vm.id, attempt.generation))
        if node is None or where != node.name:
            yield f"{vm.id} is given to {attempt.node} as {attempt.generation}, it is not there"


def claim_outlives_the_guest(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A claim is not given up while the destination has the guest that it was made for."""
    for vm, claim in _claims_before(before, event):
        attempt = vm.status.attempt
        owned = attempt is not None and attempt.generation >= claim.generation
        node = before.nodes.get(claim.destination or "")
        if vm.status.migration is not None or owned or node is None:
            continue
        if before.running.get((node.name, vm.id)) == claim.generation:
            yield f"{vm.id} runs on {node.name}, where nobody looks for it any more"


def arrived_guest_is_not_cleaned(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A guest that has run on its destination is never ended as what a failed move left there."""
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
    """No start is permitted while another node may still have the guest."""
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


def end_was_wanted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """An agent ends a guest only after a record said that this attempt shall not run."""
    if not isinstance(event, Ended) or not event.by_agent:
        return
    right = (event.vm_id, event.generation)
    if right not in before.stoppable and right not in before.earlier_rights(event.node):
        yield f"nobody wanted generation {event.generation} of {event.vm_id} to end"


def erased_was_deleted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """A VM's domain and volumes go only once its deletion was committed."""
    if not isinstance(event, Erased):
        return
    here = [node_id for node_id, name in before.names.items() if name == event.node]
    allowed = {(event.vm_id, node_id) for node_id in ("", *here)}
    rights = before.removable.keys() | before.earlier_rights(event.node).keys()
    if not rights & allowed:
        yield f"a part of {event.vm_id} was removed from {event.node} without a deletion"


def within_capacity(before: Ledger, event: SimEvent) -> Iterator[str]:
    """The attempts that a node may be running never ask for more than it has."""
    if not isinstance(event, Committed):
        return
    changed = {record_id: record for kind, record_id, record in event.records if kind is Vm}
    touched = dict.fromkeys(
        record.status.attempt.node
        for record in changed.values()
        if isinstance(record, Vm) and _is_open(record) and record.status.attempt is not None
    )
    after = {**before.vms, **changed}
    for node_id in touched:
        node = before.nodes.get(node_id)
        if node is None or node.inventory is None:
            yield f"an attempt on {node_id}, which nobody knows"
            continue
        load = [
            vm
            for vm in after.values()
            if isinstance(vm, Vm)
            and _is_open(vm)
            and vm.status.attempt is not None
            and vm.status.attempt.node == node_id
        ]
        yield from _overrun(node, load)


def written_by_the_leader(before: Ledger, event: SimEvent) -> Iterator[str]:
    """Cluster state is changed only by the process that holds the leader key at that moment."""
    if isinstance(event, Committed) and event.changes_state:
        holder = None if before.leader is None else before.leader.incarnation
        if event.writer != holder:
            yield f"revision {event.revision} was written by {event.writer}, {holder} leads"


def history_is_dense(before: Ledger, event: SimEvent) -> Iterator[str]:
    """History's numbers come in order, without gap or repeat."""
    if isinstance(event, Committed):
        for position, entry in enumerate(event.history, start=1):
            if entry.seq != before.last_seq + position:
                yield f"entry {entry.seq} follows {before.last_seq + position - 1}"


def operation_ends_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """An operation reaches one end, in the revision that closes it, and never changes again."""
    if not isinstance(event, Committed):
        return
    ended = {e.operation.id for e in event.history if isinstance(e, FinishedOperation)}
    for operation_id in sorted(ended & before.finished.keys()):
        yield f"{operation_id} ended before"
    for kind, operation_id, record in event.records:
        if kind is not Operation:
            continue
        if record is not None and operation_id in before.finished:
            yield f"{operation_id} is opened again after its end"
        if record is None and operation_id not in ended:
            yield f"{operation_id} vanished without an end"


def nothing_acknowledged_is_lost(before: Ledger, event: SimEvent) -> Iterator[str]:
    """What a client was told of is in etcd, and a VM goes only after somebody asked for it."""
    if isinstance(event, Acknowledged):
        known = event.operation_id in before.operations or event.operation_id in before.finished
        if not known:
            yield f"{event.operation_id} was acknowledged and is nowhere"
    elif isinstance(event, Committed):
        for kind, vm_id, record in event.records:
            if kind is Vm and record is None and vm_id not in before.delete_asked:
                yield f"{vm_id} is gone, and nobody asked for that"


def no_process_dies_by_itself(before: Ledger, event: SimEvent) -> Iterator[str]:
    """Only faults end processes; no fault makes one end itself by an error it did not foresee."""
    if isinstance(event, Died):
        yield f"{event.incarnation}: {event.error}"


INVARIANTS: tuple[Invariant, ...] = (
    single_runner,
    generation_used_once,
    start_was_permitted,
    start_has_no_rival,
    moves_are_begun_once,
    owner_has_the_guest,
    claim_outlives_the_guest,
    arrived_guest_is_not_cleaned,
    returned_guest_is_held,
    end_was_wanted,
    erased_was_deleted,
    within_capacity,
    written_by_the_leader,
    history_is_dense,
    operation_ends_once,
    nothing_acknowledged_is_lost,
    no_process_dies_by_itself,
)


def everything_settles(ledger: Ledger, nodes: Iterable[Found]) -> Iterator[str]:
    """After healing no operation is open, every node is ready, and what is there is as recorded."""
    for operation in ledger.operations.values():
        yield f"{operation.id} ({operation.kind} of {operation.target}) is still open"
    for node in ledger.nodes.values():
        if node.state is not NodeState.READY:
            yield f"{node.name} is {node.state.value}"
    found = {node.node: node for node in nodes}
    for vm in ledger.vms.values():
        yield from _settled_vm(vm, ledger, found)
    for each in found.values():
        yield from nothing_is_left_over(ledger, each)


def nothing_is_left_over(ledger: Ledger, found: Found) -> Iterator[str]:
    """No domain and no volume is on a node whose VM is not bound there."""
    here = {
        vm.id
        for vm in ledger.vms.values()
        if vm.status.node is not None and ledger.nodes[vm.status.node].name == found.node
    }
    for vm_id in found.defined:
        if vm_id not in here:
            yield f"{found.node} has a stray domain of {vm_id}"
    wanted = {
        f"{vm_id}-{disk.name}.qcow2" for vm_id in here for disk in ledger.vms[vm_id].spec.disks
    }
    for volume in found.volumes:
        if volume not in wanted:
            yield f"{found.node} has a stray volume {volume}"
    for volume in found.shared_volumes:
        if volume.rpartition("-")[0] not in ledger.vms:
            yield f"the shared pool has a stray volume {volume}"


def replicas_agree(ledger: Ledger, states: dict[str, ClusterState]) -> Iterator[str]:
    """Every replica's memory is what etcd holds: nothing was dropped on the way."""
    for name, state in states.items():
        tables: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
            ("VMs", ledger.vms, state.vms),
            ("nodes", ledger.nodes, state.nodes),
            ("operations", ledger.operations, state.operations),
        )
        for what, stored, remembered in tables:
            if stored != {record_id: kept.record for record_id, kept in remembered.items()}:
                yield f"{name} remembers other {what} than etcd has"


def _settled_vm(vm: Vm, ledger: Ledger, found: dict[str, Found]) -> Iterator[str]:
    node_id = vm.status.node
    node = None if node_id is None else found.get(ledger.nodes[node_id].name)
    running = None if node is None else node.running.get(vm.id)
    if vm.status.migration is not None:
        yield f"{vm.name} is still claimed by {vm.status.migration.operation}"
    for left in vm.status.leftovers:
        yield f"{left.node} may still hold generation {left.generation} of {vm.name}"
    if vm.deleting:
        yield f"{vm.name} is still being deleted"
    elif vm.spec.power is Power.STOPPED:
        if running is not None:
            yield f"{vm.name} is wanted stopped and runs"
        if _is_open(vm):
            yield f"{vm.name} is wanted stopped, its attempt is open"
    elif running is None:
        yield f"{vm.name} is wanted {vm.spec.power.value} and does not run"
    elif running != attempt_generation(vm):
        yield f"{vm.name} runs as generation {running}, recorded is {attempt_generation(vm)}"
    elif node is not None and (vm.spec.power is Power.PAUSED) != (vm.id in node.paused):
        yield f"{vm.name} is wanted {vm.spec.power.value} and is not"
    elif vm.status.power_seen.value != vm.spec.power.value:
        yield f"{vm.name} is {vm.spec.power.value}, recorded is {vm.status.power_seen.value}"


def _claims_before(before: Ledger, event: SimEvent) -> Iterator[tuple[Vm, MigrationClaim]]:
    """Yield the VMs that a commit writes and that were claimed with a generation before it."""
    if not isinstance(event, Committed):
        return
    for _, vm_id, record in event.records:
        vm = before.vms.get(vm_id)
        claim = None if vm is None else vm.status.migration
        if isinstance(record, Vm) and claim is not None and claim.generation:
            yield record, claim


def _is_open(vm: Vm) -> bool:
    attempt = vm.status.attempt
    return attempt is not None and attempt.state is not AttemptState.ENDED


def _overrun(node: Node, vms: list[Vm]) -> Iterator[str]:
    """Recount what the attempts on a node take, by the scheduler's settings as they are shipped."""
    assert node.inventory is not None, "only a known node is counted"
    settings = SchedulerSettings()
    memory_mib = sum(memory_needed_mib(vm.spec.memory_mib, vm.spec.vcpus) for vm in vms)
    usable_mib = (node.inventory.memory_mib - settings.memory_reserve_mib) * (
        settings.memory_overcommit
    )
    vcpus = sum(vm.spec.vcpus for vm in vms)
    if memory_mib > usable_mib:
        yield f"{node.name} has {usable_mib:g} MiB for VMs, {memory_mib} are given out"
    if vcpus > node.inventory.cpus * settings.cpu_overcommit:
        yield f"{node.name} has {node.inventory.cpus} CPUs, {vcpus} vCPUs are given out"
