"""Every invariant can fail: each is fed a history that breaks it, after one that does not."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from controlplane.state import ClusterState
from shared.model import (
    Attempt,
    AttemptState,
    AuditRecord,
    BootSpec,
    CpuFacts,
    DiskSpec,
    Event,
    FinishedOperation,
    GuestRequest,
    IdempotencyRecord,
    Inventory,
    LeaderKey,
    Node,
    NodeState,
    ObservedPower,
    Operation,
    OperationState,
    Power,
    Record,
    RequestKind,
    VersionFacts,
    Vm,
    VmSpec,
    VmStatus,
)
from shared.moves import Leftover, MigrationClaim, MigrationStage
from tests.sim.invariants import (
    INVARIANTS,
    Found,
    Judge,
    Violation,
    everything_settles,
    replicas_agree,
)
from tests.sim.invariants.guests import HELD_WITHIN_S, last_copy_is_kept
from tests.sim.invariants.records import key_is_used_once
from tests.sim.invariants.settled import acknowledged_is_kept
from tests.sim.ledger import (
    Acknowledged,
    Arrived,
    Committed,
    DeleteAsked,
    Died,
    Ended,
    Erased,
    Ledger,
    Left,
    Measured,
    Pausing,
    Restarting,
    Resumed,
    SetOut,
    SimEvent,
    Started,
    StillRuns,
    ToldGone,
    Viewed,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ATTEMPT = Attempt(
    generation=1, node="node-a", boot_id="boot-1", state=AttemptState.PERMITTED, permitted_at=NOW
)
SPEC = VmSpec(
    vcpus=1, memory_mib=1024, boot=BootSpec(kernel="k"), disks=(DiskSpec(name="root", size_gib=1),)
)
VM = Vm(
    id="vm-a",
    name="a",
    created_at=NOW,
    updated_at=NOW,
    spec=SPEC,
    domain_name="vm-a",
    domain_uuid="",
    status=VmStatus(node="node-a", generation=1, attempt=ATTEMPT),
)
NODE = Node(
    id="node-a",
    name="a",
    created_at=NOW,
    updated_at=NOW,
    state_since=NOW,
    state=NodeState.READY,
    boot_id="boot-1",
    inventory=Inventory(
        cpus=2,
        memory_mib=4096,
        cpu=CpuFacts(model="m"),
        versions=VersionFacts(agent="", libvirt="", qemu="", kernel=""),
    ),
)
OPERATION = Operation(
    id="op-a",
    kind="vm.create",
    target="vm-a",
    by="u",
    created_at=NOW,
    updated_at=NOW,
    deadline_at=NOW,
)
RUNS = Started("a", "boot-1", "vm-a", 1)
LEADS = Committed(1, "one", LeaderKey(replica="r", incarnation="one"))


def commit(revision: int, *records: Record, seqs: tuple[int, ...] = ()) -> Committed:
    return Committed(
        revision,
        "one",
        records=tuple((type(record), record.id, record) for record in records),
        history=tuple(_event(seq) for seq in seqs),
    )


def gone(revision: int, record: Record) -> Committed:
    return Committed(revision, "one", records=((type(record), record.id, None),))


def audited(revision: int, seq: int, action: str, *records: Record) -> Committed:
    record = AuditRecord(seq=seq, id=f"audit-{seq}", action=action, object="vm-a", at=NOW, by="u")
    return replace(commit(revision, *records), history=(record,))


def _event(seq: int) -> Event:
    return Event(seq=seq, id=f"event-{seq}", kind="k", object="o", at=NOW, by="u")


def finished(revision: int, seq: int) -> Committed:
    ended = FinishedOperation(seq=seq, operation=replace(OPERATION, state=OperationState.SUCCEEDED))
    return Committed(revision, "one", records=((Operation, OPERATION.id, None),), history=(ended,))


GOOD: tuple[SimEvent, ...] = (
    LEADS,
    commit(2, NODE, seqs=(1,)),
    audited(2, 2, "vm.create", VM, OPERATION),
)
STOPPED = replace(VM, spec=replace(SPEC, power=Power.STOPPED))
LARGE = replace(
    VM,
    id="vm-b",
    spec=replace(SPEC, memory_mib=3000),
    status=replace(VM.status, attempt=replace(ATTEMPT, state=AttemptState.RUNNING)),
)

CLAIM = MigrationClaim(
    operation="op-a",
    stage=MigrationStage.TRANSFER,
    source="node-a",
    source_generation=1,
    destination="node-b",
    generation=2,
    boot_id="boot-1",
)
MOVING = replace(VM, status=replace(VM.status, generation=2, migration=CLAIM))
CLAIMED = (commit(3, replace(NODE, id="node-b", name="b")), commit(4, MOVING))
CAME = Started("b", "boot-1", "vm-a", 2)
CLEANED = replace(
    MOVING, status=replace(MOVING.status, migration=replace(CLAIM, stage=MigrationStage.CLEAN))
)
MOVED = replace(
    VM,
    status=replace(
        VM.status,
        node="node-b",
        generation=2,
        attempt=replace(ATTEMPT, node="node-b", generation=2, state=AttemptState.RUNNING),
    ),
)
STAYED = replace(VM, status=replace(VM.status, generation=2))
LEFT = replace(
    VM,
    status=replace(
        VM.status,
        attempt=replace(ATTEMPT, state=AttemptState.ENDED),
        leftovers=(Leftover(node="node-b", generation=1),),
    ),
)
ANEW = replace(VM, status=replace(VM.status, attempt=replace(ATTEMPT, generation=2)))

REBOOTED = replace(VM, request=GuestRequest(number=1, kind=RequestKind.REBOOT, generation=1))
RESTARTING = Restarting("a", "vm-a", 1)
KEY = IdempotencyRecord(id="key-a", principal="u", fingerprint="", result="op-a", created_at=NOW)

# For each invariant: what may still happen after GOOD, and what may not happen then.
CASES: dict[str, tuple[tuple[SimEvent, ...], SimEvent]] = {
    "single_runner": ((RUNS,), replace(RUNS, node="b")),
    "generation_used_once": ((RUNS, Ended("a", "vm-a", 1, by_agent=False)), RUNS),
    "start_was_permitted": ((), replace(RUNS, boot_id="boot-2")),
    "start_has_no_rival": ((commit(3, LEFT),), commit(4, ANEW)),
    "moves_are_begun_once": ((*CLAIMED, SetOut("a", "vm-a", 2)), SetOut("a", "vm-a", 2)),
    "owner_has_the_guest": (CLAIMED, commit(5, MOVED)),
    "claim_outlives_the_guest": ((*CLAIMED, CAME), commit(5, VM)),
    "arrived_guest_is_not_cleaned": (
        (*CLAIMED, CAME, commit(5, CLEANED)),
        Ended("b", "vm-a", 2, by_agent=True),
    ),
    "returned_guest_is_held": (
        (*CLAIMED, RUNS, Left("a", "vm-a", 1), CAME, Resumed("a", "vm-a", 1, by_libvirt=True)),
        StillRuns("a", "vm-a", 1, HELD_WITHIN_S),
    ),
    "generations_only_rise": (
        (),
        commit(3, replace(VM, status=replace(VM.status, generation=0, attempt=None))),
    ),
    "pause_was_wanted": ((RUNS, *CLAIMED, Left("a", "vm-a", 1)), Pausing("a", "vm-a", 1)),
    "restarted_once": ((commit(3, REBOOTED), RESTARTING), RESTARTING),
    "deleted_is_gone": ((DeleteAsked("vm-a"), gone(3, VM)), RUNS),
    "last_copy_is_kept": ((RUNS, commit(3, LEFT)), Erased("a", "vm-a", "vm-a-root.qcow2")),
    "changes_are_audited": ((), commit(3, replace(OPERATION, id="op-b"))),
    "key_is_used_once": ((commit(3, KEY),), commit(4, replace(KEY, result="op-b"))),
    "views_are_monotone": ((Viewed(2, 2, (("vm-a", 2),)),), Viewed(2, 3, (("vm-a", 2),))),
    "what_is_there_is_found": ((), ToldGone("vm-a")),
    "nothing_grows_without_bound": ((Measured("one", "x", 1, 1),), Measured("one", "x", 2, 1)),
    "end_was_wanted": ((RUNS,), Ended("a", "vm-a", 1, by_agent=True)),
    "erased_was_deleted": ((), Erased("a", "vm-a")),
    "within_capacity": ((), commit(3, LARGE)),
    "written_by_the_leader": ((), replace(commit(3, VM), writer="two")),
    "history_is_dense": ((), commit(3, VM, seqs=(4,))),
    "operation_ends_once": ((finished(3, 3),), finished(4, 4)),
    "nothing_acknowledged_is_lost": ((Acknowledged("op-a", "vm-a"),), gone(3, VM)),
    "no_process_dies_by_itself": ((), Died("one", "KeyError()")),
}


@pytest.mark.parametrize("name", [invariant.__name__ for invariant in INVARIANTS])
def test_an_invariant_can_fail(name: str) -> None:
    before, bad = CASES[name]
    judge = Judge()
    for event in (*GOOD, *before):
        judge.take(event)
    only = Judge([each for each in INVARIANTS if each.__name__ == name])
    only.ledger = judge.ledger
    with pytest.raises(Violation) as caught:
        only.take(bad)
    assert caught.value.name == name


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(replace(RUNS, generation=2), id="never given out"),
        pytest.param(replace(RUNS, node="b"), id="another node's"),
    ],
)
def test_a_start_needs_its_own_permit(event: Started) -> None:
    judge = Judge()
    for good in GOOD:
        judge.take(good)
    with pytest.raises(Violation, match="start_was_permitted"):
        judge.take(event)


MOVES: dict[str, tuple[SimEvent, ...]] = {
    "the guest moves, and its old node is cleaned": (
        RUNS,
        *CLAIMED,
        SetOut("a", "vm-a", 2),
        Left("a", "vm-a", 1),
        CAME,
        commit(5, MOVED),
    ),
    "nothing came, and the claim ends": (RUNS, *CLAIMED, commit(5, STAYED)),
    "what stood still on arrival is cleaned": (
        RUNS,
        *CLAIMED,
        Left("b", "vm-a", 2),
        commit(5, CLEANED),
        Ended("b", "vm-a", 2, by_agent=True),
        commit(6, STAYED),
    ),
    "a guest that a user has paused is cleaned": (
        RUNS,
        *CLAIMED,
        Left("a", "vm-a", 1),
        replace(CAME, paused=True),
        commit(5, CLEANED),
        Ended("b", "vm-a", 2, by_agent=True),
    ),
    "the guest fell in the moment in which all of it had come": (
        RUNS,
        *CLAIMED,
        Left("a", "vm-a", 1),
        Arrived("b", "vm-a", 2),
        Ended("a", "vm-a", 1, by_agent=False),
        commit(5, MOVED),
    ),
    "a guest goes on that runs nowhere else": (
        RUNS,
        *CLAIMED,
        Left("a", "vm-a", 1),
        Resumed("a", "vm-a", 1, by_libvirt=True),
        StillRuns("a", "vm-a", 1, 10 * HELD_WITHIN_S),
    ),
}


@pytest.mark.parametrize("story", MOVES.values(), ids=MOVES.keys())
def test_what_a_move_may_do(story: tuple[SimEvent, ...]) -> None:
    judge = Judge()
    for event in (*GOOD, *story):
        judge.take(event)


def test_an_operation_neither_vanishes_nor_opens_again() -> None:
    judge = Judge()
    for good in GOOD:
        judge.take(good)
    with pytest.raises(Violation, match="vanished"):
        judge.take(gone(3, OPERATION))
    judge.take(finished(3, 3))
    with pytest.raises(Violation, match="opened again"):
        judge.take(commit(4, OPERATION))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        pytest.param(audited(3, 3, "vm.create"), "0 x vm.create", id="once too often"),
        pytest.param(audited(3, 3, "vm.stop"), "nothing of it has changed", id="without a change"),
    ],
)
def test_an_audit_record_stands_for_a_change(bad: Committed, complaint: str) -> None:
    judge = Judge()
    for good in (*GOOD, audited(3, 3, "vm.stop", STOPPED)):
        judge.take(good)
    with pytest.raises(Violation, match=complaint):
        judge.take(replace(bad, history=(replace(bad.history[0], seq=4),)))


def test_a_guest_stands_still_for_a_reason() -> None:
    judge = Judge()
    for good in (*GOOD, RUNS):
        judge.take(good)
    with pytest.raises(Violation, match="pause_was_wanted"):
        judge.take(Left("a", "vm-a", 1))
    judge.take(commit(3, replace(VM, spec=replace(SPEC, power=Power.PAUSED))))
    judge.take(Pausing("a", "vm-a", 1))


def test_one_key_has_one_answer() -> None:
    judge = Judge()
    for good in (*GOOD, Acknowledged("op-a", "vm-a", "key"), Acknowledged("op-a", "vm-a", "key")):
        judge.take(good)
    only = Judge([key_is_used_once])
    only.ledger = judge.ledger
    with pytest.raises(Violation, match="key was answered"):
        only.take(Acknowledged("op-b", "vm-a", "key"))


@pytest.mark.parametrize("shown", [(), (("vm-a", 3),), (("vm-a", 2), ("vm-b", 2))])
def test_a_list_is_of_one_moment(shown: tuple[tuple[str, int], ...]) -> None:
    judge = Judge()
    for good in (*GOOD, commit(5, STOPPED), DeleteAsked("vm-a"), gone(7, VM)):
        judge.take(good)
    judge.take(Viewed(1, 0, ()))
    judge.take(Viewed(4, 0, (("vm-a", 2),)))
    judge.take(Viewed(6, 0, (("vm-a", 5),)))
    judge.take(Viewed(7, 0, ()))
    with pytest.raises(Violation, match="views_are_monotone"):
        judge.take(Viewed(4, 0, shown))


SEATS: dict[str, tuple[tuple[SimEvent, ...], str, bool]] = {
    "the destination's copy, before anything came": ((RUNS, *CLAIMED), "b", True),
    "the source's, once the guest runs elsewhere": (
        (RUNS, *CLAIMED, Left("a", "vm-a", 1), CAME, commit(5, MOVED)),
        "a",
        True,
    ),
    "one of two that stand still": (
        (RUNS, *CLAIMED, Left("a", "vm-a", 1), Left("b", "vm-a", 2)),
        "b",
        True,
    ),
    "the source's, while the guest is still coming": (
        (RUNS, *CLAIMED, Left("a", "vm-a", 1)),
        "a",
        False,
    ),
    "the destination's, once it runs there": (
        (RUNS, *CLAIMED, Left("a", "vm-a", 1), CAME),
        "b",
        False,
    ),
}


@pytest.mark.parametrize("case", SEATS.values(), ids=SEATS.keys())
def test_where_a_moving_guest_has_its_disks(case: tuple[tuple[SimEvent, ...], str, bool]) -> None:
    story, node, allowed = case
    judge = Judge()
    for event in (*GOOD, *story):
        judge.take(event)
    only = Judge([last_copy_is_kept])
    only.ledger = judge.ledger
    erased = Erased(node, "vm-a", "vm-a-root.qcow2")
    if allowed:
        only.take(erased)
        return
    with pytest.raises(Violation, match="is nowhere else"):
        only.take(erased)


def test_an_acknowledged_operation_is_known() -> None:
    with pytest.raises(Violation, match="nowhere"):
        Judge().take(Acknowledged("op-a", "vm-a"))


def test_what_was_wanted_may_happen() -> None:
    judge = Judge()
    wanted = (
        *GOOD,
        RUNS,
        commit(3, STOPPED),
        Ended("a", "vm-a", 1, by_agent=True),
        DeleteAsked("vm-a"),
        commit(4, replace(STOPPED, deleting=True)),
        Erased("a", "vm-a"),
        gone(5, VM),
        finished(6, 3),
    )
    for event in wanted:
        judge.take(event)
    assert not judge.ledger.vms


def settled() -> tuple[Ledger, Found]:
    ledger = Ledger()
    running = replace(
        VM,
        status=replace(
            VM.status,
            power_seen=ObservedPower.RUNNING,
            attempt=replace(ATTEMPT, state=AttemptState.RUNNING),
        ),
    )
    ledger.take(commit(1, NODE, running))
    found = Found(
        node="a", running={"vm-a": 1}, paused=(), defined={"vm-a": 1}, volumes=("vm-a-root.qcow2",)
    )
    return ledger, found


def test_a_cluster_at_rest_has_settled() -> None:
    ledger, found = settled()
    assert not list(everything_settles(ledger, [found]))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param({"running": {}}, "does not run", id="not running"),
        pytest.param({"running": {"vm-a": 2}}, "recorded is 1", id="another generation"),
        pytest.param({"paused": ("vm-a",)}, "is not", id="paused"),
        pytest.param({"defined": {"vm-a": 1, "vm-b": 1}}, "stray domain", id="domain"),
        pytest.param({"volumes": ("vm-a-root.qcow2", "x")}, "stray volume", id="volume"),
    ],
)
def test_what_is_there_must_be_as_recorded(change: dict[str, object], complaint: str) -> None:
    ledger, found = settled()
    complaints = list(everything_settles(ledger, [replace(found, **change)]))
    assert len(complaints) == 1
    assert complaint in complaints[0]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        pytest.param(OPERATION, "still open", id="operation"),
        pytest.param(replace(NODE, state=NodeState.SILENT), "silent", id="node"),
        pytest.param(replace(VM, deleting=True), "still being deleted", id="deleting"),
        pytest.param(STOPPED, "wanted stopped and runs", id="stopped"),
        pytest.param(MOVING, "still claimed", id="claim"),
        pytest.param(LEFT, "may still hold", id="leftover"),
    ],
)
def test_records_must_be_at_rest(record: Record, complaint: str) -> None:
    ledger, found = settled()
    ledger.take(commit(2, record))
    assert any(complaint in each for each in everything_settles(ledger, [found]))


def test_an_operation_that_a_replica_has_lost_is_seen() -> None:
    ledger = Ledger()
    for event in (*GOOD, Acknowledged("op-a", "vm-a"), finished(3, 3)):
        ledger.take(event)
    ended = ledger.finished["op-a"]
    assert not list(acknowledged_is_kept(ledger, "r", {"op-a": ended}))
    for kept in (None, OPERATION):
        assert len(list(acknowledged_is_kept(ledger, "r", {"op-a": kept}))) == 1


def test_a_replica_that_dropped_something_is_seen() -> None:
    ledger, _ = settled()
    state = ClusterState()
    for record in (*ledger.nodes.values(), *ledger.vms.values()):
        state.put(record, 1)
    assert not list(replicas_agree(ledger, {"r": state}))
    state.remove(Vm, "vm-a")
    assert list(replicas_agree(ledger, {"r": state})) == ["r remembers other VMs than etcd has"]
