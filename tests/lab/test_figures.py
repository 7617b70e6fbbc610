"""The figures of nodes and VMs are true: the API's and the agent's agree with the kernel's own.

While guests count and answer pings, the kernel's and libvirt's counters are read twice a second.
What the API says was used over an interval is then held against what those counters grew by between
the very dates that the API names; only figures are compared, never how long anything took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec import Struct

from controlplane.cli.client import path_of
from controlplane.cli.views import VmView
from shared.model import BootSpec, DiskSpec, NicSpec, VmSpec
from tests.lab.api import LabApi
from tests.lab.audit import virsh
from tests.lab.cluster import Lab, LabPlan
from tests.lab.commands import run
from tests.lab.layout import GUEST_BRIDGE, LabError
from tests.lab.link import wait_until
from tests.lab.nodes import LightNode
from tests.lab.state import anchor_program
from tests.lab.story import NewVm
from tests.lab.trial import Trial
from tests.lab.witness import Witness

pytestmark = [pytest.mark.lab, pytest.mark.long]

TOLERANCE = 0.05
# Below these, five percent would be less than what one reading more or less makes.
FLOORS = {"cpu_s": 0.1, "bytes": 4096.0, "memory": 4.0 * 2**20}
REFERENCE_PERIOD_S = 0.5
NODE_DISK_MIB = 64
# Samples are taken every 5 s and arrive every 10 s: a stretch of at least four of them.
STRETCH_S = 20.0
STRETCH_LIMIT_S = 90.0
SAMPLE_PERIOD_S = 5.0
RESETS = 3
GUEST_ADDRESS, NODE_SIDE = "10.99.0.2", "10.99.0.1"
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SECTOR_BYTES = 512

# Echo requests of 1,000 bytes, 100 a second, for as long as whoever started this lives.
PING = """\
import os, socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
def packet(n):
    body = struct.pack("!HH", 7, n & 65535) + bytes(1000)
    words = struct.unpack("!%dH" % (len(body) // 2), body)
    total = 0x0800 + sum(words)
    while total >> 16:
        total = (total & 65535) + (total >> 16)
    return struct.pack("!BBH", 8, 0, ~total & 65535) + body
parent = os.getppid()
n = 0
while os.getppid() == parent:
    n += 1
    try:
        s.sendto(packet(n), (sys.argv[1], 0))
    except OSError:
        pass
    time.sleep(0.01)
"""


class Series(Struct, frozen=True):
    """What the API answers; columns are as long as ``at``."""

    at: tuple[datetime, ...] = ()
    series: dict[str, tuple[float, ...]] = {}


class Reading(Struct, frozen=True):
    """The kernel's and libvirt's counters at one date (seconds since the epoch)."""

    at: float
    values: dict[str, float]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    record = tmp_path_factory.mktemp("witness") / "looks"
    with Lab(LabPlan(nodes=1)) as lab, Witness(record) as watching:
        trial = Trial(lab, watching)
        with closing(trial.api):
            yield trial


def test_figures_agree_with_the_kernel_and_libvirt(trial: Trial, tmp_path: Path) -> None:
    vm = _measured_vm(trial)
    node = trial.lab.node("n1")
    anchor = trial.lab.link.pid_of(anchor_program("n1"))
    inside = ("nsenter", f"--target={anchor}", "--net", "--")
    run(*inside, "ip", "address", "add", f"{NODE_SIDE}/24", "dev", GUEST_BRIDGE)
    reference = _Reference(trial, node, vm, anchor)
    with _pinging((), node.address), _pinging(inside, GUEST_ADDRESS), reference:
        began = time.time()
        for _ in range(RESETS):  # each boot of the guest reads its disk and writes to it
            assert trial.api.wait(trial.api.act(vm.name, "reset")).state == "succeeded"
            time.sleep(SAMPLE_PERIOD_S)
            _use_disk(tmp_path / "traffic")
        of_vm = _await_stretch(trial.api, "vms", vm.name, began)
        of_node = _await_stretch(trial.api, "nodes", "n1", began)
        own = _agent_metrics(inside)
        time.sleep(4 * REFERENCE_PERIOD_S)  # the reference is read around the last sample, too
    _compare(reference, of_vm, "vm", began)
    _compare(reference, of_node, "node", began)
    _compare_agent(reference, own, vm)


def _use_disk(file: Path) -> None:
    """Write and read past the page cache, far more than strangers do at the stretch's edges."""
    size = ("bs=1M", f"count={NODE_DISK_MIB}")
    run("dd", "if=/dev/zero", f"of={file}", *size, "oflag=direct")
    run("dd", f"if={file}", "of=/dev/null", *size, "iflag=direct")


def _measured_vm(trial: Trial) -> VmView:
    boot = BootSpec(
        kernel="tiny-kernel",
        initrd="tiny-initrd",
        cmdline=f"console=ttyS0 nova.address={GUEST_ADDRESS}/24",
    )
    spec = VmSpec(
        vcpus=1,
        memory_mib=192,
        boot=boot,
        disks=(DiskSpec(name="data", size_gib=1),),
        nics=(NicSpec(network="lan"),),
    )
    assert trial.api.wait(trial.api.create_vm(NewVm(name="busy", spec=spec))).state == "succeeded"
    vm = trial.api.vm("busy")
    trial.wait_counting([vm])
    return vm


class _Reference:
    """Reads the counters of the kernel and of libvirt until it is closed."""

    def __init__(self, trial: Trial, node: LightNode, vm: VmView, anchor: int) -> None:
        (guest,) = trial.witness.account().running(vm.id)
        self._node, self._vm, self._anchor, self._qemu = node, vm, anchor, guest.pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read_on)
        self._failure: Exception | None = None
        self.readings: list[Reading] = []

    def at(self, date: float, name: str) -> float:
        """Return a counter at a date, between the two readings around it."""
        dates = [r.at for r in self.readings]
        index = bisect_left(dates, date)
        assert 0 < index < len(dates), f"{date} is outside {dates[0]} to {dates[-1]}"
        before, after = self.readings[index - 1], self.readings[index]
        share = (date - before.at) / (after.at - before.at)
        return before.values[name] + share * (after.values[name] - before.values[name])

    def _read_on(self) -> None:
        try:
            while not self._ended.wait(REFERENCE_PERIOD_S):
                at = time.time()
                values = self._read()
                # The middle of the reading is closest to when each counter was read.
                self.readings.append(Reading((at + time.time()) / 2, values))
        except (OSError, LabError, ValueError, KeyError) as error:
            self._failure = error

    def _read(self) -> dict[str, float]:
        return {
            **{f"node.{k}": v for k, v in _node_counters(self._anchor).items()},
            **{f"vm.{k}": v for k, v in _domain_counters(self._node, self._vm.id).items()},
            **{f"process.{k}": v for k, v in _process_counters(self._qemu).items()},
        }

    def __enter__(self) -> _Reference:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def _node_counters(anchor: int) -> dict[str, float]:
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    memory = _kib_fields(Path("/proc/meminfo"))
    nic = _interface(anchor, "eth0")
    read = written = 0
    for line in Path("/proc/diskstats").read_text().splitlines():
        words = line.split()
        if Path(f"/sys/block/{words[2]}/device").exists():
            read += int(words[5]) * SECTOR_BYTES
            written += int(words[9]) * SECTOR_BYTES
    return {
        "cpu_s": (user + nice + system + irq + softirq + steal) / TICKS,
        "memory_bytes": memory["MemTotal"] - memory["MemAvailable"],
        "memory_available_bytes": memory["MemAvailable"],
        "disk_read_bytes": read,
        "disk_write_bytes": written,
        "network_receive_bytes": nic[0],
        "network_transmit_bytes": nic[8],
    }


def _domain_counters(node: LightNode, domain: str) -> dict[str, float]:
    stats = dict(
        line.strip().split("=", 1)
        for line in virsh(node, "domstats", domain).splitlines()
        if "=" in line
    )
    return {
        "cpu_s": int(stats["cpu.time"]) / 1e9,
        "memory_bytes": int(stats["balloon.rss"]) * 1024,
        "memory_available_bytes": int(stats.get("balloon.usable", 0)) * 1024,
        "disk_read_bytes": int(stats["block.0.rd.bytes"]),
        "disk_write_bytes": int(stats["block.0.wr.bytes"]),
        "network_receive_bytes": int(stats["net.0.rx.bytes"]),
        "network_transmit_bytes": int(stats["net.0.tx.bytes"]),
    }


def _process_counters(pid: int) -> dict[str, float]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "cpu_s": (int(fields[11]) + int(fields[12])) / TICKS,
        "memory_bytes": resident * PAGE_BYTES,
    }


