"""Moves: what a VM takes while it is on two nodes, and where the VMs of a node would go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.scheduler.moves import copied_disks, move_request, plan_moves
from controlplane.scheduler.request import SchedulerSettings, memory_needed_mib
from controlplane.scheduler.snapshot import Snapshot, build_snapshot, loads_of
from shared.model import Node, Vm
from shared.moves import Leftover, MigrationClaim, MigrationStage
from tests.unit.cluster_text import make_node, make_vm

SETTINGS = SchedulerSettings(cpu_overcommit=2.0, memory_reserve_mib=256)
POOLS = "default:100:100,san:500:500:shared"
ROOM = {"cpus": "8", "memory": "8192", "pools": POOLS}
VM = {"vcpus": "2", "memory": "1024", "disks": "default:10,san:20", "on": "a"}
MEMORY_MIB = memory_needed_mib(1024, 2)


def on_the_move(vm: Vm, destination: str, stage: MigrationStage, copied: tuple[str, ...]) -> Vm:
    assert vm.status.node is not None
    claim = MigrationClaim(
        operation="op-1",
        stage=stage,
        source=vm.status.node,
        source_generation=1,
        destination=destination,
        generation=2,
        copied=copied,
    )
    return replace(vm, status=replace(vm.status, migration=claim))


def taken(vm: Vm) -> dict[str, tuple[int, int, dict[str, int]]]:
    return {
        node: (load.vcpus, load.memory_mib, load.disks_gib) for node, load in loads_of(vm).items()
    }


STAYS = (2, MEMORY_MIB, {"default": 10, "san": 20})
COMES = (2, MEMORY_MIB, {"default": 10})


@pytest.mark.parametrize("stage", set(MigrationStage) - {MigrationStage.REQUESTED})
def test_a_vm_on_the_move_counts_on_both_nodes(stage: MigrationStage) -> None:
    vm = on_the_move(make_vm("v", **VM), "node-b", stage, ("d0",))

    assert taken(vm) == {"node-a": STAYS, "node-b": COMES}


def test_an_asked_for_move_takes_nothing_yet() -> None:
    vm = on_the_move(make_vm("v", **VM), "node-b", MigrationStage.REQUESTED, ())
    assert vm.status.migration is not None
    waiting = replace(vm.status.migration, generation=0)
    vm = replace(vm, status=replace(vm.status, migration=waiting))

    assert taken(vm) == {"node-a": STAYS}


def test_after_the_switch_the_source_counts_until_it_has_nothing_left() -> None:
    moved = make_vm("v", **VM | {"on": "b"})
    claim = on_the_move(make_vm("v", **VM), "node-b", MigrationStage.FINALIZE, ("d0",))
    finalizing = replace(moved, status=replace(moved.status, migration=claim.status.migration))
    left = Leftover(node="node-a", generation=1, disks=("d0",))
    left_over = replace(moved, status=replace(moved.status, leftovers=(left,)))
    only_files = (replace(left, empty=True),)
    files_left = replace(moved, status=replace(moved.status, leftovers=only_files))

    assert taken(finalizing) == {"node-a": COMES, "node-b": STAYS}
    assert taken(left_over) == {"node-a": COMES, "node-b": STAYS}
    assert taken(files_left) == {"node-a": (0, 0, {"default": 10}), "node-b": STAYS}
    assert taken(moved) == {"node-b": STAYS}


def test_only_what_either_node_does_not_share_is_copied() -> None:
    source = make_node("a", **ROOM)
    vm = make_vm("v", **VM)

    assert copied_disks(vm, source, make_node("b", **ROOM)) == ("d0",)
    alone = make_node("b", **ROOM | {"pools": "default:100:100,san:500:500"})
    assert copied_disks(vm, source, alone) == ("d0", "d1")
    request = move_request(vm, source)
    assert request.disks_gib == {"default": 10}
    assert request.bound_to is None
    assert request.move is not None
    assert request.move.shared_pools == ("san",)


def test_moves_are_planned_one_after_the_other() -> None:
    """Two fit on the first choice, and the others see that it is full."""
    source = make_node("a", **ROOM)
    nodes = [source, make_node("b", **ROOM | {"memory": "2600"}), make_node("c", **ROOM)]
    vms = [make_vm(f"v{number}", **VM | {"disks": ""}) for number in range(9)]
    snapshot = build_snapshot(nodes, vms, SETTINGS)
    planned = plan_moves(snapshot, source, vms)

    where = [decision.node_name for _, decision in planned]
    assert [vm for vm, _ in planned] == vms
    assert where.count("b") == 2
    assert where.count("c") == 7
    assert snapshot == build_snapshot(nodes, vms, SETTINGS), "planning changes nothing"


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Node], list[Vm]]:
    """A node that is not overrun, and others of any size with something on them."""
    nodes = [make_node("n0", cpus="32", memory="65536", pools=POOLS)]
    vms = []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        memory_mib = draw(st.sampled_from((1024, 4096, 8192)))
        pools = draw(st.sampled_from((POOLS, "default:100:30,san:500:500:shared")))
        nodes.append(make_node(f"n{number}", cpus="4", memory=str(memory_mib), pools=pools))
    for number in range(draw(st.integers(1, 10))):
        options = {
            "vcpus": str(draw(st.integers(1, 3))),
            "memory": str(draw(st.sampled_from((64, 512, 2048)))),
            "disks": draw(st.sampled_from(("", "default:10", "san:30", "default:10,san:5"))),
            "apart": draw(st.sampled_from(("", "", "web!"))),
        }
        vms.append(make_vm(f"v{number}", on="n0", **options))
    return nodes, vms


@given(clusters())
@settings(deadline=None, max_examples=150)
def test_no_node_is_overrun_while_all_of_a_nodes_vms_are_on_the_move(
    cluster: tuple[list[Node], list[Vm]],
) -> None:
    nodes, vms = cluster
    by_id = {node.id: node for node in nodes}
    planned = plan_moves(build_snapshot(nodes, vms, SETTINGS), nodes[0], vms)
    records = {vm.id: vm for vm in vms}
    shared_gib = build_snapshot(nodes, vms, SETTINGS).shared_gib
    for stage in (MigrationStage.TRANSFER, MigrationStage.FINALIZE):
        for vm, decision in planned:
            if decision.node is None:
                continue
            copied = copied_disks(vm, nodes[0], by_id[decision.node])
            moving = on_the_move(vm, decision.node, stage, copied)
            if stage is MigrationStage.FINALIZE:
                moving = replace(moving, status=replace(moving.status, node=decision.node))
            records[vm.id] = moving
            snapshot = build_snapshot(nodes, records.values(), SETTINGS)
            check_capacity(snapshot, nodes[0].id)
            assert snapshot.shared_gib == shared_gib, "who moves holds what it held"


def check_capacity(snapshot: Snapshot, source: str) -> None:
    for node in snapshot.nodes.values():
        assert node.allocated_memory_mib <= node.memory_limit_mib
        assert node.allocated_vcpus <= node.vcpus_limit
        local = node.pools["default"]
        assert local.promised_gib <= local.capacity_gib
        for count in node.groups.values():
            # They were together before the drain began.
            assert node.id == source or count.repelling == 0 or count.members == 1
