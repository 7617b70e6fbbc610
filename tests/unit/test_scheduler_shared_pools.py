"""A pool that nodes name as shared is one store: it is promised once, not once per node."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.scheduler.filters import ReasonCode
from controlplane.scheduler.moves import move_request, plan_moves
from controlplane.scheduler.place import explain, place, plan
from controlplane.scheduler.request import SchedulerSettings, request_of
from controlplane.scheduler.snapshot import Snapshot, build_snapshot
from shared.model import Node, Vm
from shared.moves import Leftover, MigrationClaim, MigrationStage
from tests.unit.cluster_text import make_node, make_vm

SETTINGS = SchedulerSettings(memory_reserve_mib=0)
SHARED, LOCAL = "san:100:100:shared", "san:100:100"


def node(name: str, pools: str = SHARED) -> Node:
    return make_node(name, cpus="16", memory="16384", pools=pools)


def vm(name: str, disks: str = "san:90", **options: str) -> Vm:
    return make_vm(name, vcpus="1", memory="512", disks=disks, **options)


def three(*vms: Vm) -> Snapshot:
    return build_snapshot([node("a"), node("b"), node("c")], vms, SETTINGS)


def moving(one: Vm, stage: MigrationStage, *copied: str) -> Vm:
    """Return a VM that goes from node a to b, or has come there."""
    claim = MigrationClaim(
        operation="op-1",
        stage=stage,
        source="node-a",
        source_generation=1,
        destination="node-b",
        generation=2,
        copied=copied,
    )
    return replace(one, status=replace(one.status, migration=claim))


def left_on(one: Vm, name: str, *disks: str) -> Vm:
    left = Leftover(node=f"node-{name}", generation=1, disks=disks)
    return replace(one, status=replace(one.status, leftovers=(left,)))


def test_the_space_is_promised_once_and_not_once_per_node() -> None:
    snapshot = three()
    for name in ("v1", "v2", "v3"):
        request = request_of(vm(name))
        chosen = place(snapshot, request).node
        assert (chosen is not None) is (name == "v1")
        assert plan(snapshot, request).node == chosen
        if chosen is not None:
            snapshot = snapshot.with_placement(request, chosen)
    assert snapshot.shared_gib == {"san": 90}


def test_every_node_gives_the_same_reason_with_the_figures_of_all() -> None:
    snapshot = three(vm("v1", "san:50", on="a"), vm("v2", "san:40", on="b"))
    for candidate in plan(snapshot, request_of(vm("v3", "san:20"))).candidates:
        (reason,) = candidate.reasons
        assert (reason.code, reason.needed, reason.free) == (ReasonCode.INSUFFICIENT_DISK, 20, 10)
        assert reason.message == (
            "needs 20 GiB in shared pool san, 10.0 of 100.0 GiB may still be promised"
        )
    assert place(snapshot, request_of(vm("v3", "san:10"))).node is not None, "to the last GiB"


def test_a_node_that_took_moved_vms_has_as_much_room_as_the_others() -> None:
    moved = [vm(f"v{number}", "san:40", on="b") for number in range(2)]
    snapshot = three(*moved)
    wanted = request_of(vm("new", "san:20"))
    answers = [explain(snapshot, wanted, f"node-{name}") for name in "abc"]
    assert all(answer.fits for answer in answers)
    rooms = {t.value for answer in answers for t in answer.scores if t.name == "pool_room"}
    assert len(rooms) == 1


@pytest.mark.parametrize(
    "one",
    [
        vm("v", on="a"),
        moving(vm("v", on="a"), MigrationStage.TRANSFER),
        moving(vm("v", on="b"), MigrationStage.FINALIZE),
        left_on(vm("v", on="b"), "a"),
        # The agents came to share the pool while the disk was being copied.
        moving(vm("v", on="a"), MigrationStage.TRANSFER, "d0"),
        moving(vm("v", on="b"), MigrationStage.FINALIZE, "d0"),
        left_on(vm("v", on="b"), "a", "d0"),
    ],
)
def test_a_vm_counts_once_wherever_it_is_moving_or_left_over(one: Vm) -> None:
    snapshot = three(one)
    assert snapshot.shared_gib == {"san": 90}
    for name in "abc":
        again = snapshot.with_node(node(name), [one])
        assert again.shared_gib == {"san": 90}
    assert snapshot.without(one).shared_gib == {}
    assert snapshot.shared_gib_after([(one, None)]) == {}


def test_planned_moves_take_their_disks_along() -> None:
    vms = [vm(f"v{number}", "san:45", on="a") for number in range(2)]
    snapshot, source = three(*vms), node("a")
    request = move_request(vms[0], source)
    after = snapshot.without(vms[0]).with_placement(request, "node-b")
    assert after.shared_gib == {"san": 90}
    assert after == three(replace(vms[0], status=vm("v0", on="b").status), vms[1])
    assert all(decision.node is not None for _, decision in plan_moves(snapshot, source, vms))


def test_a_vm_that_is_deleted_gives_its_space_back_to_all_nodes() -> None:
    one = vm("v1", on="a")
    snapshot = three(one)
    wanted = request_of(vm("v2"))
    assert place(snapshot, wanted).node is None
    assert place(snapshot.without(one), wanted).node is not None
    assert place(snapshot.with_node(node("a"), ()), wanted).node is not None
    assert snapshot.without(one) == three()


def test_local_pools_of_one_name_are_counted_per_node() -> None:
    nodes = [node(name, LOCAL) for name in "abc"]
    snapshot = build_snapshot(nodes, [], SETTINGS)
    for name in ("v1", "v2", "v3"):
        request = request_of(vm(name))
        chosen = place(snapshot, request).node
        assert chosen is not None
        snapshot = snapshot.with_placement(request, chosen)
    assert place(snapshot, request_of(vm("v4", "san:20"))).node is None
    assert snapshot.shared_gib == {}


def test_a_pool_shared_by_some_nodes_and_local_on_another() -> None:
    nodes = [node("a"), node("b"), node("c", LOCAL)]
    snapshot = build_snapshot(nodes, [vm("v1", on="a")], SETTINGS)
    assert snapshot.shared_gib == {"san": 90}
    assert place(snapshot, request_of(vm("v2"))).node == "node-c"
    snapshot = build_snapshot(nodes, [vm("v1", on="c")], SETTINGS)
    assert snapshot.shared_gib == {}
    assert place(snapshot, request_of(vm("v2"))).node == "node-a"
    both = build_snapshot(nodes, [vm("v1", on="a"), vm("v2", on="c")], SETTINGS)
    assert place(both, request_of(vm("v3", "san:20"))).node is None
    messages = {c.reasons[0].message for c in plan(both, request_of(vm("v3", "san:20"))).candidates}
    assert len(messages) == 2, "a pool of a node's own is not called shared"


def test_a_copy_from_a_local_pool_into_a_shared_one_counts_on_both() -> None:
    nodes = [node("a", LOCAL), node("b"), node("c")]
    one = moving(vm("v", "san:60", on="a"), MigrationStage.TRANSFER, "d0")
    snapshot = build_snapshot(nodes, [one], SETTINGS)
    assert snapshot.shared_gib == {"san": 60}
    assert snapshot.nodes["node-a"].pools["san"].promised_gib == 60
    assert place(snapshot, request_of(vm("new", "san:50"))).node is None


def test_a_node_that_comes_to_share_its_pool_brings_what_it_has_promised() -> None:
    vms = [vm("v1", "san:50", on="a"), vm("v2", "san:40", on="c")]
    apart = build_snapshot([node("a"), node("b"), node("c", LOCAL)], vms, SETTINGS)
    together = apart.with_node(node("c"), [vms[1]])
    assert (apart.shared_gib, together.shared_gib) == ({"san": 50}, {"san": 90})
    assert together == three(*vms)
    assert together.with_node(node("c", LOCAL), [vms[1]]) == apart
