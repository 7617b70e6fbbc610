"""The cluster's records in memory, with the indexes that decisions need.

The leader's copy is advanced by its own commits; a follower's by the informer. Both go through
``apply``, record by record, at the revision etcd gave. Nothing here decides anything.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from msgspec import Struct

from controlplane.past import Past
from shared.admission import Admission, JoinToken
from shared.model import (
    ApiKey,
    AttemptState,
    Cluster,
    HistoryEntry,
    IdempotencyRecord,
    Node,
    Operation,
    Power,
    Record,
    Vm,
    has_rivals,
    nodes_of,
)

R = TypeVar("R", bound=Record)
K = TypeVar("K")
Observer = Callable[[Record | None, Record | None], None]
HistoryObserver = Callable[[HistoryEntry], None]


class Stored(Struct, Generic[R], frozen=True, gc=False):
    """A record and the revision at which etcd stored it."""

    record: R
    revision: int


# The records that are listed page by page.
LISTED: frozenset[type[Record]] = frozenset({Vm, Node, Operation, JoinToken, Admission})


class Then(Struct, Generic[R], frozen=True):
    """The records of one kind as they were at a revision; good until other tasks get their turn."""

    now: dict[str, Stored[R]]
    before: dict[str, Stored[R] | None]

    def get(self, record_id: str) -> Stored[R] | None:
        if record_id in self.before:
            return self.before[record_id]
        return self.now.get(record_id)

    def ids(self) -> list[str]:
        """Return all ids, oldest first."""
        if not self.before:
            return sorted(self.now)
        gone = [i for i, stored in self.before.items() if stored is not None and i not in self.now]
        there = (i for i in self.now if i not in self.before or self.before[i] is not None)
        return sorted([*there, *gone])


class Changes:
    """Wakes everyone who waits for the next change; says nothing about what changed."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}

    def notify(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def next(self) -> asyncio.Future[None]:
        """Return what is done at the next change from this very moment on; cancel it if unused."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        # Who gives up waiting in a quiet cluster must not stay here until something changes.
        waiter.add_done_callback(lambda done: self._waiters.pop(done, None))
        return waiter

    async def wait(self) -> None:
        await self.next()


class ClusterState:
    """All records, and the part of history that etcd still holds.

    ``revision`` is the moment that they show; 0 until the first listing is whole.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.changes = Changes()
        self.clusters: dict[str, Stored[Cluster]] = {}
        self.vms: dict[str, Stored[Vm]] = {}
        self.nodes: dict[str, Stored[Node]] = {}
        self.operations: dict[str, Stored[Operation]] = {}
        self.api_keys: dict[str, Stored[ApiKey]] = {}
        self.idempotency: dict[str, Stored[IdempotencyRecord]] = {}
        self.join_tokens: dict[str, Stored[JoinToken]] = {}
        self.admissions: dict[str, Stored[Admission]] = {}
        self.history: dict[int, HistoryEntry] = {}
        self.last_seq = 0
        self.past: Past[Stored[Any]] = Past()
        self._tables: dict[type[Record], dict[str, Stored[Any]]] = {
            Cluster: self.clusters,
            Vm: self.vms,
            Node: self.nodes,
            Operation: self.operations,
            ApiKey: self.api_keys,
            IdempotencyRecord: self.idempotency,
            JoinToken: self.join_tokens,
            Admission: self.admissions,
        }
        self._observers: list[Observer] = []
        self._history_observers: list[HistoryObserver] = []
        self._vm_names: dict[tuple[str, str], str] = {}
        self._vm_counts: Counter[str] = Counter()
        self._node_names: dict[str, str] = {}
        self._vms_on: dict[str, set[str]] = {}
        self._unbound: set[str] = set()
        self._to_start: set[str] = set()
        self._open_attempts: dict[tuple[str, str], set[str]] = {}
        self._operations_on: dict[str, set[str]] = {}
        self._sagas: set[str] = set()
        self._claimed: set[str] = set()
        self._unproven: set[str] = set()

    def vm_id_by_name(self, tenant: str, name: str) -> str | None:
        return self._vm_names.get((tenant, name))

    def vm_count(self, tenant: str) -> int:
        """Return how many VMs a tenant has."""
        return self._vm_counts[tenant]

    def node_id_by_name(self, name: str) -> str | None:
        return self._node_names.get(name)

    def vm_ids_on(self, node_id: str) -> Iterable[str]:
        """Return the VMs of which a node holds, or may hold, something."""
        return self._vms_on.get(node_id, ())

    def claimed_vm_ids(self) -> Iterable[str]:
        """Return the VMs with an open migration, in no order."""
        return self._claimed

    def unproven_vm_ids(self) -> list[str]:
        """Return the VMs of which only a restored backup says where they are, oldest first."""
        return sorted(self._unproven)

    def saga_ids(self) -> list[str]:
        """Return the open operations that are sagas, oldest first."""
        return sorted(self._sagas)

    def vm_ids_to_place(self) -> list[str]:
        """Return the VMs that should run and have no node, oldest first."""
        return sorted(self._unbound)

    def vm_ids_to_start(self) -> list[str]:
        """Return the VMs that should run, have a node and no attempt under way, oldest first."""
        return sorted(self._to_start)

    def lost_attempts(self) -> list[str]:
        """Return the VMs whose node has booted since their open attempt began, oldest first."""
        lost: list[str] = []
        for (node_id, boot_id), vm_ids in self._open_attempts.items():
            node = self.nodes.get(node_id)
            if node is not None and node.record.boot_id != boot_id:
                lost += vm_ids
        return sorted(lost)

    def observe(self, observer: Observer) -> None:
        """Call ``observer(before, after)`` for every record that is put or removed from now on."""
        self._observers.append(observer)

    def unobserve(self, observer: Observer) -> None:
        self._observers.remove(observer)

    def operation_ids_on(self, target: str) -> Iterable[str]:
        return self._operations_on.get(target, ())

    def vms_on(self, node_id: str) -> Iterator[Stored[Vm]]:
        for vm_id in sorted(self.vm_ids_on(node_id)):
            yield self.vms[vm_id]

    def cluster(self) -> Cluster | None:
        """Return the cell's record about itself; None until the cluster has been made."""
        return next((stored.record for stored in self.clusters.values()), None)

    def record_ids(self) -> Iterator[tuple[type[Record], str]]:
        for kind, table in self._tables.items():
            for record_id in table:
                yield kind, record_id

    def get(self, kind: type[R], record_id: str) -> Stored[R] | None:
        return self._table(kind).get(record_id)

    def all_of(self, kind: type[R]) -> Iterable[Stored[R]]:
        """Return every record of a kind, in no order."""
        return self._table(kind).values()

    def record_count(self) -> int:
        return sum(map(len, self._tables.values()))

    def count(self, kind: type[Record]) -> int:
        return len(self._table(kind))

    def put(self, record: Record, revision: int) -> None:
        """Take one record as etcd has it at ``revision``."""
        table = self._table(type(record))
        before = table.get(record.id)
        if type(record) in LISTED and (before is None or before.revision != revision):
            self.past.note(type(record), record.id, before)
        if before is not None:
            self._unindex(before.record)
        table[record.id] = Stored(record, revision)
        self._index(record)
        self._tell(None if before is None else before.record, record)

    def remove(self, kind: type[Record], record_id: str) -> None:
        before = self._table(kind).pop(record_id, None)
        if before is not None:
            if kind in LISTED:
                self.past.note(kind, record_id, before)
            self._unindex(before.record)
            self._tell(before.record, None)

    def observe_history(self, observer: HistoryObserver) -> None:
        """Call ``observer(entry)`` for every entry that is new from now on."""
        self._history_observers.append(observer)

    def put_history(self, entry: HistoryEntry) -> None:
        if entry.seq > self.last_seq:
            for observer in self._history_observers:
                observer(entry)
        self.history[entry.seq] = entry
        self.last_seq = max(self.last_seq, entry.seq)

    def remove_history(self, seq: int) -> None:
        self.history.pop(seq, None)

    def advanced(self, revision: int) -> None:
        """Declare that everything up to ``revision`` has been taken, and wake who waits."""
        since, self.revision = self.revision, max(self.revision, revision)
        self.past.seal(since, self.revision)
        self.changes.notify()

    def then(self, kind: type[R], revision: int) -> Then[R] | None:
        """Return the records of a kind as they were at a revision; None when nobody knows."""
        before = self.past.since(kind, revision)
        return None if before is None else Then(self._table(kind), before)

    def _table(self, kind: type[R]) -> dict[str, Stored[R]]:
        return self._tables[kind]

    def _tell(self, before: Record | None, after: Record | None) -> None:
        for observer in self._observers:
            observer(before, after)

    def _index(self, record: Record) -> None:
        if isinstance(record, Vm):
            self._vm_names[record.tenant, record.name] = record.id
            self._vm_counts[record.tenant] += 1
            self._index_vm(record)
        elif isinstance(record, Node):
            self._node_names[record.name] = record.id
        elif isinstance(record, Operation):
            self._operations_on.setdefault(record.target, set()).add(record.id)
            if record.saga is not None:
                self._sagas.add(record.id)

    def _index_vm(self, vm: Vm) -> None:
        attempt = vm.status.attempt
        over = attempt is None or attempt.state is AttemptState.ENDED
        unproven = vm.status.unproven is not None
        if attempt is not None and not over and not unproven:
            key = (attempt.node, attempt.boot_id)
            self._open_attempts.setdefault(key, set()).add(vm.id)
        for node_id in nodes_of(vm):
            self._vms_on.setdefault(node_id, set()).add(vm.id)
        if vm.status.migration is not None:
            self._claimed.add(vm.id)
        if unproven:
            self._unproven.add(vm.id)
        held = vm.status.migration is not None or has_rivals(vm) or unproven
        if vm.spec.power is Power.STOPPED or vm.deleting or not over or held:
            return
        (self._unbound if vm.status.node is None else self._to_start).add(vm.id)

    def _unindex(self, record: Record) -> None:
        if isinstance(record, Vm):
            self._vm_counts[record.tenant] -= 1
            self._unbound.discard(record.id)
            self._to_start.discard(record.id)
            self._claimed.discard(record.id)
            self._unproven.discard(record.id)
            for node_id in nodes_of(record):
                _discard(self._vms_on, node_id, record.id)
            if record.status.attempt is not None:
                attempt = record.status.attempt
                _discard(self._open_attempts, (attempt.node, attempt.boot_id), record.id)
            if self._vm_names.get((record.tenant, record.name)) == record.id:
                del self._vm_names[record.tenant, record.name]
        elif isinstance(record, Node):
            if self._node_names.get(record.name) == record.id:
                del self._node_names[record.name]
        elif isinstance(record, Operation):
            _discard(self._operations_on, record.target, record.id)
            self._sagas.discard(record.id)


def _discard(index: dict[K, set[str]], key: K, member: str) -> None:
    if key not in index:
        return
    index[key].discard(member)
    if not index[key]:
        del index[key]
