"""What the API answers with: the records as a client sees them.

Views are made for one answer and never stored. Revisions and ids in them are opaque strings, made
by ``revisions.py``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from msgspec import Struct

from controlplane.services.revisions import event_id, object_revision
from controlplane.state import Stored
from controlplane.store.port import Room
from controlplane.telemetry.progress import Progress as Progress
from controlplane.telemetry.progress import ProgressFrame
from shared.admission import Issued
from shared.errors import FieldError
from shared.model import (
    AuditRecord,
    Condition,
    Event,
    Inventory,
    Labels,
    NodeState,
    Operation,
    OperationState,
    OperationStep,
    Problem,
    StepState,
    Vm,
    VmPhase,
    VmSpec,
    attempt_generation,
)
from shared.moves import DrainJournal, MigrationFigures, MigrationJournal
from shared.states import OPERATION_ENDS, vm_phase


class VmStatusView(Struct, frozen=True, kw_only=True):
    """``migration`` is the operation that moves it; ``left_on`` are nodes not swept of it yet."""

    phase: VmPhase
    node: str | None
    node_name: str | None
    generation: int
    addresses: tuple[str, ...]
    observed_revision: str
    conditions: tuple[Condition, ...]
    fault: Problem | None
    migration: str | None
    left_on: tuple[str, ...]


class VmView(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    tenant: str
    labels: Labels
    revision: str
    created_at: datetime
    updated_at: datetime
    spec: VmSpec
    status: VmStatusView


class VmList(Struct, frozen=True, kw_only=True):
    items: tuple[VmView, ...]
    next_cursor: str | None
    revision: str


class Allocated(Struct, frozen=True, kw_only=True):
    """What a node's VMs take of it, as placement counts: with QEMU's overhead of memory.

    ``vms`` counts all that are bound to the node, also those that are stopped and take nothing.
    """

    vcpus: int
    memory_mib: int
    vms: int


class NodeView(Struct, frozen=True, kw_only=True):
    """``must_tell``: nothing new goes there before it has told, after a restore, what it has.

    ``gone``: an operator has said so. ``unrecorded_vms`` run or rest there, and no record is of
    them.
    """

    id: str
    name: str
    labels: Labels
    created_at: datetime
    updated_at: datetime
    revision: str
    cordoned: bool
    cordon_reason: str
    state: NodeState
    state_since: datetime
    address: str
    boot_id: str
    inventory: Inventory | None
    foreign_domains: tuple[str, ...]
    must_tell: bool
    gone: bool
    unrecorded_vms: tuple[str, ...]
    allocated: Allocated


class JoinTokenView(Struct, frozen=True, kw_only=True):
    """``nodes``: who may join with it, any if there are none; ``used_by``: who did."""

    id: str
    nodes: tuple[str, ...]
    needs_approval: bool
    created_at: datetime
    created_by: str
    expires_at: datetime
    used_by: str


class NewJoinTokenView(JoinTokenView, frozen=True, kw_only=True):
    """``token`` is what the node shows; it is told this one time."""

    token: str


class JoinTokenList(Struct, frozen=True, kw_only=True):
    items: tuple[JoinTokenView, ...]
    next_cursor: str | None
    revision: str


class AdmissionView(Struct, frozen=True, kw_only=True):
    """``expires_at`` is when the node's newest certificate ends; it is renewed long before.

    A node has no other id before it has joined than its name.
    """

    id: str
    name: str
    address: str
    approved: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    reason: str
    join_token: str


class AdmissionList(Struct, frozen=True, kw_only=True):
    items: tuple[AdmissionView, ...]
    next_cursor: str | None
    revision: str


class EnrolmentView(Struct, frozen=True, kw_only=True):
    """``certificates`` are there once the node is approved: it asks again until then."""

    approved: bool
    certificates: Issued | None


class NodeList(Struct, frozen=True, kw_only=True):
    items: tuple[NodeView, ...]
    next_cursor: str | None
    revision: str


class OperationView(Struct, frozen=True, kw_only=True):
    """``target`` is the id of what the operation works on; ``by`` asked for it.

    ``details`` are a migration's or a drain's; ``parent`` is the drain that asked for a migration.
    """

    id: str
    kind: str
    target: str
    tenant: str
    state: OperationState
    phase: str
    steps: tuple[OperationStep, ...]
    progress: Progress | None
    error: Problem | None
    by: str
    created_at: datetime
    updated_at: datetime
    deadline_at: datetime
    cancellable: bool
    parent: str | None
    details: MigrationJournal | DrainJournal | None


class OperationList(Struct, frozen=True, kw_only=True):
    items: tuple[OperationView, ...]
    next_cursor: str | None
    revision: str


class EventView(Struct, frozen=True, kw_only=True):
    """``id`` is where to go on from (``since``); ``seq`` is dense over all of history."""

    id: str
    seq: int
    kind: str
    object: str
    tenant: str
    at: datetime
    by: str
    data: dict[str, Any]


class EventList(Struct, frozen=True, kw_only=True):
    items: tuple[EventView, ...]
    next_cursor: str | None
    revision: str


class ProgressFrameView(Struct, frozen=True, kw_only=True):
    """One frame of progress on the event stream: no part of history, and without an id."""

    operation: str
    kind: str
    target: str
    detail: str
    progress: Progress


class AuditView(Struct, frozen=True, kw_only=True):
    """``id`` is where to go on from (``since``); ``action`` is what was asked for, by whom."""

    id: str
    seq: int
    action: str
    object: str
    tenant: str
    at: datetime
    by: str
    request_id: str


class AuditList(Struct, frozen=True, kw_only=True):
    items: tuple[AuditView, ...]
    next_cursor: str | None
    revision: str


class ReasonView(Struct, frozen=True, kw_only=True):
    code: str
    message: str


class CandidateView(Struct, frozen=True, kw_only=True):
    node: str
    node_name: str
    fits: bool
    score: float
    reasons: tuple[ReasonView, ...]
    scores: dict[str, float]


class PlacementView(Struct, frozen=True, kw_only=True):
    """The node that would be chosen now, and every node's answer, best first.

    ``refusals`` counts, by reason, the nodes that gave it.
    """

    node: str | None
    node_name: str | None
    candidates: tuple[CandidateView, ...]
    refusals: dict[str, int]
    revision: str


class MigrationView(Struct, frozen=True, kw_only=True):
    """A migration as its operation tells it; nodes are ids, each with its name when it is known.

    ``id`` is the operation's; ``figures`` are there once it has moved.
    """

    id: str
    vm: str
    vm_name: str | None
    tenant: str
    source: str
    source_name: str | None
    destination: str | None
    destination_name: str | None
    generation: int
    state: OperationState
    phase: str
    steps: tuple[OperationStep, ...]
    progress: Progress | None
    figures: MigrationFigures | None
    error: Problem | None
    by: str
    parent: str | None
    created_at: datetime
    updated_at: datetime


class MigrationList(Struct, frozen=True, kw_only=True):
    items: tuple[MigrationView, ...]
    next_cursor: str | None
    revision: str


class PlannedVm(Struct, frozen=True, kw_only=True):
    """What would become of one VM; ``reasons`` say why it cannot be done, when it cannot.

    ``node`` is where it is bound now, ``target`` where it would be; ``vm`` is null for one that is
    not made yet.
    """

    vm: str | None
    vm_name: str
    action: str
    node: str | None
    node_name: str | None
    target: str | None
    target_name: str | None
    reasons: tuple[ReasonView, ...]
    placement: PlacementView | None


class PlanView(Struct, frozen=True, kw_only=True):
    """What a write would do (``dry_run=true``); ``kind`` is the operation's it would open.

    ``blocked`` counts the VMs with reasons why it cannot be done.
    """

    kind: str
    vms: tuple[PlannedVm, ...]
    blocked: int
    revision: str


class LeaderView(Struct, frozen=True, kw_only=True):
    """``since`` is null for a leader of a release that does not tell."""

    replica: str
    url: str
    term: str
    since: datetime | None


class ReplicaView(Struct, frozen=True, kw_only=True):
    name: str
    url: str
    agent_address: str
    version: str


class MemberView(Struct, frozen=True, kw_only=True):
    """A member of etcd. ``raft_term`` and ``revision`` are how far it is, to be compared with the
    others'; what compaction has freed of the database is no longer in use, and comes back when the
    member is defragmented. ``problem`` says what is wrong with it, if anything is.
    """

    id: str
    endpoint: str
    reachable: bool
    version: str
    is_leader: bool
    raft_term: int
    revision: int
    db_size_bytes: int
    db_in_use_bytes: int
    alarms: tuple[str, ...]
    problem: str


class StoreView(Struct, frozen=True, kw_only=True):
    """What the store still takes, as the replica that was asked has last seen (10 s at most)."""

    room: Room
    detail: str


class NodeCounts(Struct, frozen=True, kw_only=True):
    ready: int
    silent: int


class RestoreView(Struct, frozen=True, kw_only=True):
    """The last restore from a backup, and how far the cluster has recovered from it.

    While ``recovering`` nothing is started, bound or moved: ``waits_for`` names nodes that have to
    tell what they have (100 at most), ``gone`` those that nobody waits for any more. ``unproven``
    VMs are left alone until it is known where they are; ``unrecorded`` ones no record is of.
    """

    backup_at: datetime
    at: datetime
    recovering: bool
    waits_for: tuple[str, ...]
    gone: tuple[str, ...]
    unproven: int
    unrecorded: int


class ClusterView(Struct, frozen=True, kw_only=True):
    """``vms`` counts those of the asker's tenant; ``leader`` is null while nobody leads.

    ``upgrade_pending``: what is new in this release waits for the upgrade to be finalized, and that
    for ``upgrade_blockers``: replicas and nodes that are still of an older one.
    """

    id: str
    cell: str
    epoch: int
    version: str
    schema_level: int
    upgrade_pending: bool
    upgrade_blockers: tuple[FieldError, ...]
    leader: LeaderView | None
    replicas: tuple[ReplicaView, ...]
    members: tuple[MemberView, ...]
    store: StoreView
    nodes: NodeCounts
    vms: int
    restore: RestoreView | None
    revision: str


class Figures(Struct, frozen=True, kw_only=True):
    """Percent (of one CPU; of time, for pressure), bytes, bytes and requests per second."""

    cpu_percent: float
    memory_bytes: float
    memory_available_bytes: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    disk_read_requests_per_s: float
    disk_write_requests_per_s: float
    network_receive_bytes_per_s: float
    network_transmit_bytes_per_s: float
    cpu_pressure_percent: float
    memory_pressure_percent: float
    io_pressure_percent: float


class SeriesView(Struct, frozen=True, kw_only=True):
    """The last ten minutes; ``series`` has a row per figure, one value for each date in ``at``."""

    object: str
    as_of: datetime | None
    period_s: float
    at: tuple[datetime, ...]
    series: dict[str, tuple[float, ...]]
    latest: Figures | None


class UsageView(Struct, frozen=True, kw_only=True):
    object: str
    name: str
    latest: Figures | None
    as_of: datetime | None


class UsageList(Struct, frozen=True, kw_only=True):
    items: tuple[UsageView, ...]
    next_cursor: str | None
    revision: str


def vm_view(stored: Stored[Vm], epoch: int, node_name: str | None) -> VmView:
    vm = stored.record
    status = vm.status
    return VmView(
        id=vm.id,
        name=vm.name,
        tenant=vm.tenant,
        labels=vm.labels,
        revision=object_revision(epoch, stored.revision),
        created_at=vm.created_at,
        updated_at=vm.updated_at,
        spec=vm.spec,
        status=VmStatusView(
            phase=vm_phase(vm),
            node=status.node,
            node_name=node_name,
            generation=attempt_generation(vm),
            addresses=status.addresses,
            observed_revision=object_revision(epoch, status.observed_revision),
            conditions=status.conditions,
            fault=status.fault,
            migration=None if status.migration is None else status.migration.operation,
            left_on=tuple(leftover.node for leftover in status.leftovers),
        ),
    )


def operation_view(operation: Operation, progress: Progress | None = None) -> OperationView:
    return OperationView(
        id=operation.id,
        kind=operation.kind,
        target=operation.target,
        tenant=operation.tenant,
        state=operation.state,
        phase=operation.phase,
        steps=operation.steps,
        progress=progress,
        error=operation.error,
        by=operation.by,
        created_at=operation.created_at,
        updated_at=operation.updated_at,
        deadline_at=operation.deadline_at,
        cancellable=is_cancellable(operation),
        parent=operation.parent,
        details=operation.saga,
    )


def is_cancellable(operation: Operation) -> bool:
    """Whether it can still be undone: a saga that has not passed its point of no return."""
    past = any(step.no_return and step.state is StepState.DONE for step in operation.steps)
    open_ = operation.saga is not None and operation.state not in OPERATION_ENDS
    return open_ and not operation.undoing and not past


def event_view(event: Event, epoch: int) -> EventView:
    return EventView(
        id=event_id(epoch, event.seq),
        seq=event.seq,
        kind=event.kind,
        object=event.object,
        tenant=event.tenant,
        at=event.at,
        by=event.by,
        data=event.data,
    )


def audit_view(record: AuditRecord, epoch: int) -> AuditView:
    return AuditView(
        id=event_id(epoch, record.seq),
        seq=record.seq,
        action=record.action,
        object=record.object,
        tenant=record.tenant,
        at=record.at,
        by=record.by,
        request_id=record.request_id,
    )


def progress_frame_view(frame: ProgressFrame, operation: Operation) -> ProgressFrameView:
    return ProgressFrameView(
        operation=operation.id,
        kind=operation.kind,
        target=operation.target,
        detail=frame.detail,
        progress=frame.progress,
    )
