"""The agent's own Prometheus metrics: its domains and itself, as text.

Domains carry the names that libvirt's exporters have made customary, so that existing dashboards
work; ``novacron_vm_info`` of a replica joins them with VMs. A sample sums up all disks and all
interfaces of a domain, which the label ``target_device="all"`` says. Nothing is kept here: figures
are read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from msgspec import Struct
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shared.model import ObservedPower, Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# More than any node runs; the text stays below 2 MB.
DOMAINS_MAX = 1000

# libvirt's numbers of domain states; 0 is its "no state".
STATE_NUMBERS = {
    ObservedPower.RUNNING: 1,
    ObservedPower.PAUSED: 3,
    ObservedPower.STOPPED: 5,
    ObservedPower.SHUT_OFF: 5,
    ObservedPower.CRASHED: 6,
}


class DomainFigures(Struct, frozen=True, kw_only=True):
    """One domain of ours, and its last sample if it has one (only running domains do)."""

    domain: str
    power: ObservedPower
    vcpus: int
    memory_max_bytes: int
    sample: Sample | None = None


class AgentFigures(Struct, frozen=True, kw_only=True):
    """How the agent itself does; dates are seconds since the epoch, 0 for never.

    ``last_report_at`` is the date of the last sample that a replica has taken.
    """

    version: str
    session_connected: bool
    outbox_batches: int
    outbox_dropped_samples: int
    samples_taken: int
    sample_failures: int
    missed_rounds: int
    last_report_at: float


class AgentExporter:
    """Writes the text from two callables that answer at once."""

    def __init__(
        self,
        agent: Callable[[], AgentFigures],
        domains: Callable[[], Iterable[DomainFigures]],
    ) -> None:
        self._agent = agent
        self._domains = domains

    def render(self) -> bytes:
        """Return everything in Prometheus' text format (``CONTENT_TYPE``)."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric: what the Prometheus library asks of a registry."""
        yield from _agent_metrics(self._agent())
        yield from _domain_metrics(list(islice(self._domains(), DOMAINS_MAX)))


def _agent_metrics(agent: AgentFigures) -> Iterator[Metric]:
    build = GaugeMetricFamily("novacron_agent_build_info", "Always 1.", labels=("version",))
    build.add_metric((agent.version,), 1)
    yield build
    for name, about, gauge in (
        (
            "session_connected",
            "1 while the leader has accepted the session.",
            float(agent.session_connected),
        ),
        ("outbox_batches", "Batches no replica has taken yet.", agent.outbox_batches),
        (
            "last_report_timestamp_seconds",
            "Date of the last sample that a replica has taken, 0 for none.",
            agent.last_report_at,
        ),
    ):
        yield GaugeMetricFamily(f"novacron_agent_{name}", about, value=gauge)
    for name, about, count in (
        (
            "outbox_dropped_samples",
            "Samples let go because nobody took them.",
            agent.outbox_dropped_samples,
        ),
        ("samples_taken", "Samples of the node and its domains.", agent.samples_taken),
        ("sample_failures", "Sources that failed or hung.", agent.sample_failures),
        ("missed_rounds", "Rounds skipped after a slow one.", agent.missed_rounds),
    ):
        yield CounterMetricFamily(f"novacron_agent_{name}", about, value=count)


def _domain_metrics(domains: list[DomainFigures]) -> Iterator[Metric]:
    for name, about, fact in DOMAIN_FACTS:
        gauge = GaugeMetricFamily(f"libvirt_domain_{name}", about, labels=("domain",))
        for domain in domains:
            gauge.add_metric((domain.domain,), fact(domain))
        yield gauge
    sampled = [(domain.domain, domain.sample) for domain in domains if domain.sample is not None]
    for name, about, gauge_figure in DOMAIN_GAUGES:
        gauge = GaugeMetricFamily(f"libvirt_domain_{name}", about, labels=("domain",))
        for label, sample in sampled:
            gauge.add_metric((label,), gauge_figure(sample))
        yield gauge
    time = CounterMetricFamily(
        "libvirt_domain_info_cpu_time_seconds", "CPU time used.", labels=("domain",)
    )
    for label, sample in sampled:
        time.add_metric((label,), sample.cpu_s_total)
    yield time
    for name, about, total in DEVICE_COUNTERS:
        counter = CounterMetricFamily(
            f"libvirt_domain_{name}", about, labels=("domain", "target_device")
        )
        for label, sample in sampled:
            counter.add_metric((label, "all"), total(sample))
        yield counter


DOMAIN_FACTS: tuple[tuple[str, str, Callable[[DomainFigures], float]], ...] = (
    ("info_state", "libvirt's number of the state.", lambda d: STATE_NUMBERS.get(d.power, 0)),
    ("info_virtual_cpus", "vCPUs.", lambda d: d.vcpus),
    ("info_maximum_memory_bytes", "Memory the guest may have.", lambda d: d.memory_max_bytes),
)

DOMAIN_GAUGES: tuple[tuple[str, str, Callable[[Sample], float]], ...] = (
    ("info_memory_usage_bytes", "Memory in use.", lambda s: s.memory_bytes),
    (
        "memory_stats_usable_bytes",
        "Memory that the guest can still have.",
        lambda s: s.memory_available_bytes,
    ),
)

DEVICE_COUNTERS: tuple[tuple[str, str, Callable[[Sample], float]], ...] = (
    ("block_stats_read_bytes", "Read from disks.", lambda s: s.disk_read_bytes_total),
    ("block_stats_write_bytes", "Written to disks.", lambda s: s.disk_write_bytes_total),
    ("block_stats_read_requests", "Disk reads.", lambda s: s.disk_read_requests_total),
    ("block_stats_write_requests", "Disk writes.", lambda s: s.disk_write_requests_total),
    ("interface_stats_receive_bytes", "Received.", lambda s: s.network_receive_bytes_total),
    ("interface_stats_transmit_bytes", "Sent.", lambda s: s.network_transmit_bytes_total),
)
