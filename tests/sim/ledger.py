"""What the world saw, apart from the product: commits replayed, guests started and ended.

Owns the facts that the invariants compare. It decodes records with the product's model and uses
nothing else of it. Every event is first judged against all that came before, then taken in.
"""

from __future__ import annotations

from bisect import bisect_right

from msgspec import Struct

from controlplane.store import keys
from shared.codec import unpack
from shared.model import (
    AttemptState,
    FinishedOperation,
    HistoryEntry,
    IdempotencyRecord,
    LeaderKey,
    Node,
    Operation,
    Power,
    Record,
    RequestKind,
    Vm,
    attempt_generation,
)
from shared.moves import MigrationStage


class Committed(Struct, frozen=True):
    """One revision; a record of None was deleted. ``writer`` is a process's incarnation."""

    revision: int
    writer: str
    leader: LeaderKey | str | None = ""
    records: tuple[tuple[type[Record], str, Record | None], ...] = ()
    history: tuple[HistoryEntry, ...] = ()
    trimmed: tuple[int, ...] = ()

    @property
    def changes_state(self) -> bool:
        return bool(self.records or self.history or self.trimmed)


class Started(Struct, frozen=True):
    """A guest of this VM and generation began to run; told by the hypervisor's model.

    ``paused``: it has come as a user has paused it, and has not run one instruction here.
    """

    node: str
    boot_id: str
    vm_id: str
    generation: int
    paused: bool = False


class Left(Struct, frozen=True):
    """A guest stands still, neither running nor ended: it may go on elsewhere, or was held."""

    node: str
    vm_id: str
    generation: int


class Arrived(Struct, frozen=True):
    """All of a guest has come to a node; whether it goes on there is still to be seen."""

    node: str
    vm_id: str
    generation: int


class SetOut(Struct, frozen=True):
    """An agent begins to move a guest away, to run on as this generation."""

    node: str
    vm_id: str
    generation: int


class StillRuns(Struct, frozen=True):
    """A guest that libvirt let go on runs on, with agent and libvirtd up for so long."""

    node: str
    vm_id: str
    generation: int
    attended_s: float


class Resumed(Struct, frozen=True):
    """A guest that stood still goes on; ``by_libvirt``: of its own accord."""

    node: str
    vm_id: str
    generation: int
    by_libvirt: bool


class Ended(Struct, frozen=True):
    """A guest runs no more; ``by_agent``: because an agent asked for its end."""

    node: str
    vm_id: str
    generation: int
    by_agent: bool


class Erased(Struct, frozen=True):
    """A domain of a VM was removed from its node; or its volume, from a pool that others share."""

    node: str
    vm_id: str
    volume: str = ""
    shared: bool = False


class Restarting(Struct, frozen=True):
    """An agent asks libvirt to reboot or to reset a guest."""

    node: str
    vm_id: str
    generation: int


class Pausing(Struct, frozen=True):
    """An agent asks libvirt to have a guest stand still until it is told otherwise."""

    node: str
    vm_id: str
    generation: int


class DeleteAsked(Struct, frozen=True):
    """A client is about to ask for a VM's deletion; from now on it may go."""

    vm_id: str


class ToldGone(Struct, frozen=True):
    """A client that meant to change a VM was told that there is none."""

    vm_id: str


class Acknowledged(Struct, frozen=True):
    """A client was told that its operation is accepted; ``key``: which it had sent with it."""

    operation_id: str
    vm_id: str
    key: str = ""


class Viewed(Struct, frozen=True):
    """A client was shown the VMs as of a revision, each at its own; it had asked for ``floor``."""

    revision: int
    floor: int
    vms: tuple[tuple[str, int], ...] = ()


class Measured(Struct, frozen=True):
    """How much of something a process holds, and how much it may."""

    incarnation: str
    what: str
    count: int
    limit: int


class RecordsLost(Struct, frozen=True):
    """etcd's data are gone, and with them every right that a record gave; guests and disks stay."""


class Died(Struct, frozen=True):
    """A process ended, or a callback failed, by an error of its own."""

    incarnation: str
    error: str


SimEvent = (
    Committed
    | Started
    | Left
    | Arrived
    | SetOut
    | StillRuns
    | Resumed
    | Ended
    | Erased
    | Restarting
    | Pausing
    | DeleteAsked
    | ToldGone
    | Acknowledged
    | Viewed
    | Measured
    | RecordsLost
    | Died
)
Attempts = tuple[str, int]
# What may be done ("end", "pause", "remove"), to which VM, and its generation or the node's id.
Right = tuple[str, str, int | str]


