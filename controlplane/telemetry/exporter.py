"""The Prometheus metrics of a replica: what is counted, under which names, and their text.

Callers say what happened (``metrics.placement(...)``) and never touch the Prometheus library.
Counting must stay cheap, because the API counts every request: the child of each label set is
looked up once and then held. Names and labels are an interface: dashboards and alerts rely on them.

Figures of nodes and VMs are not kept here; they are read from a view and from the windows when
somebody asks, and written in pieces with a pause after each, so that a scrape of a large cell does
not hold up the lease's renewal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol, TypeVar

from msgspec import Struct
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from controlplane.telemetry.windows import Rates, Windows
from shared.model import OperationState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Label sets of HTTP requests that are told apart; 100 routes with 10 outcomes each. The rest count
# as one, so that nobody can fill the memory with odd requests.
HTTP_LABEL_SETS_MAX = 1000
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"

# One line each; past that a scrape would be larger than what monitoring commonly takes (10 MB).
VM_INFO_MAX = 50_000

# Lines written before other tasks get their turn: 3 ms.
ROWS_AT_ONCE = 500

HTTP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PLACEMENT_BUCKETS_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
STALL_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
ETCD_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


ReasonT = TypeVar("ReasonT", bound=str)


class NodeFigures(Struct, frozen=True, kw_only=True):
    """What the records say of one node; zero where it has not reported."""

    id: str
    name: str
    ready: bool
    cordoned: bool
    capacity_cpus: int = 0
    capacity_memory_bytes: int = 0
    allocated_vcpus: int = 0
    allocated_memory_bytes: int = 0


class VmFigures(Struct, frozen=True, kw_only=True):
    """What joins a domain's metrics, which its node's agent exports, with the VM's names."""

    id: str
    name: str
    tenant: str
    domain: str
    node_name: str = ""


class ClusterView(Protocol):
    """What a scrape reads; both are called on the event loop and read through at once."""

    def nodes(self) -> Iterable[NodeFigures]: ...

    def vms(self) -> Iterable[VmFigures]: ...


def unscraped_metrics(windows: Windows) -> Metrics:
    """Return metrics that nobody scrapes, for a replica without network servers."""
    return Metrics(CollectorRegistry(), replica="", version="", windows=windows)


