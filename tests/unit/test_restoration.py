"""What a restore makes of a backup: numbers begin anew, and nothing says any more what runs."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.backup.format import Header
from controlplane.backup.restoration import (
    ENTRIES_PER_S,
    NUMBERS_PER_S,
    Restoration,
    make_restoration,
    new_epoch,
)
from controlplane.commands.drains import RequestDrain
from controlplane.commands.migrations import RequestMigration
from controlplane.commands.vms import DeleteVm
from controlplane.store import keys
from shared.admission import Admission, JoinToken
from shared.codec import pack, unpack
from shared.errors import RecordUnreadable
from shared.ids import IdSource
from shared.model import (
    SCHEMA_LEVEL,
    Applied,
    AttemptState,
    Event,
    FinishedOperation,
    HistoryEntry,
    IdempotencyRecord,
    Node,
    NodeState,
    OperationState,
    Power,
    Record,
    Vm,
)
from shared.moves import Leftover, MigrationClaim, MigrationStage
from shared.states import VmAction
from tests.unit.backed_up import CLUSTER
from tests.unit.core_world import BORN, CELL, USER, CoreWorld, HandClock

NOW = datetime(2027, 1, 2, tzinfo=UTC)
EPOCH = int(NOW.timestamp())
HEADER = Header(
    cluster=CLUSTER.id,
    cell=CELL,
    epoch=1,
    revision=500,
    schema_level=2,
    release="0.2.0",
    made_at=BORN,
)
Items = list[tuple[str, bytes]]


def items_of(core: CoreWorld, *more: Record) -> Items:
    state = core.state
    records: list[Record] = [CLUSTER, *more]
    for table in (state.vms, state.nodes, state.operations, state.api_keys):
        records += [stored.record for stored in table.values()]
    found = [(keys.record_key(record), pack(record)) for record in records]
    found += [(keys.history_key(entry.seq), pack(entry)) for entry in state.history.values()]
    return [*found, (keys.MARK, pack(Applied(group="group-1", seq=state.last_seq)))]


def made(items: Items, **changes: Any) -> Restoration:
    ids = IdSource(CELL, HandClock(), random.Random(3))
    given: dict[str, Any] = {"epoch": EPOCH, "now": NOW, "ids": ids} | changes
    return make_restoration(HEADER, items, **given)


def vm_of(restoration: Restoration, vm_id: str) -> Vm:
    key = keys.key_of(Vm, vm_id)
    return unpack(next(put.value for put in restoration.puts if put.key == key), Vm)


def history_of(restoration: Restoration, after: int) -> list[HistoryEntry]:
    found: list[HistoryEntry] = [
        unpack(put.value, HistoryEntry)  # type: ignore[arg-type]
        for put in restoration.puts
        if put.key.startswith(keys.HISTORY)
    ]
    return [entry for entry in found if entry.seq > after]


def test_an_epoch_is_new_after_every_restore() -> None:
    assert new_epoch([1], NOW) == EPOCH
    assert new_epoch([1], NOW + timedelta(seconds=1)) == EPOCH + 1
    assert new_epoch([EPOCH], NOW) == EPOCH + 1
    assert new_epoch([1, EPOCH + 50], NOW) == EPOCH + 51


def test_a_vm_keeps_what_was_wanted_and_is_said_to_be_nowhere_for_sure() -> None:
    core = CoreWorld()
    vm_id = core.running()
    restored = vm_of(made(items_of(core)), vm_id)
    before = core.vm(vm_id)
    assert restored.spec == before.spec
    assert restored.status.attempt == before.status.attempt
    assert restored.status.node == core.node_id
    assert restored.status.unproven is not None
    assert restored.status.unproven.nodes == (core.node_id,)
    assert restored.status.observed_revision == 0


def test_numbers_that_were_given_out_since_the_backup_are_never_given_again() -> None:
    core = CoreWorld()
    vm_id = core.running()
    core.act(vm_id, VmAction.REBOOT)
    restored = vm_of(made(items_of(core)), vm_id)
    assert restored.status.generation == EPOCH * NUMBERS_PER_S
    assert restored.request is None
    assert restored.request_number == restored.status.answered_request == EPOCH * NUMBERS_PER_S
    again = vm_of(made(items_of(core), epoch=EPOCH + 1), vm_id)
    assert again.status.generation - restored.status.generation == NUMBERS_PER_S


def test_a_vm_that_may_have_run_has_run() -> None:
    core = CoreWorld()
    ran, (never, _) = core.running(), core.create("web-2")
    restoration = made(items_of(core))
    assert vm_of(restoration, ran).status.has_run is True
    assert vm_of(restoration, never).status.has_run is False


def test_a_move_is_given_up_and_both_of_its_nodes_may_have_the_vm() -> None:
    core = CoreWorld()
    vm_id, two = core.running(), core.join("n2")
    core.apply(
        RequestMigration(
            vm_id=vm_id, destination=two, steps=("admit",), no_return=frozenset(), by=USER
        )
    )
    vm = core.vm(vm_id)
    assert vm.status.migration is not None
    claim: MigrationClaim = replace(
        vm.status.migration,
        stage=MigrationStage.TRANSFER,
        destination=two,
        generation=2,
    )
    left = Leftover(node="node-3", generation=1, disks=("root",))
    core.state.put(replace(vm, status=replace(vm.status, migration=claim, leftovers=(left,))), 1000)
    restored = vm_of(made(items_of(core)), vm_id).status
    assert (restored.migration, restored.leftovers) == (None, ())
    assert restored.unproven is not None
    assert set(restored.unproven.nodes) == {core.node_id, two, "node-3"}


def test_what_is_being_deleted_goes_on_being_deleted_everywhere() -> None:
    core = CoreWorld()
    vm_id = core.running()
    core.apply(DeleteVm(vm_id=vm_id, by=USER))
    left = Leftover(node="node-3", generation=1, disks=("root",))
    vm = core.vm(vm_id)
    core.state.put(replace(vm, status=replace(vm.status, leftovers=(left,))), 1000)
    restored = vm_of(made(items_of(core)), vm_id)
    assert restored.deleting
    assert restored.status.leftovers == (left,)


def test_what_was_under_way_is_ended_and_says_why() -> None:
    core = CoreWorld()
    vm_id = core.running()
    _, create = core.create("web-2")
    core.act(vm_id, VmAction.STOP)
    core.apply(
        RequestDrain(
            node_id=core.node_id,
            reason="",
            skip=(),
            steps=("cordon",),
            no_return=frozenset(),
            by=USER,
        )
    )
    restoration = made(items_of(core))
    assert not any(put.key.startswith(f"{keys.STATE}operations/") for put in restoration.puts)
    ended = {
        entry.operation.id: entry.operation
        for entry in history_of(restoration, core.state.last_seq)
        if isinstance(entry, FinishedOperation)
    }
    assert set(ended) == set(core.state.operations)
    assert restoration.ended == 3
    assert ended[create].state is OperationState.FAILED
    assert all(each.error and each.error.code == "restored" for each in ended.values())
    assert vm_of(restoration, vm_id).spec.power is Power.STOPPED


def test_history_goes_on_where_nothing_of_before_can_be() -> None:
    core = CoreWorld()
    core.running()
    restoration = made(items_of(core))
    before, new = core.state.last_seq, history_of(restoration, core.state.last_seq)
    assert [entry.seq for entry in new] == list(
        range(EPOCH * ENTRIES_PER_S + 1, EPOCH * ENTRIES_PER_S + 1 + len(new))
    )
    assert restoration.mark.seq == new[-1].seq
    kept = [put for put in restoration.puts if put.key.startswith(keys.HISTORY)]
    assert len(kept) == before + len(new)
    event = next(entry for entry in new if isinstance(entry, Event))
    assert event.kind == "cluster.restored"
    assert event.data["backup_revision"] == "1.500"
    assert any(getattr(entry, "action", "") == "cluster.restore" for entry in new)


def test_nodes_are_not_heard_and_have_to_tell() -> None:
    core = CoreWorld()
    restoration = made(items_of(core), also_awaited=("n7", "n1", "n7"))
    nodes = {
        node.name: node
        for node in (unpack(p.value, Node) for p in restoration.puts if "/nodes/" in p.key)
    }
    assert set(nodes) == {"n1", "n7"}
    assert restoration.nodes == ("n1", "n7")
    assert nodes["n1"].id == core.node_id
    for node in nodes.values():
        assert node.state is NodeState.SILENT
        assert node.recovery.told != EPOCH


def test_the_cluster_is_of_the_new_epoch_and_no_older_release_may_lead_it() -> None:
    items = items_of(CoreWorld())
    items[0] = (keys.CLUSTER, pack(replace(CLUSTER, schema_level=1)))
    cluster = made(items).cluster
    assert (cluster.epoch, cluster.schema_level) == (EPOCH, SCHEMA_LEVEL)
    assert cluster.restored is not None
    assert (cluster.restored.backup_at, cluster.restored.recovering) == (BORN, True)


def test_all_else_stays_as_it_is() -> None:
    kept = IdempotencyRecord(
        id="k1", principal="admin", fingerprint="f", result="op-1", created_at=BORN
    )
    foreign = (f"{keys.ROOT}of-a-later-release", b"\xff")
    items = [*items_of(CoreWorld(), kept), foreign]
    puts = {put.key: put.value for put in made(items).puts}
    assert puts[keys.record_key(kept)] == pack(kept)
    assert puts[foreign[0]] == foreign[1]


def test_who_was_revoked_stays_so_and_everybody_else_shows_what_they_have_by_now() -> None:
    """Nodes have renewed since the backup: what it says of their certificates is old."""
    admitted = Admission(
        id="n1", address="10.0.0.1", approved=True, serials=("a1",), created_at=BORN
    )
    revoked = replace(admitted, id="n2", approved=False, serials=(), revoked_at=BORN)
    token = JoinToken(
        id="join-1", sha256="00", created_at=BORN, created_by="admin", expires_at=BORN
    )
    puts = {put.key for put in made(items_of(CoreWorld(), admitted, revoked, token)).puts}
    assert keys.record_key(revoked) in puts
    assert not {keys.record_key(admitted), keys.record_key(token)} & puts


def test_what_processes_left_behind_is_not_restored() -> None:
    items = [*items_of(CoreWorld()), (keys.LEADER, b"x"), (keys.replica_key("r1"), b"x")]
    assert not any(
        put.key == keys.LEADER or put.key.startswith(keys.REPLICAS) for put in made(items).puts
    )


def test_a_record_that_does_not_decode_is_left_out_and_told_of() -> None:
    """Nobody could say that its VM has to be held back."""
    core = CoreWorld()
    vm_id = core.running()
    key = keys.key_of(Vm, vm_id)
    items = [(each, b"\xc1" if each == key else value) for each, value in items_of(core)]
    restoration = made(items)
    assert restoration.left_out == (key,)
    assert key not in {put.key for put in restoration.puts}


def test_a_backup_without_a_cluster_is_none() -> None:
    with pytest.raises(RecordUnreadable):
        made(items_of(CoreWorld())[1:])


def test_an_attempt_stays_as_the_backup_has_it_until_its_node_has_told() -> None:
    core = CoreWorld()
    vm_id, _ = core.create()
    core.bind(vm_id)
    core.permit(vm_id)
    attempt = vm_of(made(items_of(core)), vm_id).status.attempt
    assert attempt is not None
    assert attempt.state is AttemptState.PERMITTED
