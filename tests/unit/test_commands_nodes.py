"""Nodes join, boot, fall silent and are cordoned; the cluster's own record."""

from __future__ import annotations

from controlplane.commands.admission import refusal_of
from controlplane.commands.cluster import MakeCluster, TrimHistory
from controlplane.commands.nodes import RemoveNode, ReportInventory, SetCordon, SetNodeState
from shared.errors import NotFound, StateConflict
from shared.model import ApiKey, Cluster, NodeState
from tests.unit.core_world import BORN, INVENTORY, LEADER, USER, CoreWorld


def test_a_node_keeps_its_id_and_its_boots_are_told() -> None:
    world = CoreWorld()
    again = world.join("n1")
    assert again == world.node_id
    assert world.events() == ["node.joined", "node.ready"]

    world.join("n1", boot_id="boot-2")

    assert world.node().boot_id == "boot-2"
    assert world.events()[2:] == ["node.booted"]
    assert world.join("n2") != world.node_id


def test_joining_does_not_uncordon() -> None:
    world = CoreWorld()
    world.apply(SetCordon(node_id=world.node_id, cordoned=True, reason="disk", by=USER))
    world.join("n1", boot_id="boot-2")

    assert world.node().cordoned
    assert world.node().cordon_reason == "disk"


def test_cordoning_twice_is_refused() -> None:
    world = CoreWorld()
    cordon = SetCordon(node_id=world.node_id, cordoned=True, reason="disk", by=USER)
    world.apply(cordon)
    assert isinstance(world.refused(cordon), StateConflict)

    world.apply(SetCordon(node_id=world.node_id, cordoned=False, reason="", by=USER))
    assert world.node().cordon_reason == ""
    unknown = SetCordon(node_id="node-none", cordoned=True, reason="", by=USER)
    assert isinstance(world.refused(unknown), NotFound)


def test_silence_is_told_once() -> None:
    world = CoreWorld()
    silent = SetNodeState(node_id=world.node_id, state=NodeState.SILENT, by=LEADER)
    world.apply(silent)
    world.apply(silent)

    assert world.events().count("node.silent") == 1


def test_an_inventory_that_says_nothing_new_is_no_write() -> None:
    world = CoreWorld()
    revision = world.state.nodes[world.node_id].revision
    world.apply(ReportInventory(node_id=world.node_id, inventory=INVENTORY, foreign_domains=()))
    assert world.state.nodes[world.node_id].revision == revision

    world.apply(
        ReportInventory(node_id=world.node_id, inventory=INVENTORY, foreign_domains=("mine",))
    )
    assert world.node().foreign_domains == ("mine",)


def test_a_cluster_is_made_once() -> None:
    world = CoreWorld()
    for number in (1, 2):
        cluster = Cluster(id=f"cluster-{number}", cell="abc123", epoch=number, created_at=BORN)
        key = ApiKey(
            id=f"key-{number}", sha256="", principal="admin", role="admin", created_at=BORN
        )
        world.apply(MakeCluster(cluster=cluster, admin_key=key, by=USER))

    made = world.state.cluster()
    assert made is not None
    assert made.id == "cluster-1"
    assert list(world.state.api_keys) == ["key-1"]


def test_trimmed_history_is_gone_and_numbers_go_on() -> None:
    world = CoreWorld()
    last = world.state.last_seq
    world.apply(TrimHistory(seqs=tuple(world.state.history)))
    assert world.state.history == {}

    world.join("n2")
    assert min(world.state.history) == last + 1


def test_a_node_with_vms_is_not_removed_and_one_without_is_shut_out() -> None:
    world = CoreWorld()
    vm_id = world.running()
    refusal = world.refused(RemoveNode(node_id=world.node_id, by=USER))
    assert isinstance(refusal, StateConflict)
    assert "novacron node drain n1" in str(refusal)
    other = world.join("n2")

    world.apply(RemoveNode(node_id=other, by=USER))

    assert other not in world.state.nodes
    assert world.state.node_id_by_name("n2") is None
    why = refusal_of(world.state.admissions["n2"].record, "any certificate")
    assert why is not None
    assert world.events()[-1] == "node.removed"
    assert vm_id in world.state.vms
    assert isinstance(world.refused(RemoveNode(node_id=other, by=USER)), NotFound)
