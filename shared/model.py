"""The records: what is stored in etcd, sent to agents and rendered as JSON.

Every field has a default or a value from birth on, so that a reader of release N understands a
record of N-1. Enums decode values they do not know to UNKNOWN. Constraints that a single field can
state are stated here and end up in the API's schema; rules across fields are in
``controlplane/services/validation.py``. A record is a tree and never part of a cycle: the garbage
collector follows none of them, which would hold the loop up for longer with each (``gc=False``).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from msgspec import Meta, Struct

from shared.errors import FieldError
from shared.moves import (
    DrainJournal,
    Leftover,
    MigrationClaim,
    MigrationJournal,
    MigrationStage,
)
from shared.open_enum import OpenEnum
from shared.restores import NodeRecovery, Restored, Unproven

# Level 2 (0.2.0): sagas, migration claims, leftovers. Older readers would drop them unseen.
SCHEMA_LEVEL = 2
DEFAULT_TENANT = "default"

Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        description="lowercase letters, digits, dots and hyphens; starts and ends with one of "
        "the first two",
    ),
]
LabelValue = Annotated[str, Meta(max_length=63, pattern=r"^[A-Za-z0-9._-]*$")]
Labels = Annotated[dict[Name, LabelValue], Meta(max_length=32)]


class Power(OpenEnum):
    """What a user wants of a VM."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


class ObservedPower(OpenEnum):
    """What an agent saw of a VM's domain; CRASHED and FAILED are ways of not running.

    SHUT_OFF means that the guest powered itself off; STOPPED, that it was stopped from outside or
    never started; FAILED, that a start was tried and libvirt refused it.
    """

    ABSENT = "absent"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    SHUT_OFF = "shut_off"
    CRASHED = "crashed"
    FAILED = "failed"
    UNKNOWN = "unknown"


class VmPhase(OpenEnum):
    """One word for people; derived from the record by ``shared.states.vm_phase``."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    PAUSED = "Paused"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    CRASHED = "Crashed"
    DELETING = "Deleting"
    UNKNOWN = "Unknown"


class AttemptState(OpenEnum):
    """How far one attempt to run a VM on one node has come."""

    PERMITTED = "permitted"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


class NodeState(OpenEnum):
    """Whether the control plane hears a node; SILENT is never read as dead."""

    READY = "ready"
    SILENT = "silent"
    UNKNOWN = "unknown"


class OperationState(OpenEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class StepState(OpenEnum):
    """``running`` is written before a step's first side effect, ``undoing`` before its undo's."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UNDOING = "undoing"
    UNDONE = "undone"
    UNKNOWN = "unknown"


class RequestKind(OpenEnum):
    """One-shot actions that an agent answers once."""

    SHUTDOWN = "shutdown"
    REBOOT = "reboot"
    RESET = "reset"
    UNKNOWN = "unknown"


class MigrationPolicy(OpenEnum):
    NEVER_DISRUPT = "never-disrupt"
    UNKNOWN = "unknown"


class Topology(OpenEnum):
    """The failure domain that an affinity rule speaks of."""

    NODE = "node"
    UNKNOWN = "unknown"


class Term(Struct, frozen=True, order=True, array_like=True):
    """A leadership: (epoch, create revision of the leader key). Later terms compare greater."""

    epoch: int
    revision: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.revision}"


class Record(Struct, frozen=True, kw_only=True, gc=False):
    """What has a key of its own in etcd."""

    id: str


class BootSpec(Struct, frozen=True, kw_only=True, gc=False):
    """Direct kernel boot from artefacts that nodes hold under these names."""

    kernel: Name
    initrd: Name | None = None
    cmdline: Annotated[str, Meta(max_length=2048, pattern=r"^[\x20-\x7e]*$")] = ""


class DiskSpec(Struct, frozen=True, kw_only=True, gc=False):
    name: Name
    size_gib: Annotated[int, Meta(ge=1, le=65536)]
    pool: Name = "default"


class NicSpec(Struct, frozen=True, kw_only=True, gc=False):
    network: Name
    mac: Annotated[str, Meta(pattern=r"^[0-9a-f][26ae](:[0-9a-f]{2}){5}$")] | None = None


