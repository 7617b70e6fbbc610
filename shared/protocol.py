"""The messages of the two RPCs between agents and the control plane.

``Session``: one bidirectional stream per node to the leader; small and rare messages. Whatever is
pushed to an agent carries the term, and for a VM its revision and generation.
``Telemetry``: batches of samples to any replica, acknowledged cumulatively.

A leader keeps what it told and was told of each VM: as with records, the garbage collector follows
none of it (``gc=False``).
"""

from __future__ import annotations

from msgspec import Struct

from shared.errors import FieldError
from shared.model import (
    GuestRequest,
    Inventory,
    ObservedPower,
    Problem,
    Sample,
    Term,
    VmSpec,
)
from shared.moves import EndState, MigrationFigures, MigrationStage
from shared.open_enum import OpenEnum

PROTOCOL_LEVEL = 1

SESSION_METHOD = "/novacron.Agents/Session"
TELEMETRY_METHOD = "/novacron.Agents/Telemetry"

# A hello of a node with 500 domains and a full inventory is 200 kB; the limit leaves room.
MESSAGE_BYTES_MAX = 4 * 1024 * 1024
# So many VMs are told of in one message, by peers that take them together: a message costs more
# than what is in it, and a new leader has something to say of every VM there is.
TOGETHER_MAX = 50


class Intent(OpenEnum):
    """What the agent is to make of one VM."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"
    REMOVE = "remove"
    RECEIVE = "receive"  # not ours yet: do what the migration's order says, and nothing else
    LEAVE = "leave"  # not ours any more: leave nothing of the named generation
    UNKNOWN = "unknown"


class QueryKind(OpenEnum):
    CONSOLE_LOG = "console_log"
    CONSOLE_SIZE = "console_size"
    MIGRATION_SOURCE = "migration_source"
    MIGRATION_DESTINATION = "migration_destination"
    SURVEY = "survey"
    UNKNOWN = "unknown"


class MigrationRole(OpenEnum):
    SOURCE = "source"
    DESTINATION = "destination"
    UNKNOWN = "unknown"


class DestinationLayout(Struct, frozen=True, kw_only=True, gc=False):
    """Where the destination keeps what the domain's XML names; ``disk_paths`` go with the spec."""

    kernel_path: str
    initrd_path: str | None
    disk_paths: tuple[str, ...]
    bridges: tuple[str, ...]
    console_log_path: str


class MigrationTarget(Struct, frozen=True, kw_only=True, gc=False):
    """What a destination has made ready; the token opens its relay once, and is stored nowhere."""

    node_name: str
    address: str
    relay: str
    token: str
    tls: bool
    layout: DestinationLayout

    def __repr__(self) -> str:
        return f"MigrationTarget(node_name={self.node_name!r}, …)"  # the token stays out of logs


class MigrationOrder(Struct, frozen=True, kw_only=True, gc=False):
    """What a node is to do in the open migration of a VM; each stage is told until answered.

    ``generation`` is the claim's, the destination's in its boot ``boot_id``. ``peer`` is the other
    node's name. ``target`` comes to the source once the destination is ready. ``purge``: the VM is
    being deleted, so that not even its console log stays.
    """

    operation: str
    role: MigrationRole
    stage: MigrationStage
    generation: int
    source_generation: int
    boot_id: str
    peer: str
    copied: tuple[str, ...] = ()
    purge: bool = False
    timeout_s: float = 300.0
    target: MigrationTarget | None = None


class MigrationReport(Struct, frozen=True, kw_only=True, gc=False):
    """How far a node has come with an order's stage, and what its end of the migration is.

    ``over``: a source that will not (again) begin, and whose job has ended. ``settled``: what the
    stage asked for is done. ``fault`` is why it cannot be.
    """

    generation: int
    role: MigrationRole
    stage: MigrationStage
    end: EndState
    over: bool = False
    settled: bool = False
    target: MigrationTarget | None = None
    fault: Problem | None = None
    figures: MigrationFigures | None = None


class VmReport(Struct, frozen=True, kw_only=True, gc=False, tag="report"):
    """What an agent sees of one VM, read under the VM's lock: never in the middle of an action.

    ``generation`` is the attempt this is about; ``permit_used`` says that the agent will never
    start that generation (again), so that "not running" is the end of the attempt; nor will it
    start any up to ``highest_used``. ``revision`` is the desired state's that this answers, 0 when
    the agent has not been told any since it started; ``epoch`` is that revision's, or the one that
    the agent had accepted when it looked (0 from agents that do not tell). ``removed`` says that
    nothing of the VM is left on the node.
    """

    vm_id: str
    generation: int
    power: ObservedPower
    permit_used: bool
    highest_used: int = 0
    revision: int = 0
    epoch: int = 0
    answered_request: int = 0
    removed: bool = False
    fault: Problem | None = None
    migration: MigrationReport | None = None


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """An agent introduces its node; ``domains`` is every domain of ours that libvirt has.

    ``together``: it takes ``DesiredTogether``; an agent of before 0.2 says nothing of it.
    """

    protocol: int = PROTOCOL_LEVEL
    node_name: str
    boot_id: str
    incarnation: str
    address: str
    agent_version: str
    highest_term: Term
    labels: dict[str, str] = {}
    inventory: Inventory
    domains: tuple[VmReport, ...]
    foreign_domains: tuple[str, ...] = ()
    together: bool = False


class TermAccepted(Struct, frozen=True, kw_only=True, tag="term_accepted"):
    """The agent has persisted the welcome's term; from now on it refuses every lower one."""

    term: Term