class Metrics:
    """The metrics of one replica, in a registry of its own."""

    def __init__(
        self, registry: CollectorRegistry, *, replica: str, version: str, windows: Windows
    ) -> None:
        # "_created" would be a second series for each, of no use to Prometheus.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry
        self._windows = windows
        self._leading = False
        self._http_children: dict[tuple[str, str, int], Callable[[float], None]] = {}
        self._etcd_children: dict[str, Callable[[float], None]] = {}
        self._register(registry)
        self._register_store(registry)
        self._build_info.labels(replica, version).set(1)

    def leading(self, leads: bool) -> None:
        """Say whether this replica leads; a change counts as a transition."""
        if leads is not self._leading:
            self._transitions.inc()
        self._leading = leads
        self._is_leader.set(leads)

    def operation_entered(self, kind: str, state: OperationState) -> None:
        """Count an operation that reached ``state``."""
        self._operations.labels(kind, state.value).inc()

    def placement(self, duration_s: float, refusals: Mapping[ReasonT, int]) -> None:
        """Count one placement and, by reason, the nodes that it refused."""
        self._placement.observe(duration_s)
        for reason, nodes in refusals.items():
            self._rejections.labels(str(reason)).inc(nodes)

    def http_request(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Count one answered request; ``route`` is the route's template, never the path."""
        key = (route, method, status)
        observe = self._http_children.get(key)
        if observe is None:
            observe = self._http_child(key)
        observe(duration_s)

    def etcd_request(self, method: str, duration_s: float) -> None:
        """Count one call of etcd, such as ``txn``; failed ones too, with the time they took."""
        observe = self._etcd_children.get(method)
        if observe is None:
            observe = self._etcd_children[method] = self._etcd.labels(method).observe
        observe(duration_s)

    def store_mismatches(self, count: int) -> None:
        """Count keys that memory was found to have otherwise than the store."""
        self._mismatches.inc(count)

    def store_space(
        self, full: bool, quota_bytes: int, sizes: Mapping[str, tuple[int, int]]
    ) -> None:
        """Say how much room the store has: by member, its size and what of it is in use."""
        self._store_full.set(full)
        self._store_quota.set(quota_bytes)
        self._store_size.clear()
        self._store_in_use.clear()
        for member, (size_bytes, in_use_bytes) in sizes.items():
            self._store_size.labels(member).set(size_bytes)
            self._store_in_use.labels(member).set(in_use_bytes)

    def loop_stalled(self, late_s: float) -> None:
        """Count one look at the event loop, with how late it came to its turn."""
        self._stalls.observe(late_s)

    async def render(self, view: ClusterView) -> AsyncGenerator[bytes]:
        """Yield everything in Prometheus' text format (``CONTENT_TYPE``), piece by piece."""
        yield generate_latest(self._registry)
        for table in self._tables(list(view.nodes()), list(islice(view.vms(), VM_INFO_MAX))):
            for piece in table.pieces():
                yield piece
                await asyncio.sleep(0)

    def _register(self, registry: CollectorRegistry) -> None:
        self._build_info = Gauge(
            "novacron_build_info", "Always 1.", ("replica", "version"), registry=registry
        )
        self._is_leader = Gauge(
            "novacron_is_leader", "1 while this replica leads.", registry=registry
        )
        self._transitions = Counter(
            "novacron_leader_transitions",
            "How often this replica began or ceased to lead.",
            registry=registry,
        )
        self._operations = Counter(
            "novacron_operations",
            "Operations that entered a state.",
            ("kind", "state"),
            registry=registry,
        )
        self._placement = Histogram(
            "novacron_placement_duration_seconds",
            "Time to choose a node for a VM.",
            registry=registry,
            buckets=PLACEMENT_BUCKETS_S,
        )
        self._rejections = Counter(
            "novacron_placement_rejections",
            "Nodes refused in placements, by reason.",
            ("reason",),
            registry=registry,
        )
        self._http = Histogram(
            "novacron_http_request_duration_seconds",
            "Time to answer an API request.",
            ("route", "method", "status"),
            registry=registry,
            buckets=HTTP_BUCKETS_S,
        )
        self._stalls = Histogram(
            "novacron_event_loop_stall_seconds",
            "How late the event loop came to what was due, looked at 20 times a second.",
            registry=registry,
            buckets=STALL_BUCKETS_S,
        )

    def _register_store(self, registry: CollectorRegistry) -> None:
        self._etcd = Histogram(
            "novacron_etcd_request_duration_seconds",
            "Time of a call of etcd, failed ones included.",
            ("method",),
            registry=registry,
            buckets=ETCD_BUCKETS_S,
        )
        self._mismatches = Counter(
            "novacron_store_mismatches",
            "Keys that memory was found to have otherwise than etcd: on a leader a foreign write.",
            registry=registry,
        )
        self._store_full = Gauge(
            "novacron_store_full", "1 while etcd takes nothing more.", registry=registry
        )
        self._store_quota = Gauge(
            "novacron_store_quota_bytes", "What etcd may grow to.", registry=registry
        )
        self._store_size = Gauge(
            "novacron_store_size_bytes",
            "The database of a member of etcd.",
            ("member",),
            registry=registry,
        )
        self._store_in_use = Gauge(
            "novacron_store_in_use_bytes",
            "What of it is in use; the rest comes back by defragmentation.",
            ("member",),
            registry=registry,
        )

    def _http_child(self, key: tuple[str, str, int]) -> Callable[[float], None]:
        route, method, status = key
        child: Callable[[float], None]
        if method not in HTTP_METHODS or len(self._http_children) >= HTTP_LABEL_SETS_MAX:
            child = self._http.labels(OTHER, OTHER, str(status)).observe
            return child  # not held: what is unbounded must not fill the table
        child = self._http.labels(route, method, str(status)).observe
        self._http_children[key] = child
        return child

    def _tables(self, nodes: list[NodeFigures], vms: list[VmFigures]) -> Iterator[_Table]:
        of_node = ("node", "node_id")
        for name, about, read in NODE_GAUGES:
            yield _Table(name, about, of_node, [((n.name, n.id), read(n)) for n in nodes])
        latest = [(n, rates) for n in nodes if (rates := self._windows.latest(n.id))]
        for name, about, measure in NODE_USAGE_GAUGES:
            rows: list[Row] = [((n.name, n.id), measure(rates)) for n, rates in latest]
            yield _Table(name, about, of_node, rows)
        yield _Table(
            "novacron_vm_info",
            "Always 1; joins a domain's metrics with its VM.",
            ("domain", "vm_id", "vm", "tenant", "node"),
            (((vm.domain, vm.id, vm.name, vm.tenant, vm.node_name), 1) for vm in vms),
        )
        yield _Table(
            "novacron_telemetry_objects",
            "Nodes and VMs whose figures this replica holds.",
            (),
            [((), len(self._windows))],
        )
        yield _Table(
            "novacron_telemetry_unused_samples",
            "Samples left out: late, doubled or malformed (ignored), no room (refused).",
            ("reason",),
            [(("ignored",), self._windows.ignored), (("refused",), self._windows.refused)],
            CounterMetricFamily,
        )


Row = tuple[tuple[str, ...], float]


class _Table:
    """One metric that is made when it is asked for."""

    def __init__(
        self,
        name: str,
        about: str,
        labels: tuple[str, ...],
        rows: Iterable[Row],
        family: type[GaugeMetricFamily] | type[CounterMetricFamily] = GaugeMetricFamily,
    ) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._rows, self._family = iter(rows), family

    def pieces(self) -> Iterator[bytes]:
        """Yield the metric's text, ROWS_AT_ONCE lines at a time."""
        rows = list(islice(self._rows, ROWS_AT_ONCE))
        yield self._text(rows)
        while rows := list(islice(self._rows, ROWS_AT_ONCE)):
            # The first two lines say what the metric is, and may be there only once.
            yield self._text(rows).split(b"\n", 2)[2]

    def _text(self, rows: list[Row]) -> bytes:
        family = self._family(self._name, self._about, labels=self._labels)
        for labels, value in rows:
            family.add_metric(labels, value)
        return generate_latest(_One(family))


class _One:
    """A registry of one metric, which is what the library writes out."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


NODE_GAUGES: tuple[tuple[str, str, Callable[[NodeFigures], float]], ...] = (
    ("novacron_node_ready", "1 while the node's agent is heard.", lambda n: n.ready),
    ("novacron_node_cordoned", "1 while no new VM is placed there.", lambda n: n.cordoned),
    ("novacron_node_capacity_cpus", "CPUs for VMs.", lambda n: n.capacity_cpus),
    ("novacron_node_capacity_memory_bytes", "Memory for VMs.", lambda n: n.capacity_memory_bytes),
    ("novacron_node_allocated_vcpus", "vCPUs given to VMs.", lambda n: n.allocated_vcpus),
    (
        "novacron_node_allocated_memory_bytes",
        "Memory given to VMs, with their overhead.",
        lambda n: n.allocated_memory_bytes,
    ),
)

NODE_USAGE_GAUGES: tuple[tuple[str, str, Callable[[Rates], float]], ...] = (
    ("novacron_node_last_report_timestamp_seconds", "Date of the last sample.", lambda r: r.at),
    ("novacron_node_usage_cpu_percent", "CPU used, of one CPU.", lambda r: r.cpu_percent),
    ("novacron_node_usage_memory_bytes", "Memory used.", lambda r: r.memory_bytes),
    (
        "novacron_node_usage_memory_available_bytes",
        "Memory that can still be had.",
        lambda r: r.memory_available_bytes,
    ),
    (
        "novacron_node_usage_disk_read_bytes_per_second",
        "Read from disks.",
        lambda r: r.disk_read_bytes_per_s,
    ),
    (
        "novacron_node_usage_disk_write_bytes_per_second",
        "Written to disks.",
        lambda r: r.disk_write_bytes_per_s,
    ),
    (
        "novacron_node_usage_network_receive_bytes_per_second",
        "Received from networks.",
        lambda r: r.network_receive_bytes_per_s,
    ),
    (
        "novacron_node_usage_network_transmit_bytes_per_second",
        "Sent to networks.",
        lambda r: r.network_transmit_bytes_per_s,
    ),
    (
        "novacron_node_usage_cpu_pressure_percent",
        "Time in which something waited for a CPU.",
        lambda r: r.cpu_pressure_percent,
    ),
    (
        "novacron_node_usage_memory_pressure_percent",
        "Time in which something waited for memory.",
        lambda r: r.memory_pressure_percent,
    ),
    (
        "novacron_node_usage_io_pressure_percent",
        "Time in which something waited for a disk.",
        lambda r: r.io_pressure_percent,
    ),
)
