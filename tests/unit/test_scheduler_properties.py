"""Whatever the cluster and whatever is asked: what always holds of a placement."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.scheduler.place import place, plan
from controlplane.scheduler.request import SchedulerSettings, request_of
from controlplane.scheduler.snapshot import build_snapshot
from shared.model import Node, Vm
from tests.unit.cluster_text import make_node, make_vm

SAN_GIB = 60
POOLS = (
    "",
    "default:100:100",
    "default:100:20",
    f"default:100:100,san:{SAN_GIB}:{SAN_GIB}:shared",
    f"san:{SAN_GIB}:{SAN_GIB}:shared",
    f"san:{SAN_GIB}:{SAN_GIB}",
)
DISKS = ("", "", "default:10", "default:30", "san:25", "default:10,san:25")
GROUPS = ("web", "web!", "db", "db!")
SETTINGS = SchedulerSettings(cpu_overcommit=2.0, memory_reserve_mib=256)


@st.composite
def nodes(draw: st.DrawFn, name: str = "n0") -> Node:
    options = {
        "cpus": str(draw(st.integers(1, 16))),
        "memory": str(draw(st.sampled_from((128, 1024, 4096, 16384)))),
        "networks": draw(st.sampled_from(("", "lan", "lan,wan"))),
        "labels": draw(st.sampled_from(("", "zone:a", "zone:b"))),
        "pools": draw(st.sampled_from(POOLS)),
        "state": draw(st.sampled_from(("ready", "ready", "ready", "silent"))),
    }
    if draw(st.integers(0, 5)) == 0:
        options["cordon"] = "test"
    if draw(st.integers(0, 9)) == 0:
        options["inventory"] = "none"
    return make_node(name, **options)


@st.composite
def vms(draw: st.DrawFn, name: str = "v0") -> Vm:
    options = {
        "vcpus": str(draw(st.integers(1, 8))),
        "memory": str(draw(st.sampled_from((64, 512, 2048, 8192)))),
        "networks": draw(st.sampled_from(("", "", "lan", "wan"))),
        "labels": draw(st.sampled_from(("", "", "zone:a"))),
        "disks": draw(st.sampled_from(DISKS)),
        "apart": draw(st.sampled_from(("", *GROUPS))),
        "with": draw(st.sampled_from(("", "", *GROUPS))),
    }
    return make_vm(name, **options)


def many_nodes() -> st.SearchStrategy[list[Node]]:
    return st.integers(0, 6).flatmap(
        lambda count: st.tuples(*(nodes(name=f"n{i}") for i in range(count))).map(list)
    )


def many_vms() -> st.SearchStrategy[list[Vm]]:
    return st.integers(1, 12).flatmap(
        lambda count: st.tuples(*(vms(name=f"v{i}") for i in range(count))).map(list)
    )


@given(many_nodes(), many_vms())
@settings(deadline=None, max_examples=150)
def test_no_node_is_ever_filled_past_its_capacity(cluster: list[Node], wanted: list[Vm]) -> None:
    snapshot = build_snapshot(cluster, [], SETTINGS)
    for vm in wanted:
        request = request_of(vm)
        node_id = place(snapshot, request).node
        if node_id is not None:
            snapshot = snapshot.with_placement(request, node_id)
    assert snapshot.shared_gib.get("san", 0) <= SAN_GIB
    for node in snapshot.nodes.values():
        assert 0 <= node.allocated_memory_mib <= node.memory_limit_mib
        assert 0 <= node.allocated_vcpus <= node.vcpus_limit
        for pool in node.pools.values():
            assert pool.promised_gib <= pool.capacity_gib
        for count in node.groups.values():
            assert count.repelling == 0 or count.members == 1, "a hard rule is broken"


@given(many_nodes(), many_vms())
@settings(deadline=None, max_examples=150)
def test_the_answer_is_the_same_twice_and_on_both_paths(
    cluster: list[Node], wanted: list[Vm]
) -> None:
    one = build_snapshot(cluster, [], SETTINGS)
    other = build_snapshot(reversed(cluster), [], SETTINGS)
    for vm in wanted:
        request = request_of(vm)
        full = plan(one, request)
        assert full == plan(other, request), "the order of the nodes must not matter"
        fast = place(one, request)
        assert fast.node == full.node
        assert (fast.node is None) == all(not c.fits for c in full.candidates)
        assert sum(fast.refusals.values()) == sum(not c.fits for c in full.candidates)
        if full.node is not None:
            one = one.with_placement(request, full.node)
            other = other.with_placement(request, full.node)


@given(many_nodes(), many_vms(), nodes(name="one-more"))
@settings(deadline=None, max_examples=150)
def test_one_more_node_never_makes_a_vm_unplaceable(
    cluster: list[Node], wanted: list[Vm], extra: Node
) -> None:
    snapshot = build_snapshot(cluster, [], SETTINGS)
    for vm in wanted:
        request = request_of(vm)
        node_id = place(snapshot, request).node
        if node_id is None:
            continue
        assert place(snapshot.with_node(extra, ()), request).node is not None
        snapshot = snapshot.with_placement(request, node_id)


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(*(nodes(name=f"n{i}") for i in range(n)))))
@settings(deadline=None, max_examples=100)
def test_a_vm_larger_than_any_node_is_refused_with_each_nodes_reason(
    cluster: tuple[Node, ...],
) -> None:
    request = request_of(make_vm("huge", vcpus="256", memory="65536"))
    result = plan(build_snapshot(cluster, [], SETTINGS), request)
    assert result.node is None
    assert len(result.candidates) == len(cluster)
    assert all(candidate.reasons for candidate in result.candidates)
    assert all(reason.message for c in result.candidates for reason in c.reasons)


@given(many_nodes(), many_vms())
@settings(deadline=None, max_examples=100)
def test_incremental_views_equal_a_rebuilt_one(cluster: list[Node], wanted: list[Vm]) -> None:
    placed: list[Vm] = []
    snapshot = build_snapshot(cluster, [], SETTINGS)
    for i, vm in enumerate(wanted):
        if not cluster:
            return
        node = cluster[i % len(cluster)]
        snapshot = snapshot.with_placement(request_of(vm), node.id)
        placed.append(_bound(vm, node))
    rebuilt = build_snapshot(cluster, placed, SETTINGS)
    assert snapshot == rebuilt
    for node in cluster:
        assert rebuilt.with_node(node, placed) == rebuilt
    for vm in placed:
        snapshot = snapshot.without(vm)
    empty = build_snapshot(cluster, [], SETTINGS)
    assert snapshot.nodes == empty.nodes
    assert snapshot.shared_gib == {}
    assert not any(snapshot.group_members.values())


def _bound(vm: Vm, node: Node) -> Vm:
    rules = vm.spec.placement
    return make_vm(
        vm.name,
        on=node.name,
        vcpus=str(vm.spec.vcpus),
        memory=str(vm.spec.memory_mib),
        disks=",".join(f"{disk.pool}:{disk.size_gib}" for disk in vm.spec.disks),
        apart=",".join(r.group + "!" * r.hard for r in rules.anti_affinity),
        **{"with": ",".join(r.group + "!" * r.hard for r in rules.affinity)},
    )
