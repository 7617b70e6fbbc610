"""Measurements of this node's running VMs, in one bulk call. Blocks; runs in a driver's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import libvirt

from agent.libvirt_domains import metadata_of
from shared.model import Sample
from shared.units import KIB

_GROUPS = (
    libvirt.VIR_DOMAIN_STATS_STATE
    | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
    | libvirt.VIR_DOMAIN_STATS_BLOCK
)
# NOWAIT: a domain that another call holds is told of in part instead of being waited for.
_FLAGS = (
    libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
)
_NANOSECONDS = 1e9


def read_samples(connection: libvirt.virConnect, at: float) -> tuple[Sample, ...]:
    """Return one sample per running domain of ours, sorted by VM; a hung one is left out."""
    samples = []
    for domain, figures in connection.getAllDomainStats(_GROUPS, _FLAGS):
        # Not libvirt's own knowledge but part of what is asked of QEMU: there once that answers.
        if "balloon.rss" not in figures:
            continue
        metadata = metadata_of(domain)
        if metadata is not None:
            samples.append(_sample(metadata.vm_id, at, figures))
    return tuple(sorted(samples, key=lambda sample: sample.object))


def _sample(vm_id: str, at: float, figures: Mapping[str, Any]) -> Sample:
    return Sample(
        object=vm_id,
        at=at,
        cpu_s_total=figures.get("cpu.time", 0) / _NANOSECONDS,
        memory_bytes=float(figures.get("balloon.rss", 0) * KIB),
        memory_available_bytes=float(figures.get("balloon.usable", 0) * KIB),
        disk_read_bytes_total=_total(figures, "block", "rd.bytes"),
        disk_write_bytes_total=_total(figures, "block", "wr.bytes"),
        disk_read_requests_total=_total(figures, "block", "rd.reqs"),
        disk_write_requests_total=_total(figures, "block", "wr.reqs"),
        network_receive_bytes_total=_total(figures, "net", "rx.bytes"),
        network_transmit_bytes_total=_total(figures, "net", "tx.bytes"),
    )


def _total(figures: Mapping[str, Any], group: str, field: str) -> float:
    devices = range(figures.get(f"{group}.count", 0))
    return float(sum(figures.get(f"{group}.{index}.{field}", 0) for index in devices))
