"""The agent's metrics: names, labels and figures, as a Prometheus parser reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from agent import exporter
from agent.exporter import AgentExporter, AgentFigures, DomainFigures
from shared.model import ObservedPower, Sample

AGENT = AgentFigures(
    version="0.1.0",
    session_connected=True,
    outbox_batches=3,
    outbox_dropped_samples=40,
    samples_taken=500,
    sample_failures=2,
    missed_rounds=1,
    last_report_at=1234.5,
)
SAMPLE = Sample(
    object="vm-1",
    at=1000.0,
    cpu_s_total=12.5,
    memory_bytes=1 << 28,
    memory_available_bytes=1 << 27,
    disk_read_bytes_total=1.0,
    disk_write_bytes_total=2.0,
    disk_read_requests_total=3.0,
    disk_write_requests_total=4.0,
    network_receive_bytes_total=5.0,
    network_transmit_bytes_total=6.0,
)
RUNNING = DomainFigures(
    domain="vm-1",
    power=ObservedPower.RUNNING,
    vcpus=2,
    memory_max_bytes=1 << 29,
    sample=SAMPLE,
)
STOPPED = DomainFigures(
    domain="vm-2", power=ObservedPower.SHUT_OFF, vcpus=1, memory_max_bytes=1 << 28
)


def scrape(*domains: DomainFigures) -> dict[str, dict[str, float]]:
    """Return the figures by sample name and label values."""
    found: dict[str, dict[str, float]] = {}
    text = AgentExporter(lambda: AGENT, lambda: domains).render().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            assert labels not in found.setdefault(sample.name, {})
            found[sample.name][labels] = sample.value
    return found


def test_the_agent_tells_of_itself() -> None:
    found = scrape()
    assert {name: figure[""] for name, figure in found.items() if "" in figure} == {
        "novacron_agent_session_connected": 1,
        "novacron_agent_outbox_batches": 3,
        "novacron_agent_last_report_timestamp_seconds": 1234.5,
        "novacron_agent_outbox_dropped_samples_total": 40,
        "novacron_agent_samples_taken_total": 500,
        "novacron_agent_sample_failures_total": 2,
        "novacron_agent_missed_rounds_total": 1,
    }
    assert found["novacron_agent_build_info"] == {"0.1.0": 1}


def test_domains_have_the_customary_names() -> None:
    found = scrape(RUNNING, STOPPED)
    domains = {name: figures for name, figures in found.items() if name.startswith("libvirt_")}
    assert domains == {
        "libvirt_domain_info_state": {"vm-1": 1, "vm-2": 5},
        "libvirt_domain_info_virtual_cpus": {"vm-1": 2, "vm-2": 1},
        "libvirt_domain_info_maximum_memory_bytes": {"vm-1": 1 << 29, "vm-2": 1 << 28},
        "libvirt_domain_info_memory_usage_bytes": {"vm-1": 1 << 28},
        "libvirt_domain_memory_stats_usable_bytes": {"vm-1": 1 << 27},
        "libvirt_domain_info_cpu_time_seconds_total": {"vm-1": 12.5},
        "libvirt_domain_block_stats_read_bytes_total": {"vm-1,all": 1},
        "libvirt_domain_block_stats_write_bytes_total": {"vm-1,all": 2},
        "libvirt_domain_block_stats_read_requests_total": {"vm-1,all": 3},
        "libvirt_domain_block_stats_write_requests_total": {"vm-1,all": 4},
        "libvirt_domain_interface_stats_receive_bytes_total": {"vm-1,all": 5},
        "libvirt_domain_interface_stats_transmit_bytes_total": {"vm-1,all": 6},
    }


def test_domains_are_bounded() -> None:
    many = [
        DomainFigures(domain=f"vm-{i}", power=ObservedPower.UNKNOWN, vcpus=1, memory_max_bytes=1)
        for i in range(exporter.DOMAINS_MAX + 1)
    ]
    assert len(scrape(*many)["libvirt_domain_info_state"]) == exporter.DOMAINS_MAX
