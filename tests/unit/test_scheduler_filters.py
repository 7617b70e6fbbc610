"""What each filter says, in words and figures; the golden clusters test when it says it."""

from __future__ import annotations

import msgspec
import pytest

from controlplane.scheduler.filters import FILTERS, Reason, ReasonCode
from controlplane.scheduler.place import explain
from controlplane.scheduler.request import SchedulerSettings, request_of
from controlplane.scheduler.snapshot import build_snapshot
from shared.model import Vm
from tests.unit.cluster_text import make_node, make_vm

SETTINGS = SchedulerSettings(cpu_overcommit=2.0, memory_reserve_mib=96)
BIG = {"cpus": "8", "memory": "4096"}


def reasons(node: dict[str, str], wanted: dict[str, str], *others: Vm) -> tuple[Reason, ...]:
    record = make_node("n1", **node)
    snapshot = build_snapshot([record], others, SETTINGS)
    return explain(snapshot, request_of(make_vm("a", **wanted)), record.id).reasons


@pytest.mark.parametrize(
    ("node", "wanted", "code", "words"),
    [
        (BIG | {"state": "silent"}, {}, ReasonCode.NODE_SILENT, "the node's agent is not heard"),
        (BIG | {"state": "later"}, {}, ReasonCode.NODE_STATE_UNKNOWN, "state is not known"),
        (BIG | {"cordon": "fan"}, {}, ReasonCode.CORDONED, "the node is cordoned: fan"),
        (BIG | {"cordon": ""}, {}, ReasonCode.CORDONED, "the node is cordoned"),
        ({"inventory": "none"}, {}, ReasonCode.NO_INVENTORY, "not reported yet"),
        (
            BIG,
            {"labels": "zone:a,tier:gold"},
            ReasonCode.NODE_LABELS,
            "does not carry labels tier=gold, zone=a",
        ),
        (BIG, {"networks": "lan"}, ReasonCode.MISSING_NETWORK, "the node has no network lan"),
        (BIG, {"kernel": "none-such"}, ReasonCode.MISSING_ARTEFACT, "no artefact none-such"),
        (BIG, {"disks": "fast:1,big:1"}, ReasonCode.MISSING_POOL, "no storage pools big, fast"),
    ],
)
def test_reasons_without_figures(
    node: dict[str, str], wanted: dict[str, str], code: ReasonCode, words: str
) -> None:
    (reason,) = reasons(node, {"vcpus": "1", "memory": "256"} | wanted)
    assert reason.code is code
    assert words in reason.message
    assert reason.needed is None


@pytest.mark.parametrize(
    ("wanted", "code", "needed", "free", "words"),
    [
        (
            {"memory": "4096"},
            ReasonCode.INSUFFICIENT_MEMORY,
            4096 + 48 + 4 + 16,
            4000,
            "needs 4164 MiB of memory (4096 and 68 of overhead), 4000 of 4000 MiB are free",
        ),
        ({"vcpus": "9"}, ReasonCode.TOO_MANY_VCPUS, 9, 8, "has 9 vCPUs, the node has 8 CPUs"),
        (
            {"disks": "default:60,default:40"},
            ReasonCode.INSUFFICIENT_DISK,
            100,
            80,
            "needs 100 GiB in pool default, 80.0 of 120.0 GiB may still be promised",
        ),
    ],
)
def test_reasons_with_figures(
    wanted: dict[str, str], code: ReasonCode, needed: float, free: float, words: str
) -> None:
    node = BIG | {"pools": "default:120:80"}
    (reason,) = reasons(node, {"vcpus": "1", "memory": "256"} | wanted)
    assert (reason.code, reason.needed, reason.free) == (code, needed, free)
    assert words in reason.message


def test_cpu_is_overcommitted_between_vms_only() -> None:
    worker = make_vm("worker", on="n1", vcpus="13", memory="64")
    assert reasons(BIG, {"vcpus": "3", "memory": "64"}, worker) == ()
    (reason,) = reasons(BIG, {"vcpus": "4", "memory": "64"}, worker)
    assert reason.code is ReasonCode.INSUFFICIENT_CPU
    assert reason.message == "needs 4 vCPUs, 3 of 16 are free (8 CPUs, 2 vCPUs for each)"


def test_all_reasons_of_a_node_are_given() -> None:
    node = {"cpus": "2", "memory": "256", "state": "silent", "cordon": "x"}
    wanted = {"vcpus": "8", "memory": "1024", "networks": "lan", "disks": "p:1", "labels": "z:a"}
    assert [reason.code for reason in reasons(node, wanted)] == [
        ReasonCode.NODE_SILENT,
        ReasonCode.CORDONED,
        ReasonCode.INSUFFICIENT_MEMORY,
        ReasonCode.INSUFFICIENT_CPU,
        ReasonCode.TOO_MANY_VCPUS,
        ReasonCode.NODE_LABELS,
        ReasonCode.MISSING_NETWORK,
        ReasonCode.MISSING_POOL,
    ]


def test_hard_rules_of_either_side_keep_vms_apart() -> None:
    plain = {"vcpus": "1", "memory": "64"}
    soft = make_vm("soft", on="n1", apart="web", **plain)
    hard = make_vm("hard", on="n1", apart="web!", **plain)
    assert reasons(BIG, plain | {"apart": "web"}, soft) == ()
    for wanted, other in (("web!", soft), ("web", hard), ("web!", hard)):
        (reason,) = reasons(BIG, plain | {"apart": wanted}, other)
        assert reason.code is ReasonCode.ANTI_AFFINITY
        assert "a VM of group web" in reason.message
    assert reasons(BIG, plain, hard) == (), "a VM outside of the group may join"


def test_groups_of_another_tenant_are_other_groups() -> None:
    plain = {"vcpus": "1", "memory": "64", "apart": "web!"}
    foreign = msgspec.structs.replace(make_vm("b", on="n1", **plain), tenant="other")
    assert reasons(BIG, plain, foreign) == ()


def test_affinity_counts_who_is_elsewhere() -> None:
    nodes = [make_node(name, **BIG) for name in ("n1", "n2")]
    member = make_vm("db", on="n2", vcpus="1", memory="64", **{"with": "db!"})
    snapshot = build_snapshot(nodes, [member], SETTINGS)
    request = request_of(make_vm("a", vcpus="1", memory="64", **{"with": "db!"}))
    (reason,) = explain(snapshot, request, "node-n1").reasons
    assert reason.message == "none of the 1 VMs of group db run on the node"
    assert explain(snapshot, request, "node-n2").fits


def test_filters_are_left_out_only_where_they_have_nothing_to_say() -> None:
    snapshot = build_snapshot([make_node("n1", **BIG)], [], SETTINGS)
    request = request_of(make_vm("a", vcpus="1", memory="64"))
    left_out = [entry for entry in FILTERS if not entry.concerns(request)]
    assert {entry.check.__name__ for entry in left_out} == {
        "bound_elsewhere", "node_labels", "networks", "pools", "disk_space", "affinity",
        "anti_affinity", "runs_here", "can_migrate", "left_behind", "virtualization",
        "qemu_version", "shared_pools",
    }  # fmt: skip
    assert explain(snapshot, request, "node-n1").fits
