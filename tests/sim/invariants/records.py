"""Of what is stored: who writes it, what it promises, and that nothing of it is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from controlplane.commands.drains import DRAIN
from controlplane.commands.migrations import MIGRATE
from controlplane.commands.operations import CREATE, DELETE
from controlplane.scheduler.request import SchedulerSettings, memory_needed_mib
from shared.model import AuditRecord, FinishedOperation, IdempotencyRecord, Node, Operation, Vm
from tests.sim.ledger import (
    Acknowledged,
    Committed,
    Died,
    Ledger,
    Measured,
    SimEvent,
    ToldGone,
    Viewed,
    attempt_is_open,
)

# Of these every request is an operation of its own.
OWN_KINDS = frozenset({CREATE, DELETE, MIGRATE, DRAIN, "vm.shutdown", "vm.reboot", "vm.reset"})


def within_capacity(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I9: The attempts that a node may be running never ask for more than it has."""
    if not isinstance(event, Committed):
        return
    changed = {record_id: record for kind, record_id, record in event.records if kind is Vm}
    touched = dict.fromkeys(
        record.status.attempt.node
        for record in changed.values()
        if isinstance(record, Vm) and attempt_is_open(record) and record.status.attempt is not None
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
            and attempt_is_open(vm)
            and vm.status.attempt is not None
            and vm.status.attempt.node == node_id
        ]
        yield from _overrun(node, load)


def written_by_the_leader(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I13: Cluster state is changed only by the process that holds the leader key just then."""
    if isinstance(event, Committed) and event.changes_state:
        holder = None if before.leader is None else before.leader.incarnation
        if event.writer != holder:
            yield f"revision {event.revision} was written by {event.writer}, {holder} leads"


def history_is_dense(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I11: History's numbers come in order, without gap or repeat."""
    if isinstance(event, Committed):
        for position, entry in enumerate(event.history, start=1):
            if entry.seq != before.last_seq + position:
                yield f"entry {entry.seq} follows {before.last_seq + position - 1}"


def operation_ends_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I5: An operation reaches one end, in the revision that closes it, and never changes again."""
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
    """I3: What a client was told of is in etcd, and a VM goes only after somebody asked for it."""
    if isinstance(event, Acknowledged):
        known = event.operation_id in before.operations or event.operation_id in before.finished
        if not known:
            yield f"{event.operation_id} was acknowledged and is nowhere"
    elif isinstance(event, Committed):
        for kind, vm_id, record in event.records:
            if kind is Vm and record is None and vm_id not in before.delete_asked:
                yield f"{vm_id} is gone, and nobody asked for that"


def no_process_dies_by_itself(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I24: Only faults end processes; none ends by an error that it did not foresee."""
    if isinstance(event, Died):
        yield f"{event.incarnation}: {event.error}"


def key_is_used_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I7: A request that is sent again under its key is answered with what the first one became."""
    if isinstance(event, Committed):
        for kind, key_id, record in event.records:
            if kind is IdempotencyRecord and key_id in before.keys and record is not None:
                yield f"the request under {key_id} was done again"
    elif isinstance(event, Acknowledged) and event.key:
        answer = before.answers.get(event.key)
        if answer not in (None, event.operation_id):
            yield f"{event.key} was answered with {answer}, and now with {event.operation_id}"


def changes_are_audited(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I11: What a client asked for and its one audit record are in the same revision."""
    if not isinstance(event, Committed):
        return
    audits = Counter((e.action, e.object) for e in event.history if isinstance(e, AuditRecord))
    asked = Counter((op.kind, op.target) for op in _new_operations(before, event))
    for change in sorted(asked.keys() | audits.keys()):
        kind, target = change
        missing = audits[change] < asked[change]
        if missing or (audits[change] > asked[change] and kind in OWN_KINDS):
            yield f"{asked[change]} x {kind} of {target} has {audits[change]} audit records"
    touched = {r.id if r is not None else record_id for _, record_id, r in event.records}
    for action, subject in sorted(audits.keys() - asked.keys()):
        if subject not in touched:
            yield f"{action} of {subject} is audited, and nothing of it has changed"


def _new_operations(before: Ledger, commit: Committed) -> Iterator[Operation]:
    known = before.operations.keys() | before.finished.keys()
    opened = {r.id: r for _, _, r in commit.records if isinstance(r, Operation)}
    ended = {
        e.operation.id: e.operation for e in commit.history if isinstance(e, FinishedOperation)
    }
    for operation_id, operation in {**opened, **ended}.items():
        if operation_id not in known:
            yield operation


def views_are_monotone(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I19: Who has seen a revision is never shown an older one; a list is of one moment."""
    if not isinstance(event, Viewed):
        return
    if event.revision < event.floor:
        yield f"somebody who has seen {event.floor} is shown {event.revision}"
    shown, there = dict(event.vms), before.vms_at(event.revision)
    for vm_id in sorted(shown.keys() | there.keys()):
        if shown.get(vm_id) != there.get(vm_id):
            yield (
                f"{vm_id} is shown of {shown.get(vm_id)} at {event.revision}, "
                f"it was written at {there.get(vm_id)}"
            )


def what_is_there_is_found(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I4: A write is refused for what is gone, never for what a replica has not seen yet."""
    if not isinstance(event, ToldGone) or event.vm_id in before.delete_asked:
        return
    if event.vm_id in before.vms:
        yield f"somebody was told that there is no {event.vm_id}"


def nothing_grows_without_bound(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I20: Queues, sessions, windows and logs stay within their limits."""
    if isinstance(event, Measured) and event.count > event.limit:
        yield f"{event.incarnation} has {event.count} {event.what}, {event.limit} at most"


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
