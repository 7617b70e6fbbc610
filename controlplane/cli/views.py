"""The API's objects as the CLI reads them: only fields that it shows, each with a default.

Lenient on purpose, unlike the records of ``shared.model``: a CLI must show what an older or newer
control plane answers, so that unknown fields are ignored and missing ones are empty. ``-o json``
never goes through these; it prints what the API sent.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

Item = TypeVar("Item")


class FieldErrorView(Struct, frozen=True):
    pointer: str = ""
    code: str = ""
    message: str = ""


class ProblemView(Struct, frozen=True):
    title: str = ""
    status: int = 0
    code: str = ""
    detail: str = ""
    request_id: str = ""
    retryable: bool = False
    errors: tuple[FieldErrorView, ...] = ()


class Page(Struct, Generic[Item], frozen=True):
    """One page of a list; ``Page[msgspec.Raw]`` keeps the items as they were sent."""

    items: tuple[Item, ...]
    next_cursor: str | None = None
    revision: str = ""


class Listing(Struct, frozen=True):
    """A whole list as it is printed by ``-o json``."""

    items: tuple[msgspec.Raw, ...]
    revision: str


class Reference(Struct, frozen=True):
    """What every object has."""

    id: str
    name: str = ""


class JoinTokenView(Struct, frozen=True):
    """``token`` only in the answer to its making."""

    id: str = ""
    token: str = ""
    nodes: tuple[str, ...] = ()
    needs_approval: bool = False
    created_by: str = ""
    expires_at: datetime | None = None
    used_by: str = ""


class AdmissionView(Struct, frozen=True):
    name: str = ""
    address: str = ""
    approved: bool = False
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    reason: str = ""


class BootView(Struct, frozen=True):
    kernel: str = ""
    initrd: str | None = None
    cmdline: str = ""


class DiskView(Struct, frozen=True):
    name: str = ""
    size_gib: int = 0
    pool: str = ""


class NicView(Struct, frozen=True):
    network: str = ""
    mac: str | None = None


class GroupRuleView(Struct, frozen=True):
    group: str = ""
    topology: str = "node"
    hard: bool = True


class PlacementView(Struct, frozen=True):
    node_labels: dict[str, str] = {}
    affinity: tuple[GroupRuleView, ...] = ()
    anti_affinity: tuple[GroupRuleView, ...] = ()


class VmSpecView(Struct, frozen=True):
    vcpus: int = 0
    memory_mib: int = 0
    power: str = ""
    boot: BootView = BootView()
    disks: tuple[DiskView, ...] = ()
    nics: tuple[NicView, ...] = ()
    placement: PlacementView = PlacementView()


class ConditionView(Struct, frozen=True):
    type: str = ""
    status: bool = False
    reason: str = ""
    message: str = ""
    since: datetime | None = None


class VmStatusView(Struct, frozen=True):
    phase: str = "Unknown"
    node: str | None = None
    node_name: str | None = None
    generation: int = 0
    addresses: tuple[str, ...] = ()
    conditions: tuple[ConditionView, ...] = ()
    fault: ProblemView | None = None
    migration: str | None = None
    left_on: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """The phase, and whether it is being moved."""
        return f"{self.phase}, moving" if self.migration else self.phase

    @property
    def where(self) -> str:
        """The node's name, its id when it has none any more, or nothing."""
        return self.node_name or self.node or ""


class VmView(Struct, frozen=True):
    id: str
    name: str = ""
    tenant: str = ""
    labels: dict[str, str] = {}
    created_at: datetime | None = None
    updated_at: datetime | None = None
    spec: VmSpecView = VmSpecView()
    status: VmStatusView = VmStatusView()


class PoolView(Struct, frozen=True):
    name: str = ""
    capacity_gib: float = 0.0
    free_gib: float = 0.0


class CpuView(Struct, frozen=True):
    model: str = ""


class MigrationFactsView(Struct, frozen=True):
    tls: bool = False


class InventoryView(Struct, frozen=True):
    cpus: int = 0
    memory_mib: int = 0
    cpu: CpuView = CpuView()
    pools: tuple[PoolView, ...] = ()
    networks: tuple[str, ...] = ()
    artefacts: tuple[str, ...] = ()
    virtualization: str = ""
    migration: MigrationFactsView | None = None
    versions: dict[str, Any] = {}


class AllocatedView(Struct, frozen=True):
    vcpus: float = 0
    memory_mib: int = 0
    vms: int = 0


class NodeView(Struct, frozen=True):
    id: str
    name: str = ""
    labels: dict[str, str] = {}
    created_at: datetime | None = None
    state: str = "unknown"
    state_since: datetime | None = None
    cordoned: bool = False
    cordon_reason: str = ""
    address: str = ""
    boot_id: str = ""
    inventory: InventoryView | None = None
    must_tell: bool = False
    gone: bool = False
    unrecorded_vms: tuple[str, ...] = ()
    allocated: AllocatedView = AllocatedView()


