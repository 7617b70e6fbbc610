"""What `novacron doctor` makes of what the control plane tells."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.cli.doctor import Seen, examine
from controlplane.cli.views import (
    AdmissionView,
    ClusterView,
    CpuView,
    FieldErrorView,
    InventoryView,
    LeaderView,
    MemberView,
    MigrationFactsView,
    NodeView,
    ReplicaView,
    UsageView,
)
from shared.findings import Finding, Verdict, lines, worst

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
INVENTORY = InventoryView(
    cpu=CpuView(model="EPYC"),
    virtualization="kvm",
    migration=MigrationFactsView(tls=True),
    versions={"agent": "0.3.0"},
)
NODES = tuple(
    NodeView(id=f"node-{i}", name=f"n{i}", state="ready", inventory=INVENTORY) for i in (1, 2)
)
WELL = Seen(
    at=NOW,
    cluster=ClusterView(
        id="cluster-1",
        leader=LeaderView(replica="r1"),
        replicas=(ReplicaView(name="r1", version="0.3.0"),),
        members=(MemberView(endpoint="m1:2379", reachable=True),),
    ),
    nodes=NODES,
    admissions=(AdmissionView(name="n1", approved=True, expires_at=NOW + timedelta(days=5)),),
    usage=tuple(UsageView(object=n.id, name=n.name, as_of=NOW) for n in NODES),
)


def bad(seen: Seen) -> list[Finding]:
    return [each for each in examine(seen) if each.verdict is not Verdict.OK]


def with_node(**changes: Any) -> Seen:
    return replace(WELL, nodes=(replace(NODES[0], **changes), NODES[1]))


def with_cluster(**changes: Any) -> Seen:
    return replace(WELL, cluster=replace(WELL.cluster, **changes))


def with_admission(**changes: Any) -> Seen:
    return replace(WELL, admissions=(replace(WELL.admissions[0], **changes),))


def with_clock(off_s: float) -> Seen:
    late = replace(WELL.usage[0], as_of=NOW + timedelta(seconds=off_s))
    return replace(WELL, usage=(late, WELL.usage[1]))


def test_nothing_is_wrong_with_what_is_well() -> None:
    findings = list(examine(WELL))

    assert worst(findings) is Verdict.OK
    assert {each.subject for each in findings} == {
        "leader",
        "releases",
        "etcd",
        "nodes",
        "CPU models",
        "nodes' certificates",
        "clocks",
    }


@pytest.mark.parametrize(
    ("seen", "verdict", "says"),
    [
        (with_cluster(leader=None), Verdict.FAILED, "nobody leads"),
        (
            with_cluster(
                replicas=(
                    *WELL.cluster.replicas,
                    ReplicaView(name="r2", version="0.2.0"),
                )
            ),
            Verdict.WARNING,
            "0.2.0 and 0.3.0",
        ),
        (
            with_cluster(
                upgrade_pending=True, upgrade_blockers=(FieldErrorView(message="n1 runs 0.2.0"),)
            ),
            Verdict.WARNING,
            "n1 runs 0.2.0",
        ),
        (with_cluster(members=(MemberView(endpoint="m1:2379"),)), Verdict.FAILED, "m1:2379"),
        (
            with_cluster(members=(MemberView(endpoint="m1", reachable=True, alarms=("NOSPACE",)),)),
            Verdict.FAILED,
            "repair-store",
        ),
        (with_node(state="silent"), Verdict.FAILED, "is silent"),
        (
            with_node(inventory=replace(INVENTORY, virtualization="tcg")),
            Verdict.WARNING,
            "no KVM",
        ),
        (
            with_node(inventory=replace(INVENTORY, versions={"agent": "0.2.0"})),
            Verdict.WARNING,
            "runs agent 0.2.0",
        ),
        (
            with_node(inventory=replace(INVENTORY, migration=None)),
            Verdict.FAILED,
            "no certificates",
        ),
        (
            with_node(inventory=replace(INVENTORY, cpu=CpuView(model="Skylake"))),
            Verdict.WARNING,
            "Skylake on n1; EPYC on n2",
        ),
        (with_admission(approved=False), Verdict.WARNING, "novacron node approve n1"),
        (with_admission(expires_at=NOW - timedelta(1)), Verdict.FAILED, "join-token"),
        (with_admission(expires_at=NOW + timedelta(1)), Verdict.WARNING, "should have renewed"),
        (with_clock(45), Verdict.WARNING, "45 s ahead"),
        (with_clock(-2 * 86400), Verdict.FAILED, "172800 s behind"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(seen: Seen, verdict: Verdict, says: str) -> None:
    (finding,) = bad(seen)

    assert finding.verdict is verdict
    assert says in "\n".join(lines([finding]))
    assert finding.remedy


def test_a_revoked_node_is_no_news() -> None:
    assert not bad(with_admission(revoked_at=NOW, approved=False))
