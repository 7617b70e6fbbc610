"""The node's own figures: CPU, memory, disks, network, and pressure (PSI).

Owns nothing but a choice of devices: each byte is counted once, where it enters or leaves the
machine. So stacked block devices (loop, device mapper, RAID) and the virtual side of the network
(bridges, taps, loopback) do not count. Figures that this kernel does not keep are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil

from shared.clock import Clock
from shared.model import Sample
from shared.offload import Offload

T = TypeVar("T")

_NETWORK_DIR = Path("/sys/class/net")
_BLOCK_DIR = Path("/sys/block")
_PRESSURE_DIR = Path("/proc/pressure")


class NodeSampler:
    """Takes samples of the machine it runs on; ``node_id`` may be empty while it is not known."""

    def __init__(
        self,
        node_id: Callable[[], str],
        offload: Offload,
        clock: Clock,
        *,
        network_dir: Path = _NETWORK_DIR,
        block_dir: Path = _BLOCK_DIR,
        pressure_dir: Path = _PRESSURE_DIR,
    ) -> None:
        self._node_id = node_id
        self._offload = offload
        self._clock = clock
        self._network_dir = network_dir
        self._block_dir = block_dir
        self._pressure_dir = pressure_dir

    async def sample(self) -> Sample | None:
        """Return one sample, or None while the node has no id. Raises OSError."""
        node_id = self._node_id()
        if not node_id:
            return None
        at = self._clock.now().timestamp()
        return await self._offload(lambda: self._read(node_id, at))

    def _read(self, node_id: str, at: float) -> Sample:
        memory = psutil.virtual_memory()
        disks = physical_disks(
            psutil.disk_io_counters(perdisk=True, nowrap=False) or {}, self._block_dir
        ).values()
        nics = uplinks(
            psutil.net_io_counters(pernic=True, nowrap=False), self._network_dir
        ).values()
        return Sample(
            object=node_id,
            at=at,
            cpu_s_total=_busy_s(),
            memory_bytes=float(memory.total - memory.available),
            memory_available_bytes=float(memory.available),
            disk_read_bytes_total=float(sum(d.read_bytes for d in disks)),
            disk_write_bytes_total=float(sum(d.write_bytes for d in disks)),
            disk_read_requests_total=float(sum(d.read_count for d in disks)),
            disk_write_requests_total=float(sum(d.write_count for d in disks)),
            network_receive_bytes_total=float(sum(n.bytes_recv for n in nics)),
            network_transmit_bytes_total=float(sum(n.bytes_sent for n in nics)),
            cpu_pressure_percent=self._pressure("cpu"),
            memory_pressure_percent=self._pressure("memory"),
            io_pressure_percent=self._pressure("io"),
        )

    def _pressure(self, resource: str) -> float:
        """Return the percent of the last ten seconds in which some task waited."""
        try:
            text = (self._pressure_dir / resource).read_text(encoding="ascii")
        except OSError:
            # A kernel without PSI, or one that keeps it switched off.
            return 0.0
        return pressure_percent(text)


def pressure_percent(text: str) -> float:
    """Return ``avg10`` of the ``some`` line of a pressure file, 0 when there is none."""
    for line in text.splitlines():
        kind, *fields = line.split()
        if kind == "some":
            values = dict(field.partition("=")[::2] for field in fields)
            return float(values.get("avg10", 0.0))
    return 0.0


def physical_disks(counters: Mapping[str, T], block_dir: Path) -> dict[str, T]:
    """Return the counters of whole disks that are hardware, or a hypervisor's."""
    return {
        name: counter
        for name, counter in sorted(counters.items())
        # A partition has no directory of its own here; a stacked device has no hardware behind it.
        if (block_dir / name.replace("/", "!") / "device").exists()
    }


def uplinks(counters: Mapping[str, T], network_dir: Path) -> dict[str, T]:
    """Return the counters of the NICs that lead out of the node.

    These are the hardware ones; a node without any (a network namespace) has virtual uplinks, and
    all but loopback, bridges and guests' taps are taken for them.
    """
    hardware = {n: c for n, c in sorted(counters.items()) if (network_dir / n / "device").exists()}
    if hardware:
        return hardware
    return {n: c for n, c in sorted(counters.items()) if not _is_internal(network_dir / n)}


def _is_internal(directory: Path) -> bool:
    return (
        directory.name == "lo"
        or (directory / "bridge").exists()
        or (directory / "tun_flags").exists()
    )


def _busy_s() -> float:
    """Return seconds of CPU time that were not idle, of all CPUs since the boot."""
    times = psutil.cpu_times()
    # The time of guests is contained in user and nice already.
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
