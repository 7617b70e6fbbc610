"""What a restore makes of a backup's keys: the same records, none of which says any more what runs.

Pure. Numbers begin anew where nobody can have come to: the epoch; and derived from it, the next
generation of every VM, the next request of every guest, the next ``seq`` of history. So what was
given out after the backup, and is forgotten, is never given out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from controlplane.backup.format import Header
from controlplane.store import keys
from controlplane.store.port import Put
from shared.admission import Admission, JoinToken
from shared.codec import pack, unpack
from shared.errors import RecordUnreadable
from shared.model import (
    SCHEMA_LEVEL,
    Applied,
    AuditRecord,
    Cluster,
    Event,
    FinishedOperation,
    HistoryEntry,
    Node,
    NodeState,
    Operation,
    Problem,
    Record,
    Vm,
    may_have_run,
    nodes_of,
)
from shared.problems import problem
from shared.restores import NodeRecovery, Restored, Unproven
from shared.states import OPERATION_TRANSITIONS, OperationEvent, advance

# An epoch is the seconds since 1970 at its restore. In no second is one VM given more generations
# or requests (each is a commit), nor does history get more entries (28,000 puts a second were
# measured): so what an epoch has given out stays below the floor of any later one.
NUMBERS_PER_S = 1_000
ENTRIES_PER_S = 100_000

BY = "novacron cluster restore"


class Ids(Protocol):
    def new(self, kind: str) -> str: ...


class Restoration(Struct, frozen=True, kw_only=True):
    """What is to be written: ``puts``, and last the cluster's own record, with the applier's mark.

    ``left_out`` are keys of records that do not decode: nobody could hold them back.
    """

    cluster: Cluster
    mark: Applied
    puts: tuple[Put, ...]
    vms: int
    nodes: tuple[str, ...]
    ended: int
    left_out: tuple[str, ...]


def new_epoch(before: Iterable[int], now: datetime) -> int:
    """Return an epoch above all that are known, and above any that a restore before now has had."""
    return max(int(now.timestamp()), *(epoch + 1 for epoch in before))


def make_restoration(
    header: Header,
    items: Sequence[tuple[str, bytes]],
    epoch: int,
    now: datetime,
    ids: Ids,
    also_awaited: Sequence[str] = (),
) -> Restoration:
    """Return what to write of a backup's keys, in a new epoch.

    ``also_awaited`` are names of nodes that joined after the backup. Raises RecordUnreadable for a
    backup without a cluster.
    """
    work = _Work(header, epoch, now, ids)
    for key, value in items:
        work.take(key, value)
    return work.finished(also_awaited)


class _Work:
    def __init__(self, header: Header, epoch: int, now: datetime, ids: Ids) -> None:
        self._header = header
        self._epoch = epoch
        self._floor = epoch * NUMBERS_PER_S
        self._now = now
        self._ids = ids
        self._puts: list[Put] = []
        self._left_out: list[str] = []
        self._cluster: Cluster | None = None
        self._seq = 0
        self._ended: list[Operation] = []
        self._nodes: list[str] = []
        self._vms = 0

    def take(self, key: str, value: bytes) -> None:
        try:
            self._take(key, value)
        except RecordUnreadable:
            self._left_out.append(key)

    def _take(self, key: str, value: bytes) -> None:
        if key == keys.LEADER or key.startswith(keys.REPLICAS):
            return
        if key == keys.MARK:
            self._seq = unpack(value, Applied).seq
        elif keys.holds_record(key):
            self._record(key, unpack(value, keys.record_kind(key)), value)
        else:
            self._puts.append(Put(key, value))

    def _record(self, key: str, record: Record, value: bytes) -> None:
        if isinstance(record, Cluster):
            self._cluster = record
        elif isinstance(record, Vm):
            self._vms += 1
            self._puts.append(Put(key, pack(self._vm(record))))
        elif isinstance(record, Node):
            self._nodes.append(record.name)
            self._puts.append(Put(key, pack(self._node(record))))
        elif isinstance(record, Operation):
            self._ended.append(self._operation(record))
        elif isinstance(record, Admission) and record.revoked_at is None:
            # Nodes have renewed their certificates since: the next renewal notes them anew.
            return
        elif isinstance(record, JoinToken):
            # It may have been used since, and would let somebody in a second time.
            return
        else:
            self._puts.append(Put(key, value))

    def _vm(self, vm: Vm) -> Vm:
        """Keep what was wanted of a VM, and where it was; hold everything else back.

        Whoever was to move it, or to sweep what it had left, has nodes to hear first. Of a VM that
        is being deleted nothing is to stay.
        """
        status = vm.status
        return replace(
            vm,
            updated_at=self._now,
            request=None,
            request_number=max(vm.request_number, self._floor),
            status=replace(
                status,
                generation=max(status.generation, self._floor),
                answered_request=max(status.answered_request, self._floor),
                observed_revision=0,
                crashes=0,
                not_before=None,
                fault=None,
                migration=None,
                leftovers=status.leftovers if vm.deleting else (),
                has_run=may_have_run(vm),
                unproven=Unproven(nodes=nodes_of(vm)),
            ),
        )

    def _node(self, node: Node) -> Node:
        return replace(
            node,
            updated_at=self._now,
            state=NodeState.SILENT,
            state_since=self._now,
            recovery=NodeRecovery(),
        )

    def _operation(self, operation: Operation) -> Operation:
        state = advance(OPERATION_TRANSITIONS, operation.state, OperationEvent.FAILED)
        return replace(operation, state=state, error=self._restored(), updated_at=self._now)

    def _restored(self) -> Problem:
        return problem(
            "restored",
            f"it was under way when the backup of {self._header.made_at:%Y-%m-%d %H:%M:%S} was "
            "made, from which the cluster was restored: look at what it was about, and ask again",
        )

    def finished(self, also_awaited: Sequence[str]) -> Restoration:
        if self._cluster is None:
            raise RecordUnreadable("the backup holds no cluster")
        new = [name for name in dict.fromkeys(also_awaited) if name not in self._nodes]
        for name in new:
            node = self._unknown_node(name)
            self._puts.append(Put(keys.record_key(node), pack(node)))
        cluster = replace(
            self._cluster,
            epoch=self._epoch,
            # What holds the restored VMs back is of this level: no older release may lead.
            schema_level=SCHEMA_LEVEL,
            restored=Restored(backup_at=self._header.made_at, at=self._now),
        )
        history = self._history(cluster)
        self._puts += [Put(keys.history_key(entry.seq), pack(entry)) for entry in history]
        mark = Applied(group=self._ids.new("group"), seq=history[-1].seq)
        return Restoration(
            cluster=cluster,
            mark=mark,
            puts=tuple(self._puts),
            vms=self._vms,
            nodes=(*self._nodes, *new),
            ended=len(self._ended),
            left_out=tuple(self._left_out),
        )

    def _history(self, cluster: Cluster) -> list[HistoryEntry]:
        """Return what the restore adds to history, after a gap that nothing else can fall into."""
        seq = max(self._seq, self._epoch * ENTRIES_PER_S)
        audit = AuditRecord(
            seq=seq + 1,
            id=self._ids.new("audit"),
            action="cluster.restore",
            object=cluster.id,
            at=self._now,
            by=BY,
        )
        event = Event(
            seq=seq + 2,
            id=self._ids.new("event"),
            kind="cluster.restored",
            object=cluster.id,
            at=self._now,
            by=BY,
            data={
                "backup_at": self._header.made_at.isoformat(),
                "backup_revision": f"{self._header.epoch}.{self._header.revision}",
                "epoch": self._epoch,
                "vms": self._vms,
                "operations_ended": len(self._ended),
            },
        )
        ended = [
            FinishedOperation(seq=seq + position, operation=operation)
            for position, operation in enumerate(self._ended, start=3)
        ]
        return [audit, event, *ended]

    def _unknown_node(self, name: str) -> Node:
        """Return a node of which only its name is known: it joined after the backup."""
        return Node(
            id=self._ids.new("node"),
            name=name,
            created_at=self._now,
            updated_at=self._now,
            state_since=self._now,
        )