class InventoryReport(Struct, frozen=True, kw_only=True, tag="inventory"):
    inventory: Inventory
    foreign_domains: tuple[str, ...] = ()


class Heartbeat(Struct, frozen=True, kw_only=True, tag="heartbeat"):
    number: int


class Answer(Struct, frozen=True, kw_only=True, tag="answer"):
    query_id: str
    data: bytes = b""
    problem: Problem | None = None


class MigrationProgress(Struct, frozen=True, kw_only=True, tag="migration_progress"):
    """How far a migration's data has come; told while it runs, and kept nowhere."""

    operation: str
    percent: float
    eta_s: float | None = None
    bytes_done: int = 0
    bytes_total: int = 0


class ReportsTogether(Struct, frozen=True, kw_only=True, tag="reports"):
    """Several reports, as if each had come by itself, in this order."""

    reports: tuple[VmReport, ...]


AgentMessage = (
    Hello
    | TermAccepted
    | VmReport
    | ReportsTogether
    | InventoryReport
    | Heartbeat
    | Answer
    | MigrationProgress
)


class Welcome(Struct, frozen=True, kw_only=True, tag="welcome"):
    """``together``: the leader takes ``ReportsTogether``; one of before 0.2 says nothing of it."""

    term: Term
    node_id: str
    cluster_id: str
    heartbeat_period_s: float
    silence_limit_s: float
    together: bool = False


class NotLeader(Struct, frozen=True, kw_only=True, tag="not_leader"):
    """This replica does not lead; ``agent_address`` is the leader's, when it is known."""

    agent_address: str | None = None


class Rejected(Struct, frozen=True, kw_only=True, tag="rejected"):
    """The session is refused; trying again at once will not help."""

    problem: Problem


class Desired(Struct, frozen=True, kw_only=True, gc=False, tag="desired"):
    """What should be of one VM on this node.

    ``generation`` names the attempt. With ``permitted`` it is a start permit: valid once, and only
    in the boot ``boot_id``. A running domain of any other generation must not be touched.
    ``has_run``: its disks hold what a guest has written; one that is missing must not be made.
    """

    term: Term
    vm_id: str
    revision: int
    generation: int
    permitted: bool
    boot_id: str
    intent: Intent
    name: str
    tenant: str
    domain_name: str
    domain_uuid: str
    spec: VmSpec
    request: GuestRequest | None = None
    migration: MigrationOrder | None = None
    has_run: bool = False


class SourceCheck(Struct, frozen=True, kw_only=True):
    """A source's answer before a migration: what stands against it, and what its guest needs."""

    blockers: tuple[FieldError, ...] = ()
    machine: str = ""
    cpu_xml: str = ""


class DestinationQuestion(Struct, frozen=True, kw_only=True):
    """What a node is asked before a VM comes to it.

    ``machine`` and ``cpu_xml`` are those of the running guest, and empty for a VM at rest.
    """

    vm_id: str
    domain_uuid: str
    spec: VmSpec
    copied: tuple[str, ...]
    machine: str
    cpu_xml: str


class DestinationCheck(Struct, frozen=True, kw_only=True):
    blockers: tuple[FieldError, ...] = ()


class Sighting(Struct, frozen=True, kw_only=True):
    """One domain of ours, as a survey found it.

    ``departing``: the node has begun to move it away, and was never told what became of that.
    """

    vm_id: str
    generation: int
    end: EndState
    power: ObservedPower
    departing: bool = False


class Survey(Struct, frozen=True, kw_only=True):
    """All domains of ours on a node, when nothing was under way that an earlier epoch asked for."""

    boot_id: str
    epoch: int
    domains: tuple[Sighting, ...]


class InSync(Struct, frozen=True, kw_only=True, tag="in_sync"):
    """All desired VMs of this node were sent; a domain of ours not among them is a stray."""

    term: Term
    vm_ids: tuple[str, ...]


class Query(Struct, frozen=True, kw_only=True, tag="query"):
    """An ephemeral read; ``offset`` below zero counts from the end."""

    id: str
    kind: QueryKind
    vm_id: str
    domain_name: str
    offset: int = 0
    limit_bytes: int = 65536
    payload: bytes = b""


class HeartbeatSeen(Struct, frozen=True, kw_only=True, tag="heartbeat_seen"):
    term: Term
    number: int


class DesiredTogether(Struct, frozen=True, kw_only=True, tag="desired_together"):
    """What should be of several VMs, as if each had come by itself, in this order."""

    desired: tuple[Desired, ...]


LeaderMessage = (
    Welcome | NotLeader | Rejected | Desired | DesiredTogether | InSync | Query | HeartbeatSeen
)


class TelemetryHello(Struct, frozen=True, kw_only=True, tag="telemetry_hello"):
    node_name: str
    node_id: str
    incarnation: str


class Batch(Struct, frozen=True, kw_only=True, tag="batch"):
    """Samples in order of time; ``dropped`` counts what the outbox let go since the start."""

    number: int
    samples: tuple[Sample, ...]
    dropped: int = 0


TelemetryMessage = TelemetryHello | Batch


class BatchSeen(Struct, frozen=True, kw_only=True, tag="batch_seen"):
    """Every batch up to ``number`` has been taken in."""

    number: int


class TelemetryRefused(Struct, frozen=True, kw_only=True, tag="telemetry_refused"):
    problem: Problem


TelemetryAnswer = BatchSeen | TelemetryRefused