class GroupRule(Struct, frozen=True, kw_only=True, gc=False):
    """A VM that names a group belongs to it; ``hard`` rules refuse nodes, soft ones only score."""

    group: Name
    topology: Topology = Topology.NODE
    hard: bool = True


class PlacementSpec(Struct, frozen=True, kw_only=True, gc=False):
    node_labels: Labels = {}
    affinity: Annotated[tuple[GroupRule, ...], Meta(max_length=8)] = ()
    anti_affinity: Annotated[tuple[GroupRule, ...], Meta(max_length=8)] = ()


class HaSpec(Struct, frozen=True, kw_only=True, gc=False):
    """``restart``: a guest that crashes is started again, with back-off."""

    restart: bool = True
    priority: Annotated[int, Meta(ge=0, le=1000)] = 0


class MigrationSpec(Struct, frozen=True, kw_only=True, gc=False):
    """How the VM may be moved.

    ``strict``: its guest is resumed on the new node only once the old one is proven stopped, which
    costs more than a second of downtime. ``max_downtime_ms``: QEMU switches over only when it
    expects to need no longer.
    """

    policy: MigrationPolicy = MigrationPolicy.NEVER_DISRUPT
    strict: bool = False
    max_downtime_ms: Annotated[int, Meta(ge=50, le=10_000)] = 300


class VmSpec(Struct, frozen=True, kw_only=True, gc=False):
    """What a user wants."""

    vcpus: Annotated[int, Meta(ge=1, le=256)]
    memory_mib: Annotated[int, Meta(ge=32, le=16 * 1024 * 1024)]
    boot: BootSpec
    power: Power = Power.RUNNING
    disks: Annotated[tuple[DiskSpec, ...], Meta(max_length=16)] = ()
    nics: Annotated[tuple[NicSpec, ...], Meta(max_length=8)] = ()
    placement: PlacementSpec = PlacementSpec()
    ha: HaSpec = HaSpec()
    migration: MigrationSpec = MigrationSpec()


class Condition(Struct, frozen=True, kw_only=True, gc=False):
    type: str
    status: bool
    reason: str = ""
    message: str = ""
    since: datetime


class GuestRequest(Struct, frozen=True, kw_only=True, gc=False):
    """A numbered one-shot action; it concerns one generation and is void for any other.

    A shutdown that the guest has not followed ``deadline_s`` seconds after the agent took it up
    ends in a stop.
    """

    number: int
    kind: RequestKind
    generation: int
    deadline_s: float = 60.0


class Attempt(Struct, frozen=True, kw_only=True, gc=False):
    """One attempt to run a VM on a node: the generation is used for it and never again."""

    generation: int
    node: str
    boot_id: str
    state: AttemptState
    permitted_at: datetime


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An error as RFC 9457 tells it (``application/problem+json``); also stored in records."""

    type: str
    title: str
    status: int
    code: str
    detail: str = ""
    request_id: str = ""
    retryable: bool = False
    errors: tuple[FieldError, ...] = ()


class VmStatus(Struct, frozen=True, kw_only=True, gc=False):
    """What is. ``generation`` is the highest that was given out.

    ``power_seen`` is the last report about ``attempt`` or about the bound node.
    ``observed_revision`` is the record revision that the agent's last report answers.
    ``crashes`` counts failed attempts in a row and ``not_before`` holds the next one back.
    ``logs_on`` are nodes that the VM has left, with its console log of then; oldest first.
    ``has_run``: a guest may have written to its disks, which from then on are never made anew; None
    in records from before level 2 (see ``may_have_run``).
    """

    node: str | None = None
    generation: int = 0
    attempt: Attempt | None = None
    power_seen: ObservedPower = ObservedPower.ABSENT
    observed_revision: int = 0
    answered_request: int = 0
    addresses: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()
    crashes: int = 0
    not_before: datetime | None = None
    fault: Problem | None = None
    migration: MigrationClaim | None = None
    leftovers: tuple[Leftover, ...] = ()
    logs_on: tuple[str, ...] = ()
    has_run: bool | None = None
    unproven: Unproven | None = None


class Vm(Record, frozen=True, kw_only=True):
    name: Name
    tenant: str = DEFAULT_TENANT
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime
    spec: VmSpec
    domain_name: str
    domain_uuid: str
    request: GuestRequest | None = None
    request_number: int = 0
    deleting: bool = False
    status: VmStatus = VmStatus()


class CpuFacts(Struct, frozen=True, kw_only=True, gc=False):
    """``models`` are the named CPU models that libvirt says guests may use here."""

    model: str
    vendor: str = ""
    flags: tuple[str, ...] = ()
    sockets: int = 1
    cores: int = 1
    threads: int = 1
    models: tuple[str, ...] = ()


class NumaCell(Struct, frozen=True, kw_only=True, gc=False):
    id: int
    memory_mib: int
    cpus: tuple[int, ...]


class PoolFacts(Struct, frozen=True, kw_only=True, gc=False):
    """``shared``: the other nodes' pools of this name hold the same files."""

    name: str
    capacity_gib: float
    free_gib: float
    shared: bool = False