def _interface(pid: int, name: str) -> list[int]:
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        if line.strip().startswith(f"{name}:"):
            return [int(word) for word in line.partition(":")[2].split()]
    raise KeyError(name)


def _kib_fields(path: Path) -> dict[str, int]:
    pairs = (line.split(":") for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


@contextmanager
def _pinging(inside: tuple[str, ...], address: str) -> Iterator[None]:
    process = subprocess.Popen((*inside, sys.executable, "-c", PING, address))
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _await_stretch(api: LabApi, kind: str, name: str, began: float) -> Series:
    """Return the API's series once it holds a stretch that is long enough."""
    found: list[Series] = []

    def is_long_enough() -> bool:
        found[:] = [api.client.get_as(Series, path_of(kind, name, "metrics"))]
        dates = [at.timestamp() for at in found[0].at if at.timestamp() > began]
        return bool(dates) and dates[-1] - dates[0] >= STRETCH_S

    wait_until(is_long_enough, f"figures of {name}", limit_s=STRETCH_LIMIT_S)
    return found[0]


def _compare(reference: _Reference, found: Series, kind: str, began: float) -> None:
    dates = [at.timestamp() for at in found.at]
    began = max(began, reference.readings[0].at)
    # The first period that lies in the stretch as a whole, and all after it.
    first = next(i for i, at in enumerate(dates) if at > began + REFERENCE_PERIOD_S)
    rows = range(first + 1, len(dates))
    lengths = [after - before for before, after in pairwise(dates[first:])]
    sources = ("vm", "process") if kind == "vm" else ("node",)
    rates = {
        "cpu_s": ("cpu_percent", 100.0, FLOORS["cpu_s"]),
        **{
            f"{what}_bytes": (f"{what}_bytes_per_s", 1.0, FLOORS["bytes"])
            for what in ("disk_read", "disk_write", "network_receive", "network_transmit")
        },
    }
    for counter, (column, unit, floor) in rates.items():
        said = sum(
            found.series[column][row] / unit * length
            for row, length in zip(rows, lengths, strict=True)
        )
        for source in sources:
            name = f"{source}.{counter}"
            if name in reference.readings[0].values:
                grown = reference.at(dates[-1], name) - reference.at(dates[first], name)
                if name.startswith("node.disk_"):
                    floor += _moved_at_edges(reference, name, (dates[first], dates[-1]))
                _assert_close(f"{kind} {column} against {name}", said, grown, floor)
    for gauge in ("memory_bytes", "memory_available_bytes"):
        for source in sources:
            if f"{source}.{gauge}" in reference.readings[0].values:
                seen = reference.at(dates[-1], f"{source}.{gauge}")
                said = found.series[gauge][-1]
                _assert_close(f"{kind} {gauge} against {source}", said, seen, FLOORS["memory"])


def _moved_at_edges(reference: _Reference, name: str, edges: tuple[float, float]) -> float:
    """Return what a counter moved within a reading of the edges: nobody can say on which side.

    The node's disk is the whole machine's, and strangers use it in bursts.
    """
    around = [
        reference.at(edge + REFERENCE_PERIOD_S, name)
        - reference.at(edge - REFERENCE_PERIOD_S, name)
        for edge in edges
    ]
    return sum(around)


def _agent_metrics(inside: tuple[str, ...]) -> dict[str, float]:
    """Return what the agent itself tells Prometheus, by name with labels; and when (``date``)."""
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
    text = run(*inside, sys.executable, "-c", script, "http://127.0.0.1:9177/metrics")
    lines = [line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#"]
    return {"date": time.time(), **{name: float(value) for name, _, value in lines}}


def _compare_agent(reference: _Reference, own: dict[str, float], vm: VmView) -> None:
    """Hold that each counter is at most one sampling period old."""
    device = f'{{domain="{vm.id}",target_device="all"}}'
    names = {
        f'libvirt_domain_info_cpu_time_seconds_total{{domain="{vm.id}"}}': "vm.cpu_s",
        f"libvirt_domain_block_stats_read_bytes_total{device}": "vm.disk_read_bytes",
        f"libvirt_domain_block_stats_write_bytes_total{device}": "vm.disk_write_bytes",
        f"libvirt_domain_interface_stats_receive_bytes_total{device}": "vm.network_receive_bytes",
        f"libvirt_domain_interface_stats_transmit_bytes_total{device}": "vm.network_transmit_bytes",
    }
    for metric, name in names.items():
        now = reference.at(own["date"], name)
        before = reference.at(own["date"] - SAMPLE_PERIOD_S - REFERENCE_PERIOD_S, name)
        assert before * (1 - TOLERANCE) <= own[metric] <= now * (1 + TOLERANCE), metric
    memory = own[f'libvirt_domain_info_memory_usage_bytes{{domain="{vm.id}"}}']
    _assert_close(
        "the agent's memory of the VM",
        memory,
        reference.at(own["date"], "process.memory_bytes"),
        FLOORS["memory"],
    )


def _assert_close(what: str, said: float, seen: float, floor: float) -> None:
    allowed = max(TOLERANCE * seen, floor)
    print(f"{what}: said {said:.3f}, seen {seen:.3f}")
    assert abs(said - seen) <= allowed, f"{what}: said {said}, seen {seen}"
