"""A replica's metrics: names, labels and figures, as a Prometheus parser reads them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from controlplane.scheduler.filters import ReasonCode
from controlplane.telemetry import exporter
from controlplane.telemetry.exporter import Metrics, NodeFigures, VmFigures
from controlplane.telemetry.windows import Windows
from shared.model import OperationState, Sample

Labels = frozenset[tuple[str, str]]


class View:
    def __init__(self, nodes: Iterable[NodeFigures] = (), vms: Iterable[VmFigures] = ()) -> None:
        self._nodes, self._vms = nodes, vms

    def nodes(self) -> Iterable[NodeFigures]:
        return self._nodes

    def vms(self) -> Iterable[VmFigures]:
        return self._vms


@pytest.fixture
def windows() -> Windows:
    return Windows()


@pytest.fixture
def metrics(windows: Windows) -> Metrics:
    return Metrics(CollectorRegistry(), replica="r1", version="0.1.0", windows=windows)


async def scrape(metrics: Metrics, view: View | None = None) -> dict[str, dict[Labels, float]]:
    """Return the figures by sample name and label set."""
    text = await text_of(metrics, view or View())
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            by_labels = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in by_labels, f"{sample.name}{sample.labels} is there twice"
            by_labels[labels] = sample.value
    return found


async def text_of(metrics: Metrics, view: View) -> str:
    return b"".join([piece async for piece in metrics.render(view)]).decode()


def labels(**pairs: str) -> Labels:
    return frozenset(pairs.items())


async def test_build_and_leadership(metrics: Metrics) -> None:
    found = await scrape(metrics)
    assert found["novacron_build_info"] == {labels(replica="r1", version="0.1.0"): 1}
    assert found["novacron_is_leader"] == {labels(): 0}
    for leads in (False, True, True, False, True):
        metrics.leading(leads)
    found = await scrape(metrics)
    assert found["novacron_is_leader"] == {labels(): 1}
    assert found["novacron_leader_transitions_total"] == {labels(): 3}


async def test_what_memory_had_otherwise_than_the_store(metrics: Metrics) -> None:
    metrics.store_mismatches(2)
    metrics.store_mismatches(1)
    assert (await scrape(metrics))["novacron_store_mismatches_total"] == {labels(): 3}


async def test_room_in_the_store_by_member(metrics: Metrics) -> None:
    metrics.store_space(False, 1000, {"m1": (20, 10), "m2": (20, 10)})
    metrics.store_space(True, 1000, {"m1": (1000, 900)})
    found = await scrape(metrics)
    assert found["novacron_store_full"] == {labels(): 1}
    assert found["novacron_store_quota_bytes"] == {labels(): 1000}
    assert found["novacron_store_size_bytes"] == {labels(member="m1"): 1000}
    assert found["novacron_store_in_use_bytes"] == {labels(member="m1"): 900}


async def test_operations_and_placements(metrics: Metrics) -> None:
    metrics.operation_entered("vm.create", OperationState.SUCCEEDED)
    metrics.operation_entered("vm.create", OperationState.SUCCEEDED)
    metrics.placement(0.0002, {})
    metrics.placement(0.03, {ReasonCode.CORDONED: 2, ReasonCode.INSUFFICIENT_MEMORY: 1})
    metrics.placement(0.03, {ReasonCode.CORDONED: 1})
    found = await scrape(metrics)
    assert found["novacron_operations_total"] == {labels(kind="vm.create", state="succeeded"): 2}
    assert found["novacron_placement_rejections_total"] == {
        labels(reason="cordoned"): 3,
        labels(reason="insufficient_memory"): 1,
    }
    assert found["novacron_placement_duration_seconds_count"] == {labels(): 3}
    assert found["novacron_placement_duration_seconds_bucket"][labels(le="0.0005")] == 1
    assert not [name for name in found if name.endswith("_created")]


async def test_requests(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.http_request("/api/v1/vms/{vm}", "GET", 200, 0.004)
    metrics.http_request("/api/v1/vms/{vm}", "GET", 404, 0.004)
    metrics.etcd_request("txn", 0.002)
    found = await scrape(metrics)
    count = found["novacron_http_request_duration_seconds_count"]
    assert count[labels(route="/api/v1/vms/{vm}", method="GET", status="200")] == 3
    assert count[labels(route="/api/v1/vms/{vm}", method="GET", status="404")] == 1
    assert found["novacron_etcd_request_duration_seconds_count"] == {labels(method="txn"): 1}


async def test_odd_requests_cannot_fill_the_memory(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "HTTP_LABEL_SETS_MAX", 2)
    for route in ("/a", "/b", "/c", "/d"):
        metrics.http_request(route, "GET", 200, 0.1)
    metrics.http_request("/a", "BREW", 405, 0.1)
    metrics.http_request("/a", "GET", 200, 0.1)
    assert (await scrape(metrics))["novacron_http_request_duration_seconds_count"] == {
        labels(route="/a", method="GET", status="200"): 2,
        labels(route="/b", method="GET", status="200"): 1,
        labels(route="other", method="other", status="200"): 2,
        labels(route="other", method="other", status="405"): 1,
    }


async def test_nodes_and_vms(metrics: Metrics, windows: Windows) -> None:
    for at, cpu_s in ((1000.0, 0.0), (1005.0, 10.0)):
        windows.add(Sample(object="node-1", at=at, cpu_s_total=cpu_s, memory_bytes=4096.0))
    windows.add(Sample(object="node-1", at=1005.0))
    node = NodeFigures(
        id="node-1",
        name="n1",
        ready=True,
        cordoned=False,
        capacity_cpus=8,
        capacity_memory_bytes=1 << 33,
        allocated_vcpus=3,
        allocated_memory_bytes=1 << 30,
    )
    silent = NodeFigures(id="node-2", name="n2", ready=False, cordoned=True)
    vm = VmFigures(id="vm-1", name='we"b', tenant="default", domain="dom-1", node_name="n1")
    found = await scrape(metrics, View([node, silent], [vm]))
    first, second = labels(node="n1", node_id="node-1"), labels(node="n2", node_id="node-2")
    assert found["novacron_node_ready"] == {first: 1, second: 0}
    assert found["novacron_node_cordoned"] == {first: 0, second: 1}
    assert found["novacron_node_capacity_memory_bytes"] == {first: 1 << 33, second: 0}
    assert found["novacron_node_allocated_vcpus"] == {first: 3, second: 0}
    assert found["novacron_node_usage_cpu_percent"] == {first: 200}, "n2 has no samples"
    assert found["novacron_node_usage_memory_bytes"] == {first: 4096}
    assert found["novacron_node_last_report_timestamp_seconds"] == {first: 1005}
    assert found["novacron_vm_info"] == {
        labels(domain="dom-1", vm_id="vm-1", vm='we"b', tenant="default", node="n1"): 1
    }
    assert found["novacron_telemetry_objects"] == {labels(): 1}
    assert found["novacron_telemetry_unused_samples_total"][labels(reason="ignored")] == 1


async def test_vm_lines_are_bounded(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "VM_INFO_MAX", 3)
    vms = [VmFigures(id=f"vm-{i}", name=f"v{i}", tenant="t", domain=f"d{i}") for i in range(9)]
    assert len((await scrape(metrics, View(vms=vms)))["novacron_vm_info"]) == 3


async def test_a_large_cell_is_written_in_pieces_that_make_one_metric(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "ROWS_AT_ONCE", 2)
    nodes = [
        NodeFigures(id=f"node-{i}", name=f"n{i}", ready=True, cordoned=False) for i in range(5)
    ]
    text = await text_of(metrics, View(nodes))
    assert text.count("# TYPE novacron_node_ready gauge") == 1
    assert len((await scrape(metrics, View(nodes)))["novacron_node_ready"]) == 5