class StepView(Struct, frozen=True):
    name: str = ""
    state: str = ""
    at: datetime | None = None


class ProgressView(Struct, frozen=True):
    percent: float | None = None
    eta_s: float | None = None


class VmLeftView(Struct, frozen=True):
    name: str = ""
    reason: str = ""


class OperationDetailsView(Struct, frozen=True):
    """``left``: a drain's VMs that are still there, and why."""

    left: tuple[VmLeftView, ...] = ()


class OperationView(Struct, frozen=True):
    id: str
    kind: str = ""
    target: str = ""
    state: str = "unknown"
    phase: str = ""
    steps: tuple[StepView, ...] = ()
    progress: ProgressView | None = None
    error: ProblemView | None = None
    by: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deadline_at: datetime | None = None
    parent: str | None = None
    cancellable: bool = False
    details: OperationDetailsView | None = None

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}


class MigrationFiguresView(Struct, frozen=True):
    total_ms: int = 0
    downtime_ms: int = 0
    transferred_bytes: int = 0


class MigrationView(Struct, frozen=True):
    id: str
    vm: str = ""
    vm_name: str | None = None
    source: str = ""
    source_name: str | None = None
    destination: str | None = None
    destination_name: str | None = None
    state: str = "unknown"
    phase: str = ""
    steps: tuple[StepView, ...] = ()
    progress: ProgressView | None = None
    figures: MigrationFiguresView | None = None
    error: ProblemView | None = None
    parent: str | None = None
    by: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None


class EventView(Struct, frozen=True):
    id: str
    kind: str = ""
    object: str = ""
    at: datetime | None = None
    by: str = ""
    data: dict[str, Any] = {}


class PlaceView(Struct, frozen=True):
    id: str = ""
    detail: str = ""


class ReasonView(Struct, frozen=True):
    code: str = ""
    message: str = ""


class CandidateView(Struct, frozen=True):
    node: str = ""
    node_name: str = ""
    fits: bool = False
    score: float | None = None
    reasons: tuple[ReasonView, ...] = ()
    scores: dict[str, float] = {}


class PlanView(Struct, frozen=True):
    node: str | None = None
    node_name: str | None = None
    candidates: tuple[CandidateView, ...] = ()
    refusals: dict[str, int] = {}


class PlannedVmView(Struct, frozen=True):
    vm_name: str = ""
    action: str = ""
    node: str | None = None
    node_name: str | None = None
    target: str | None = None
    target_name: str | None = None
    reasons: tuple[ReasonView, ...] = ()
    placement: PlanView | None = None


class DryRunView(Struct, frozen=True):
    kind: str = ""
    vms: tuple[PlannedVmView, ...] = ()
    blocked: int = 0


class LeaderView(Struct, frozen=True):
    replica: str = ""
    url: str = ""
    term: Any = None
    since: datetime | None = None


class ReplicaView(Struct, frozen=True):
    name: str = ""
    url: str = ""
    agent_address: str = ""
    version: str = ""


class MemberView(Struct, frozen=True):
    endpoint: str = ""
    reachable: bool = False
    version: str = ""
    is_leader: bool = False
    raft_term: int = 0
    revision: int = 0
    db_size_bytes: int = 0
    db_in_use_bytes: int = 0
    alarms: tuple[str, ...] = ()
    problem: str = ""


class StoreView(Struct, frozen=True):
    room: str = ""
    detail: str = ""


class RestoreView(Struct, frozen=True):
    backup_at: datetime
    at: datetime
    recovering: bool = False
    waits_for: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    unproven: int = 0
    unrecorded: int = 0


class ClusterView(Struct, frozen=True):
    id: str
    cell: str = ""
    epoch: int = 0
    version: str = ""
    schema_level: int = 0
    upgrade_pending: bool = False
    upgrade_blockers: tuple[FieldErrorView, ...] = ()
    leader: LeaderView | None = None
    replicas: tuple[ReplicaView, ...] = ()
    members: tuple[MemberView, ...] = ()
    store: StoreView = StoreView()
    nodes: dict[str, int] = {}
    vms: int = 0
    restore: RestoreView | None = None


class FiguresView(Struct, frozen=True):
    """Figures of one object: percent, bytes, bytes per second; None where nothing is known yet."""

    cpu_percent: float | None = None
    memory_bytes: float | None = None
    disk_read_bytes_per_s: float | None = None
    disk_write_bytes_per_s: float | None = None
    network_receive_bytes_per_s: float | None = None
    network_transmit_bytes_per_s: float | None = None


class UsageView(Struct, frozen=True):
    object: str = ""
    name: str = ""
    latest: FiguresView | None = None
    as_of: datetime | None = None
