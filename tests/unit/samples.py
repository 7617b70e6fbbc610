"""One sample of every record and message, with every field set to something other than its default.

``python -m tests.unit.samples DIR`` writes their bytes; a release's bytes stay in
``tests/data/samples/<version>/`` for good, and every later release must read them.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec import Struct
from msgspec.structs import fields

from controlplane.commands.draft import Author
from controlplane.commands.terms import Expected, RequestKey
from controlplane.commands.vms import CreateVm
from controlplane.sessions import peer_messages
from controlplane.telemetry.progress import Progress, ProgressFrame
from controlplane.telemetry.windows import Rates, Series
from shared import model, moves, protocol, restores
from shared.codec import pack
from shared.errors import FieldError

AT = datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)
PROBLEM = model.Problem(
    type="urn:novacron:problem:validation",
    title="Validation",
    status=422,
    code="validation",
    detail="the request is not valid",
    request_id="req-1",
    retryable=True,
    errors=(FieldError("/spec/vcpus", "too_small", "must be at least 1"),),
)
TERM = model.Term(2, 918842)
SPEC = model.VmSpec(
    vcpus=2,
    memory_mib=2048,
    boot=model.BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline="console=ttyS0"),
    power=model.Power.PAUSED,
    disks=(model.DiskSpec(name="root", size_gib=20, pool="fast"),),
    nics=(model.NicSpec(network="lan", mac="52:54:00:00:00:01"),),
    placement=model.PlacementSpec(
        node_labels={"zone": "a"},
        affinity=(model.GroupRule(group="near", hard=False),),
        anti_affinity=(model.GroupRule(group="web"),),
    ),
    ha=model.HaSpec(restart=False, priority=7),
    migration=model.MigrationSpec(
        policy=model.MigrationPolicy.NEVER_DISRUPT, strict=True, max_downtime_ms=500
    ),
)
REQUEST = model.GuestRequest(
    number=3, kind=model.RequestKind.SHUTDOWN, generation=7, deadline_s=12.5
)
INVENTORY = model.Inventory(
    cpus=64,
    memory_mib=515000,
    cpu=model.CpuFacts(
        model="EPYC",
        vendor="AMD",
        flags=("sse4_2", "svm"),
        sockets=2,
        cores=16,
        threads=2,
        models=("EPYC", "qemu64"),
    ),
    numa=(model.NumaCell(id=0, memory_mib=257500, cpus=(0, 1, 2, 3)),),
    pools=(model.PoolFacts(name="default", capacity_gib=931.5, free_gib=12.25, shared=True),),
    networks=("lan",),
    artefacts=("tiny-initrd", "tiny-kernel"),
    machine_types=("pc-q35-7.2",),
    virtualization="kvm",
    versions=model.VersionFacts(agent="0.1.0", libvirt="9.0.0", qemu="7.2.22", kernel="6.1.0"),
    migration=model.MigrationFacts(address="10.0.0.11", relay="10.0.0.11:8445", tls=True),
)
FIGURES = moves.MigrationFigures(total_ms=772, downtime_ms=156, transferred_bytes=169_869_312)
TARGET = protocol.MigrationTarget(
    node_name="kvm2",
    address="10.0.0.12",
    relay="10.0.0.12:8445",
    token="00" * 32,
    tls=True,
    layout=protocol.DestinationLayout(
        kernel_path="/k",
        initrd_path="/i",
        disk_paths=("/d",),
        bridges=("br0",),
        console_log_path="/c",
    ),
)
VM = model.Vm(
    id="vm-k3f9q2000000000000000000aa",
    name="web-1",
    tenant="acme",
    labels={"tier": "gold"},
    created_at=AT,
    updated_at=AT + timedelta(seconds=1),
    spec=SPEC,
    domain_name="vm-k3f9q2000000000000000000aa",
    domain_uuid="6f1e0c7e-5d0b-5b8e-9d0a-6e6f76616372",
    request=REQUEST,
    request_number=3,
    deleting=True,
    status=model.VmStatus(
        node="node-k3f9q2000000000000000000bb",
        generation=7,
        attempt=model.Attempt(
            generation=7,
            node="node-k3f9q2000000000000000000bb",
            boot_id="boot-1",
            state=model.AttemptState.RUNNING,
            permitted_at=AT,
        ),
        power_seen=model.ObservedPower.RUNNING,
        observed_revision=41,
        answered_request=2,
        addresses=("10.0.4.17",),
        conditions=(
            model.Condition(type="Placed", status=True, reason="fits", message="on kvm1", since=AT),
        ),
        crashes=1,
        not_before=AT,
        fault=PROBLEM,
        migration=moves.MigrationClaim(
            operation="op-k3f9q2000000000000000000cc",
            stage=moves.MigrationStage.TRANSFER,
            source="node-k3f9q2000000000000000000bb",
            source_generation=7,
            destination="node-k3f9q2000000000000000000dd",
            generation=8,
            boot_id="boot-2",
            copied=("root",),
        ),
        leftovers=(
            moves.Leftover(node="node-k3f9q2000000000000000000ee", generation=5, disks=("root",)),
        ),
        unproven=restores.Unproven(nodes=("node-1",), why="it runs twice"),
        logs_on=("node-k3f9q2000000000000000000ff",),
        has_run=True,
    ),
)
OPERATION = model.Operation(
    id="op-k3f9q2000000000000000000cc",
    kind="vm.create",
    target=VM.id,
    tenant="acme",
    state=model.OperationState.FAILED,
    phase="run",
    steps=(model.OperationStep(name="place", state=model.StepState.DONE, at=AT, no_return=True),),
    error=PROBLEM,
    by="user-1",
    created_at=AT,
    updated_at=AT,
    deadline_at=AT + timedelta(days=1),
    request_number=3,
    generation_floor=6,
    saga=moves.MigrationJournal(
        source="node-k3f9q2000000000000000000bb",
        requested="node-k3f9q2000000000000000000dd",
        destination="node-k3f9q2000000000000000000dd",
        generation=8,
        figures=FIGURES,
    ),
    undoing=True,
    parent="op-k3f9q2000000000000000000ff",
)
REPORT = protocol.VmReport(
    vm_id=VM.id,
    generation=7,
    power=model.ObservedPower.SHUT_OFF,
    permit_used=True,
    highest_used=7,
    revision=41,
    epoch=2,
    answered_request=3,
    removed=True,
    fault=PROBLEM,
    migration=protocol.MigrationReport(
        generation=8,
        role=protocol.MigrationRole.SOURCE,
        stage=moves.MigrationStage.TRANSFER,
        end=moves.EndState.MOVING,
        over=True,
        settled=True,
        target=TARGET,
        fault=PROBLEM,
        figures=FIGURES,
    ),
)
_FIGURES = [field.name for field in fields(model.Sample) if field.name not in ("object", "at")]
SAMPLE = model.Sample(
    object=VM.id,
    at=1767323045.5,
    **{name: float(number) for number, name in enumerate(_FIGURES, start=1)},
)

DESIRED = protocol.Desired(
    term=TERM,
    vm_id=VM.id,
    revision=41,
    generation=7,
    permitted=True,
    boot_id="boot-1",
    intent=protocol.Intent.RUN,
    name="web-1",
    tenant="acme",
    domain_name=VM.domain_name,
    domain_uuid=VM.domain_uuid,
    spec=SPEC,
    request=REQUEST,
    migration=protocol.MigrationOrder(
        operation="op-k3f9q2000000000000000000cc",
        role=protocol.MigrationRole.SOURCE,
        stage=moves.MigrationStage.TRANSFER,
        generation=8,
        source_generation=7,
        boot_id="boot-2",
        peer="kvm2",
        copied=("root",),
        purge=True,
        timeout_s=450.0,
        target=TARGET,
    ),
    has_run=True,
)
_RATES = [field.name for field in fields(Rates)]
RATES = Rates(**{name: float(number) for number, name in enumerate(_RATES, start=1)})
QUERY = protocol.Query(
    id="query-1",
    kind=protocol.QueryKind.CONSOLE_LOG,
    vm_id=VM.id,
    domain_name=VM.domain_name,
    offset=-4096,
    limit_bytes=4096,
    payload=b"question",
)
AUTHOR = Author("admin", "req-1")

SAMPLES: tuple[Struct, ...] = (
    VM,
    OPERATION,
    model.Node(
        id="node-k3f9q2000000000000000000bb",
        name="kvm1",
        labels={"zone": "a"},
        created_at=AT,
        updated_at=AT,
        state=model.NodeState.READY,
        state_since=AT,
        cordoned=True,
        cordon_reason="new DIMM",
        address="10.0.0.11",
        boot_id="boot-1",
        inventory=INVENTORY,
        foreign_domains=("theirs",),
        recovery=restores.NodeRecovery(told=2, gone=True, unrecorded=("vm-1",)),
    ),
    model.ApiKey(
        id="key-1",
        sha256="00" * 32,
        principal="admin",
        role="admin",
        created_at=AT,
        expires_at=AT + timedelta(days=1),
    ),
    model.IdempotencyRecord(
        id="4f" * 16, principal="user-1", fingerprint="5e" * 16, result="op-1", created_at=AT
    ),
    model.Cluster(
        id="cluster-1",
        cell="k3f9q2",
        epoch=2,
        schema_level=1,
        created_at=AT,
        restored=restores.Restored(backup_at=AT, at=AT, recovering=False),
    ),
    model.Event(
        seq=918,
        id="event-1",
        kind="vm.running",
        object=VM.id,
        tenant="acme",
        at=AT,
        by="agent:kvm1",
        data={"generation": 7},
    ),
    model.AuditRecord(
        seq=919,
        id="audit-1",
        action="vm.create",
        object=VM.id,
        tenant="acme",
        at=AT,
        by="user-1",
        request_id="req-1",
    ),
    model.FinishedOperation(seq=920, operation=OPERATION),
    model.Applied(group="group-1", seq=920),
    model.LeaderKey(replica="r1", incarnation="abc", url="https://10.0.0.1:8443", since=AT),
    model.Replica(
        name="r1",
        incarnation="abc",
        url="https://10.0.0.1:8443",
        agent_address="10.0.0.1:8444",
        version="0.1.0",
        started_at=AT,
    ),
    protocol.Hello(
        protocol=1,
        node_name="kvm1",
        boot_id="boot-1",
        incarnation="abc",
        address="10.0.0.11",
        agent_version="0.1.0",
        highest_term=TERM,
        labels={"zone": "a"},
        inventory=INVENTORY,
        domains=(REPORT,),
        together=True,
        foreign_domains=("theirs",),
    ),
    protocol.TermAccepted(term=TERM),
    REPORT,
    protocol.ReportsTogether(reports=(REPORT,)),
    protocol.InventoryReport(inventory=INVENTORY, foreign_domains=("theirs",)),
    protocol.Heartbeat(number=9),
    protocol.Answer(query_id="query-1", data=b"boot", problem=PROBLEM),
    protocol.Welcome(
        term=TERM,
        node_id="node-1",
        cluster_id="cluster-1",
        heartbeat_period_s=2.0,
        silence_limit_s=10.0,
        together=True,
    ),
    protocol.NotLeader(agent_address="10.0.0.2:8444"),
    protocol.Rejected(problem=PROBLEM),
    DESIRED,
    protocol.DesiredTogether(desired=(DESIRED,)),
    protocol.Survey(
        boot_id="boot-1",
        epoch=2,
        domains=(
            protocol.Sighting(
                vm_id=VM.id,
                generation=7,
                end=moves.EndState.HELD,
                power=model.ObservedPower.PAUSED,
                departing=True,
            ),
        ),
    ),
    protocol.InSync(term=TERM, vm_ids=(VM.id,)),
    QUERY,
    protocol.SourceCheck(
        blockers=(FieldError("", "host_device", "it holds a device"),),
        machine="pc-q35-7.2",
        cpu_xml="<cpu/>",
    ),
    protocol.DestinationQuestion(
        vm_id=VM.id,
        domain_uuid=VM.domain_uuid,
        spec=SPEC,
        copied=("root",),
        machine="pc-q35-7.2",
        cpu_xml="<cpu/>",
    ),
    protocol.DestinationCheck(blockers=(FieldError("", "name_taken", "it is here already"),)),
    protocol.MigrationProgress(
        operation="op-k3f9q2000000000000000000cc",
        percent=41.5,
        eta_s=2.1,
        bytes_done=1024,
        bytes_total=4096,
    ),
    protocol.HeartbeatSeen(term=TERM, number=9),
    protocol.TelemetryHello(node_name="kvm1", node_id="node-1", incarnation="abc"),
    protocol.Batch(number=4, samples=(SAMPLE,), dropped=2),
    protocol.BatchSeen(number=4),
    protocol.TelemetryRefused(problem=PROBLEM),
    peer_messages.Submit(
        command=CreateVm(
            name="web-1", tenant="default", labels={"tier": "gold"}, spec=SPEC, by=AUTHOR
        ),
        key=RequestKey(id="hash", principal="admin", fingerprint="what"),
        expected=Expected(object=VM.id, revisions=(7,), whatever=True),
        limit_s=5.5,
    ),
    peer_messages.AskNode(node_id="node-1", query=QUERY),
    peer_messages.Exchange(replica="r2", copied_seq=918, agents_seen="1.7/3"),
    peer_messages.ReadFigures(objects=(VM.id,), whole=True),
    peer_messages.ReadHistory(after=10, until=20),
    peer_messages.Submitted(result=VM.id, replayed=True, revision=918),
    peer_messages.NodeAnswered(data=b"guest says hello"),
    peer_messages.Exchanged(
        progress=(
            ProgressFrame(
                operation="op-1",
                progress=Progress(percent=12.5, eta_s=3.0, as_of=AT, bytes_done=1, bytes_total=8),
                detail="memory",
            ),
        ),
        agents=peer_messages.AgentList(name="1.7/3", versions={"node-1": "0.2.0"}),
    ),
    peer_messages.FiguresRead(
        latest={VM.id: RATES},
        series={VM.id: Series(object=VM.id, as_of=5.0, period_s=5.0, points=(RATES,))},
    ),
    peer_messages.Segment(packed=b"entries", sha256=b"digest"),
    peer_messages.PeerRefused(problem=PROBLEM, revision=7),
)


def write_samples(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        (directory / f"{type(sample).__name__}.msgpack").write_bytes(pack(sample))


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