class VersionFacts(Struct, frozen=True, kw_only=True, gc=False):
    agent: str
    libvirt: str
    qemu: str
    kernel: str


class MigrationFacts(Struct, frozen=True, kw_only=True, gc=False):
    """How guests reach a node: ``address`` for their memory, ``relay`` for libvirt's messages.

    ``tls``: its QEMU has the certificates that encrypt what is moved.
    """

    address: str
    relay: str
    tls: bool


class Inventory(Struct, frozen=True, kw_only=True, gc=False):
    """What a node has. ``virtualization`` is ``kvm`` only where a guest was seen to boot under it.

    ``cpus`` and ``memory_mib`` are what VMs may use (the configuration may override the machine).
    """

    cpus: int
    memory_mib: int
    cpu: CpuFacts
    numa: tuple[NumaCell, ...] = ()
    pools: tuple[PoolFacts, ...] = ()
    networks: tuple[str, ...] = ()
    artefacts: tuple[str, ...] = ()
    machine_types: tuple[str, ...] = ()
    virtualization: str = "qemu"
    versions: VersionFacts
    migration: MigrationFacts | None = None


class Node(Record, frozen=True, kw_only=True):
    name: Name
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime
    state: NodeState = NodeState.SILENT
    state_since: datetime
    cordoned: bool = False
    cordon_reason: str = ""
    address: str = ""
    boot_id: str = ""
    inventory: Inventory | None = None
    foreign_domains: tuple[str, ...] = ()
    recovery: NodeRecovery = NodeRecovery()


class OperationStep(Struct, frozen=True, kw_only=True, gc=False):
    """``no_return``: once it is done the operation only goes forward, and cannot be cancelled."""

    name: str
    state: StepState = StepState.PENDING
    at: datetime | None = None
    no_return: bool = False


class Operation(Record, frozen=True, kw_only=True):
    """What was accepted, and how it goes: the journal, and what a client sees.

    What must be seen before it is done is tied to it by ``request_number`` (the one-shot request
    it made) and ``generation_floor`` (only attempts above that one count). ``saga`` is there for
    work of named steps with undo; ``undoing`` says in which direction that goes. ``parent`` is the
    operation that asked for this one.
    """

    kind: str
    target: str
    tenant: str = DEFAULT_TENANT
    state: OperationState = OperationState.PENDING
    phase: str = ""
    steps: tuple[OperationStep, ...] = ()
    error: Problem | None = None
    by: str
    created_at: datetime
    updated_at: datetime
    deadline_at: datetime
    request_number: int = 0
    generation_floor: int = 0
    saga: MigrationJournal | DrainJournal | None = None
    undoing: bool = False
    parent: str | None = None


class Event(Struct, frozen=True, kw_only=True, tag="event", gc=False):
    """A fact of history, dense in ``seq``."""

    seq: int
    id: str
    kind: str
    object: str
    tenant: str = DEFAULT_TENANT
    at: datetime
    by: str
    data: dict[str, Any] = {}


class AuditRecord(Struct, frozen=True, kw_only=True, tag="audit", gc=False):
    """Who asked for which change, and what became of it."""

    seq: int
    id: str
    action: str
    object: str
    tenant: str = DEFAULT_TENANT
    at: datetime
    by: str
    request_id: str = ""


class FinishedOperation(Struct, frozen=True, kw_only=True, tag="operation", gc=False):
    """An operation that reached its end, on its way from etcd into the replicas' history."""

    seq: int
    operation: Operation


