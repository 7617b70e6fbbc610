"""A draft: the changes of one group of commands, over the state they were decided on.

A command reads through the draft, so that it sees the changes of those before it in the same
group. A refused command is rolled back and leaves no trace; sequence numbers are given out only
when the group is sealed. A draft never touches the state below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import Struct

from controlplane.state import ClusterState
from shared.errors import NotFound
from shared.model import (
    DEFAULT_TENANT,
    AuditRecord,
    Cluster,
    Event,
    FinishedOperation,
    HistoryEntry,
    Node,
    Operation,
    Record,
    Term,
    Vm,
    nodes_of,
)
from shared.moves import MigrationClaim

R = TypeVar("R", bound=Record)
Result_co = TypeVar("Result_co", covariant=True)


class Author(Struct, frozen=True):
    """On whose behalf a command changes something: a principal, or a loop of the control plane."""

    principal: str
    request_id: str = ""


class Command(Protocol[Result_co]):
    """A typed change. ``decide`` is synchronous and reads nothing but the draft."""

    def decide(self, draft: Draft) -> Result_co:
        """Write into the draft, or raise a NovacronError and be rolled back."""
        ...


class Ids(Protocol):
    """Gives out ids."""

    def new(self, kind: str) -> str: ...


class Savepoint(Struct, frozen=True):
    changes: dict[tuple[type[Record], str], Record | None]
    history_length: int
    trimmed_length: int
    gives_up_term: bool


class Draft:
    """``term`` is the one that it is to be committed under; a rehearsal has none."""

    def __init__(
        self, state: ClusterState, ids: Ids, now: datetime, term: Term | None = None
    ) -> None:
        self._state = state
        self._changes: dict[tuple[type[Record], str], Record | None] = {}
        self._history: list[HistoryEntry] = []
        self._trimmed: list[int] = []
        self._gives_up_term = False
        self._ids = ids
        self.now = now
        self.term = term

    # What a command reads.

    def new_id(self, kind: str) -> str:
        return self._ids.new(kind)

    def find(self, kind: type[R], record_id: str) -> R | None:
        if (kind, record_id) in self._changes:
            changed: R | None = self._changes[kind, record_id]  # type: ignore[assignment]
            return changed
        stored = self._state.get(kind, record_id)
        return None if stored is None else stored.record

    def revision_of(self, record_id: str) -> int | None:
        """Return at which revision an object is stored: 0 once this draft has changed it.

        None when there is no VM, node or operation of that id.
        """
        for kind in (Vm, Node, Operation):
            if self.find(kind, record_id) is None:
                continue
            stored = self._state.get(kind, record_id)
            return 0 if stored is None or (kind, record_id) in self._changes else stored.revision
        return None

    def count(self, kind: type[Record]) -> int:
        """Return how many records of a kind there are, those that this draft deletes included."""
        new = sum(self._state.get(k, i) is None for k, i in self._changes if k is kind)
        return self._state.count(kind) + new

    def cluster(self) -> Cluster | None:
        return next(self._changed(Cluster), None) or self._state.cluster()

    def vm(self, vm_id: str) -> Vm:
        """Return a VM. Raises NotFound."""
        vm = self.find(Vm, vm_id)
        if vm is None:
            raise NotFound(f"there is no VM {vm_id}")
        return vm

    def node(self, node_id: str) -> Node:
        """Return a node. Raises NotFound."""
        node = self.find(Node, node_id)
        if node is None:
            raise NotFound(f"there is no node {node_id}")
        return node

    def vm_by_name(self, tenant: str, name: str) -> Vm | None:
        for vm in self._changed(Vm):
            if (vm.tenant, vm.name) == (tenant, name):
                return vm
        vm_id = self._state.vm_id_by_name(tenant, name)
        found = None if vm_id is None else self.find(Vm, vm_id)
        return found if found is not None and found.name == name else None

    def node_by_name(self, name: str) -> Node | None:
        for node in self._changed(Node):
            if node.name == name:
                return node
        node_id = self._state.node_id_by_name(name)
        return None if node_id is None else self.find(Node, node_id)

    def all_of(self, kind: type[R]) -> Iterator[R]:
        """Yield every record of a kind, as this draft leaves it, in no order."""
        yield from self._changed(kind)
        for stored in self._state.all_of(kind):
            if (kind, stored.record.id) not in self._changes:
                yield stored.record

    def nodes(self) -> Iterator[Node]:
        """Yield every node, as this draft leaves it, in no order."""
        return self.all_of(Node)

    def vms_on(self, node_id: str) -> Iterator[Vm]:
        """Yield the VMs of which a node holds, or may hold, something, as the draft leaves it."""
        for vm in self._changed(Vm):
            if node_id in nodes_of(vm):
                yield vm
        for vm_id in self._state.vm_ids_on(node_id):
            if (Vm, vm_id) not in self._changes:
                yield self._state.vms[vm_id].record

    def claims(self) -> Iterator[MigrationClaim]:
        """Yield the open migrations, as this draft leaves them."""
        for vm in self._changed(Vm):
            if vm.status.migration is not None:
                yield vm.status.migration
        for vm_id in self._state.claimed_vm_ids():
            claim = self._state.vms[vm_id].record.status.migration
            if (Vm, vm_id) not in self._changes and claim is not None:
                yield claim

    def operations_on(self, target: str) -> list[Operation]:
        """Return the open operations on an object, oldest first."""
        found = [op for op in self._changed(Operation) if op.target == target]
        for operation_id in self._state.operation_ids_on(target):
            if (Operation, operation_id) not in self._changes:
                found.append(self._state.operations[operation_id].record)
        return sorted(found, key=lambda operation: operation.id)

    def changes_of(self, kind: type[R]) -> Iterator[tuple[R | None, R | None]]:
        """Yield (before, after) of each record of a kind that this draft puts or deletes."""
        for (changed_kind, record_id), after in self._changes.items():
            if changed_kind is kind:
                stored = self._state.get(kind, record_id)
                yield None if stored is None else stored.record, after  # type: ignore[misc]

    def _changed(self, kind: type[R]) -> Iterator[R]:
        for (changed_kind, _), record in self._changes.items():
            if changed_kind is kind and record is not None:
                yield record  # type: ignore[misc]

    # What a command writes.

    def put(self, record: Record) -> None:
        self._changes[type(record), record.id] = record

    def delete(self, kind: type[Record], record_id: str) -> None:
        self._changes[kind, record_id] = None

    def event(
        self,
        kind: str,
        subject: str,
        by: Author,
        *,
        tenant: str = DEFAULT_TENANT,
        **data: Any,
    ) -> None:
        self._history.append(
            Event(
                seq=0,
                id=self.new_id("event"),
                kind=kind,
                object=subject,
                tenant=tenant,
                at=self.now,
                by=by.principal,
                data=data,
            )
        )

    def audit(self, action: str, subject: str, by: Author, tenant: str = DEFAULT_TENANT) -> None:
        self._history.append(
            AuditRecord(
                seq=0,
                id=self.new_id("audit"),
                action=action,
                object=subject,
                tenant=tenant,
                at=self.now,
                by=by.principal,
                request_id=by.request_id,
            )
        )

    def finish(self, operation: Operation) -> None:
        """Move an operation that reached its end from the records into history."""
        self.delete(Operation, operation.id)
        self._history.append(FinishedOperation(seq=0, operation=operation))

    def trim_history(self, seqs: list[int]) -> None:
        self._trimmed.extend(seqs)

    def give_up_term(self) -> None:
        """Let the term end by itself once this is committed."""
        self._gives_up_term = True

    # What the applier does with it.

    def savepoint(self) -> Savepoint:
        return Savepoint(
            dict(self._changes), len(self._history), len(self._trimmed), self._gives_up_term
        )

    def rollback(self, savepoint: Savepoint) -> None:
        self._changes = dict(savepoint.changes)
        del self._history[savepoint.history_length :]
        del self._trimmed[savepoint.trimmed_length :]
        self._gives_up_term = savepoint.gives_up_term

    def size(self) -> int:
        """Return how many writes the draft comes to."""
        return len(self._changes) + len(self._history) + len(self._trimmed)

    def sealed(self, last_seq: int) -> SealedDraft:
        """Number the history densely from ``last_seq`` on and return the writes."""
        numbered = tuple(
            msgspec.structs.replace(entry, seq=last_seq + position)
            for position, entry in enumerate(self._history, start=1)
        )
        return SealedDraft(
            changes=tuple((kind, record_id, r) for (kind, record_id), r in self._changes.items()),
            history=numbered,
            trimmed=tuple(self._trimmed),
            gives_up_term=self._gives_up_term,
        )


class SealedDraft(Struct, frozen=True):
    changes: tuple[tuple[type[Record], str, Record | None], ...]
    history: tuple[HistoryEntry, ...]
    trimmed: tuple[int, ...]
    gives_up_term: bool = False

    def __bool__(self) -> bool:
        return bool(self.changes or self.history or self.trimmed)