class Ledger:
    """The replayed cluster. ``nodes`` and ``vms`` are as etcd has them, by id."""

    def __init__(self) -> None:
        self.revision = 0
        self.leader: LeaderKey | None = None
        self.vms: dict[str, Vm] = {}
        self.nodes: dict[str, Node] = {}
        # The name of every node there ever was, by id: it outlives a loss of its record.
        self.names: dict[str, str] = {}
        self.operations: dict[str, Operation] = {}
        self.finished: dict[str, Operation] = {}
        self.last_seq = 0
        self.permits: dict[Attempts, tuple[str, str]] = {}
        self.stoppable: dict[Attempts, None] = {}
        # A VM, and the node's id on which something of it may go; empty: on every node.
        self.removable: dict[tuple[str, str], None] = {}
        self.started: dict[Attempts, str] = {}
        # Where a generation's guest has been, whether it ran or only stood still there.
        self.seen: dict[Attempts, str] = {}
        self.ran: dict[Attempts, None] = {}
        self.set_out: dict[Attempts, str] = {}
        self.running: dict[tuple[str, str], int] = {}
        self.acknowledged: dict[str, str] = {}
        self.delete_asked: dict[str, None] = {}
        self.deleted: dict[str, None] = {}
        # On which nodes the state that a VM's guest has come to is whole: where it ran last, and
        # where it stands still on arrival. Empty for one that has never run.
        self.seats: dict[str, dict[str, None]] = {}
        # Attempts that a user has paused; and those on the move, which libvirt has stand still.
        self.pausable: dict[Attempts, None] = {}
        self.movable: dict[Attempts, None] = {}
        # The numbers of the requests to restart a guest, and how often agents have done so.
        self.restarts_asked: dict[Attempts, dict[int, None]] = {}
        self.restarts_made: dict[Attempts, int] = {}
        # At which revisions a VM was written; its deletion is the last.
        self.written: dict[str, list[int]] = {}
        # What a request under an idempotency key became: by the key's record, by the client's key.
        self.keys: dict[str, str] = {}
        self.answers: dict[str, str] = {}
        # From a loss of etcd's data until a restore has let go of the leader key.
        self.restoring = False
        self._earlier: dict[Right, None] = {}

    def take(self, event: SimEvent) -> None:
        if isinstance(event, Committed):
            self._commit(event)
        elif isinstance(event, Started | Resumed | Left | Ended):
            self._guest(event)
        elif isinstance(event, Arrived):
            self.seen[event.vm_id, event.generation] = event.node
            self.seats.setdefault(event.vm_id, {})[event.node] = None
        elif isinstance(event, SetOut):
            self.set_out[event.vm_id, event.generation] = event.node
        elif isinstance(event, Erased):
            if event.volume:
                self.seats.get(event.vm_id, {}).pop(event.node, None)
        elif isinstance(event, Restarting):
            attempt = (event.vm_id, event.generation)
            self.restarts_made[attempt] = self.restarts_made.get(attempt, 0) + 1
        elif isinstance(event, DeleteAsked):
            self.delete_asked[event.vm_id] = None
        elif isinstance(event, Acknowledged):
            self.acknowledged[event.operation_id] = event.vm_id
            if event.key:
                self.answers[event.key] = event.operation_id
        elif isinstance(event, RecordsLost):
            self._lose()

    def _lose(self) -> None:
        """Forget what records said; what has happened on nodes stays, and what they were told."""
        for records in (self.vms, self.nodes, self.operations, self.finished, self.acknowledged):
            records.clear()
        for told in (self.deleted, self.written, self.keys, self.answers):
            told.clear()
        self.leader = None
        self.restoring = True

    def _begin_anew(self) -> None:
        """From the end of a restore on, what its records say entitles, and nothing of before."""
        self.restoring = False
        self._earlier = {
            **{("end", *attempt): None for attempt in self.stoppable},
            **{("pause", *attempt): None for attempt in (*self.pausable, *self.movable)},
            **{("remove", *part): None for part in self.removable},
        }
        for rights in (self.stoppable, self.pausable, self.movable, self.removable):
            rights.clear()
        for vm in self.vms.values():
            self._note_rights(vm)

    @property
    def ends_wanted_earlier(self) -> set[Attempts]:
        """Return the attempts that somebody had wanted to end when the records were lost."""
        return {(vm, int(which)) for right, vm, which in self._earlier if right == "end"}

    def has_earlier(self, node_name: str, *rights: Right) -> bool:
        """Tell whether records of before a restore gave a node one of these rights.

        They hold for one that has not told since: its agent may not have heard of the restore.
        """
        told = any(n.name == node_name and n.recovery.told for n in self.nodes.values())
        return not told and any(right in self._earlier for right in rights)

    def _guest(self, event: Started | Resumed | Left | Ended) -> None:
        attempt = (event.vm_id, event.generation)
        if isinstance(event, Started | Resumed):
            self.running[event.node, event.vm_id] = event.generation
        else:
            self.running.pop((event.node, event.vm_id), None)
        if isinstance(event, Started):
            self.started[attempt] = event.node
        if isinstance(event, Started | Left | Ended):
            self.seen[attempt] = event.node
        if isinstance(event, Started) and not event.paused:
            self.ran[attempt] = None
        stands = isinstance(event, Left) or (isinstance(event, Started) and event.paused)
        # What libvirt lets go on beside another is held again: it is neither newer nor older.
        returned = isinstance(event, Resumed) and event.by_libvirt
        if stands:
            self.seats.setdefault(event.vm_id, {})[event.node] = None
        elif not isinstance(event, Ended) and not returned:
            self.seats[event.vm_id] = {event.node: None}

    def _commit(self, commit: Committed) -> None:
        self.revision = commit.revision
        if not isinstance(commit.leader, str):
            self.leader = commit.leader
        for kind, record_id, record in commit.records:
            self._record(kind, record_id, record)
            if kind is Vm:
                self.written.setdefault(record_id, []).append(commit.revision)
        for entry in commit.history:
            self.last_seq = max(self.last_seq, entry.seq)
            if isinstance(entry, FinishedOperation):
                self.finished.setdefault(entry.operation.id, entry.operation)
        if self.restoring and commit.leader is None:
            self._begin_anew()

    def _record(self, kind: type[Record], record_id: str, record: Record | None) -> None:
        if isinstance(record, Vm):
            self.vms[record_id] = record
            self._note_rights(record)
        elif isinstance(record, Node):
            self.nodes[record_id] = record
            self.names[record_id] = record.name
        elif isinstance(record, Operation):
            self.operations[record_id] = record
        elif isinstance(record, IdempotencyRecord):
            self.keys[record_id] = record.result
        elif record is None:
            if kind is Vm:
                self.removable[record_id, ""] = None
                self.deleted[record_id] = None
            for table in (self.vms, self.nodes, self.operations):
                table.pop(record_id, None)

    def vms_at(self, revision: int) -> dict[str, int]:
        """Return which VMs there were at a revision, and when each was written last by then."""
        found: dict[str, int] = {}
        for vm_id, revisions in self.written.items():
            position = bisect_right(revisions, revision)
            gone = vm_id in self.deleted and position == len(revisions)
            if position and not gone:
                found[vm_id] = revisions[position - 1]
        return found

    def _note_rights(self, vm: Vm) -> None:
        """Remember what this record entitles its node to do, now or later."""
        attempt = vm.status.attempt
        if attempt is not None:
            self.permits.setdefault((vm.id, attempt.generation), (attempt.node, attempt.boot_id))
        if vm.deleting:
            self.removable[vm.id, ""] = None
        if vm.spec.power is Power.PAUSED:
            self.pausable[vm.id, attempt_generation(vm)] = None
        request = vm.request
        if request is not None and request.kind in (RequestKind.REBOOT, RequestKind.RESET):
            asked = self.restarts_asked.setdefault((vm.id, request.generation), {})
            asked[request.number] = None
        self._note_moves(vm)
        if vm.deleting or vm.spec.power is Power.STOPPED:
            self.stoppable[vm.id, attempt_generation(vm)] = None

    def _note_moves(self, vm: Vm) -> None:
        """Remember what an open migration, or what is left of one, entitles its nodes to."""
        for left in vm.status.leftovers:
            self.stoppable[vm.id, left.generation] = None
            self.removable[vm.id, left.node] = None
        claim = vm.status.migration
        if claim is not None:
            self.movable[vm.id, claim.source_generation] = None
            self.movable[vm.id, claim.generation] = None
        if claim is None or claim.destination is None or not claim.generation:
            return
        self.permits.setdefault((vm.id, claim.generation), (claim.destination, claim.boot_id))
        if claim.stage in (MigrationStage.PREPARE, MigrationStage.CLEAN):
            self.removable[vm.id, claim.destination] = None
        if claim.stage is MigrationStage.CLEAN:
            self.stoppable[vm.id, claim.generation] = None
        if claim.stage is MigrationStage.FINALIZE:
            self.stoppable[vm.id, claim.source_generation] = None
            self.removable[vm.id, claim.source] = None


def attempt_is_open(vm: Vm) -> bool:
    attempt = vm.status.attempt
    return attempt is not None and attempt.state is not AttemptState.ENDED


def committed(revision: int, writer: str, changes: list[tuple[str, bytes | None]]) -> Committed:
    """Decode one revision of etcd; a value of None is a deletion."""
    leader: LeaderKey | str | None = ""
    records: list[tuple[type[Record], str, Record | None]] = []
    history: list[HistoryEntry] = []
    trimmed: list[int] = []
    for key, value in changes:
        if key == keys.LEADER:
            leader = None if value is None else unpack(value, LeaderKey)
        elif key.startswith(keys.HISTORY):
            if value is None:
                trimmed.append(keys.history_seq(key))
            else:
                history.append(unpack(value, HistoryEntry))  # type: ignore[arg-type]
        elif keys.holds_record(key):
            kind, record_id = keys.record_of(key)
            records.append((kind, record_id, None if value is None else unpack(value, kind)))
    history.sort(key=lambda entry: entry.seq)
    return Committed(revision, writer, leader, tuple(records), tuple(history), tuple(trimmed))