HistoryEntry = Event | AuditRecord | FinishedOperation


class ApiKey(Record, frozen=True, kw_only=True):
    """A token's record: the secret is 256 random bits, so a plain SHA-256 of it is enough."""

    sha256: str
    principal: str
    role: str
    created_at: datetime
    expires_at: datetime | None = None


class IdempotencyRecord(Record, frozen=True, kw_only=True):
    """What a client's request under an idempotency key became: ``result`` is the id answered with.

    Its id is a hash of principal and key. Written in the transaction of the change itself.
    """

    principal: str
    fingerprint: str
    result: str
    created_at: datetime


class Cluster(Record, frozen=True, kw_only=True):
    """The cell's one record about itself. ``epoch`` is a new number after every restore of etcd."""

    cell: str
    epoch: int = 1
    schema_level: int = SCHEMA_LEVEL
    created_at: datetime
    restored: Restored | None = None


class Applied(Struct, frozen=True, kw_only=True):
    """The applier's mark: which group was committed last, and the last ``seq`` given out.

    Each group compares the mark's revision and writes its own, so that a group whose outcome is
    unknown can be tried again and can never be applied twice.
    """

    group: str
    seq: int


class LeaderKey(Struct, frozen=True, kw_only=True):
    """The value of the leader key; ``incarnation`` is one process of a replica.

    ``since`` is when it stood for election; None of one of an older release.
    """

    replica: str
    incarnation: str
    url: str = ""
    since: datetime | None = None


class Replica(Struct, frozen=True, kw_only=True):
    """A replica's registration, under its lease."""

    name: str
    incarnation: str
    url: str
    agent_address: str
    version: str
    started_at: datetime


class Sample(Struct, frozen=True, kw_only=True, array_like=True):
    """One set of measurements of a node (``object`` is its id) or of a VM, at one moment.

    Counters (``*_total``, cumulative) are as the source counts them; rates are the reader's work.
    Pressure figures are percent of time over ten seconds (Linux PSI "some").
    """

    object: str
    at: float
    cpu_s_total: float = 0.0
    memory_bytes: float = 0.0
    memory_available_bytes: float = 0.0
    disk_read_bytes_total: float = 0.0
    disk_write_bytes_total: float = 0.0
    disk_read_requests_total: float = 0.0
    disk_write_requests_total: float = 0.0
    network_receive_bytes_total: float = 0.0
    network_transmit_bytes_total: float = 0.0
    cpu_pressure_percent: float = 0.0
    memory_pressure_percent: float = 0.0
    io_pressure_percent: float = 0.0


def attempt_generation(vm: Vm) -> int:
    """Return the generation that messages about a VM name: its attempt's, 0 before the first."""
    return 0 if vm.status.attempt is None else vm.status.attempt.generation


def may_have_run(vm: Vm) -> bool:
    """Return whether a guest may have written to the VM's disks.

    Where nobody wrote that down yet, one that was ever permitted to start may have.
    """
    known = vm.status.has_run
    return vm.status.generation > 0 if known is None else known


def condition(vm: Vm, kind: str) -> Condition | None:
    return next((c for c in vm.status.conditions if c.type == kind), None)


def is_moving(vm: Vm) -> bool:
    """Return whether two nodes may own the VM: from its claim's first stage until the switch."""
    claim = vm.status.migration
    return claim is not None and claim.stage not in (
        MigrationStage.REQUESTED,
        MigrationStage.FINALIZE,
    )


def has_rivals(vm: Vm) -> bool:
    """Return whether a node that the VM is not bound to may still run it."""
    return any(not leftover.empty for leftover in vm.status.leftovers)


def nodes_of(vm: Vm) -> tuple[str, ...]:
    """Return the nodes that hold, or may hold, something of a VM."""
    status = vm.status
    claim = status.migration
    nodes = [status.node, *(leftover.node for leftover in status.leftovers)]
    if claim is not None and claim.stage is not MigrationStage.REQUESTED:
        nodes += [claim.source, claim.destination]
    if status.unproven is not None:
        nodes += status.unproven.nodes
    return tuple(dict.fromkeys(node for node in nodes if node is not None))
