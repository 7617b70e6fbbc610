"""What counts as taken on a node."""

from __future__ import annotations

import msgspec
import pytest

from controlplane.scheduler.place import explain, place, plan
from controlplane.scheduler.request import SchedulerSettings, memory_needed_mib, request_of
from controlplane.scheduler.snapshot import NodeView, build_snapshot, loads_of
from shared.model import Vm
from tests.unit.cluster_text import make_node, make_vm

SETTINGS = SchedulerSettings(memory_reserve_mib=0)
NODE = make_node("n1", cpus="8", memory="4096", pools="default:100:80")
BOUND = {"on": "n1", "vcpus": "2", "memory": "1024", "disks": "default:10"}


def view(*vms: Vm) -> NodeView:
    return build_snapshot([NODE], vms, SETTINGS).nodes[NODE.id]


def test_reserve_and_overcommit_set_the_limits() -> None:
    settings = SchedulerSettings(cpu_overcommit=1.5, memory_overcommit=2.0, memory_reserve_mib=1096)
    node = build_snapshot([NODE], [], settings).nodes[NODE.id]
    assert (node.cpus, node.vcpus_limit, node.memory_limit_mib) == (8, 12, 6000)
    tiny = make_node("tiny", cpus="1", memory="64")
    assert build_snapshot([tiny], [], settings).nodes[tiny.id].memory_limit_mib == 0


def test_memory_includes_what_qemu_takes() -> None:
    assert memory_needed_mib(1024, 2) == 1024 + 48 + 8 + 4
    assert memory_needed_mib(32, 1) == 32 + 48 + 4 + 1, "page tables are rounded up"


def test_a_running_vm_takes_cpu_memory_and_disk() -> None:
    node = view(make_vm("a", **BOUND))
    assert node.allocated_vcpus == 2
    assert node.allocated_memory_mib == memory_needed_mib(1024, 2)
    assert node.pools["default"].promised_gib == 10


@pytest.mark.parametrize(
    ("power", "attempt", "counts"),
    [
        ("running", "ended", True),  # it crashed, and is about to be started again
        ("paused", "running", True),
        ("stopped", "running", True),  # it was told to stop, and may still run
        ("stopped", "permitted", True),  # the permit may be on its way
        ("stopped", "ended", False),
    ],
)
def test_power_and_attempt_decide_what_is_taken(power: str, attempt: str, counts: bool) -> None:
    node = view(make_vm("a", power=power, attempt=attempt, apart="web!", **BOUND))
    assert bool(node.allocated_memory_mib) is counts
    assert bool(node.allocated_vcpus) is counts
    assert node.members(("default", "web")) == int(counts)
    assert node.pools["default"].promised_gib == 10, "disks stay"


def test_a_vm_being_deleted_takes_memory_until_its_attempt_has_ended() -> None:
    running = msgspec.structs.replace(make_vm("a", **BOUND), deleting=True)
    ended = msgspec.structs.replace(make_vm("a", attempt="ended", **BOUND), deleting=True)
    assert view(running).allocated_memory_mib > 0
    assert view(ended).allocated_memory_mib == 0


def test_an_open_attempt_on_another_node_counts_there_too() -> None:
    loads = loads_of(make_vm("a", runs_on="n2", **BOUND))
    assert sorted(loads) == ["node-n1", "node-n2"]
    assert loads["node-n2"].memory_mib == loads["node-n1"].memory_mib
    assert loads["node-n2"].disks_gib == {}


def test_starting_a_stopped_vm_again_asks_whether_it_fits() -> None:
    stopped = make_vm("a", power="stopped", **BOUND)
    request = request_of(stopped)
    assert request.bound_to == NODE.id
    assert request.disks_gib == {}, "its disks exist"
    room = build_snapshot([NODE], [stopped], SETTINGS)
    assert place(room, request).node == NODE.id
    squeezed = build_snapshot(
        [NODE], [stopped, make_vm("b", on="n1", vcpus="1", memory="3500")], SETTINGS
    )
    assert place(squeezed, request).node is None


def test_a_bound_vm_goes_to_its_own_node_only_and_a_cordon_does_not_stop_it() -> None:
    closed = make_node("n1", cpus="8", memory="4096", pools="default:100:80", cordon="fan")
    other = make_node("n2", cpus="64", memory="65536")
    stopped = make_vm("a", power="stopped", **BOUND)
    snapshot = build_snapshot([closed, other], [stopped], SETTINGS)
    result = plan(snapshot, request_of(stopped))
    assert result.node == closed.id
    answer = explain(snapshot, request_of(stopped), other.id)
    assert [r.message for r in answer.reasons] == [
        "the VM is bound to node n1, which holds its disks"
    ]


def test_a_vm_that_counts_is_planned_without_itself() -> None:
    vm = make_vm("a", on="n1", vcpus="2", memory="3000", apart="web!")
    snapshot = build_snapshot([NODE], [vm], SETTINGS)
    assert place(snapshot, request_of(vm)).node is None, "it would count twice"
    assert place(snapshot.without(vm), request_of(vm)).node == NODE.id


def test_placements_share_what_they_do_not_change() -> None:
    other = make_node("n2", cpus="8", memory="4096")
    before = build_snapshot([NODE, other], [], SETTINGS)
    after = before.with_placement(request_of(make_vm("a", vcpus="1", memory="512")), NODE.id)
    assert before.nodes[NODE.id].allocated_vcpus == 0
    assert after.nodes[NODE.id].allocated_vcpus == 1
    assert after.nodes[other.id] is before.nodes[other.id]


def test_a_vm_on_a_node_that_is_gone_counts_nowhere() -> None:
    vm = make_vm("a", on="gone", vcpus="1", memory="512", apart="web!")
    snapshot = build_snapshot([NODE], [vm], SETTINGS)
    assert snapshot.group_members == {}
    assert snapshot.without(vm) == snapshot


@pytest.mark.parametrize(("spare_mib", "fits"), [(0, True), (-1, False)])
def test_memory_fits_to_the_last_mebibyte(spare_mib: int, fits: bool) -> None:
    wanted = make_vm("a", vcpus="1", memory="1024")
    node = make_node("n1", cpus="1", memory=str(memory_needed_mib(1024, 1) + spare_mib))
    snapshot = build_snapshot([node], [], SETTINGS)
    assert (place(snapshot, request_of(wanted)).node is not None) is fits


def test_equal_nodes_go_by_name_whatever_their_ids() -> None:
    nodes = [
        msgspec.structs.replace(make_node(name, cpus="4", memory="4096"), id=node_id)
        for name, node_id in (("b", "node-1"), ("a", "node-2"), ("c", "node-0"))
    ]
    snapshot = build_snapshot(nodes, [], SETTINGS)
    request = request_of(make_vm("v", vcpus="1", memory="512"))
    assert place(snapshot, request).node == "node-2"
    assert [c.node_name for c in plan(snapshot, request).candidates] == ["a", "b", "c"]


def test_a_node_that_was_removed_takes_what_counted_there_along() -> None:
    other = make_node("n2", cpus="8", memory="4096", pools="default:100:80")
    stays, goes = make_vm("a", **BOUND), make_vm("b", **{**BOUND, "on": "n2"})
    both = build_snapshot([NODE, other], [stays, goes], SETTINGS)

    assert both.without_node(other.id) == build_snapshot([NODE], [stays], SETTINGS)
    assert both.without_node("node-none") is both
