"""The node's own figures, against this machine's /proc and made-up device trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.node_sampler import NodeSampler, physical_disks, pressure_percent, uplinks
from shared.clock import SystemClock
from shared.offload import inline


def sampler(tmp_path: Path | None = None) -> NodeSampler:
    if tmp_path is None:
        return NodeSampler(lambda: "node-1", inline, SystemClock())
    return NodeSampler(lambda: "node-1", inline, SystemClock(), pressure_dir=tmp_path)


def _memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (total,) = (line.split()[1] for line in lines if line.startswith("MemTotal:"))
    return int(total) * 1024


def _busy_s() -> float:
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


async def test_a_sample_agrees_with_proc() -> None:
    before_s = _busy_s()
    sample = await sampler().sample()
    assert sample is not None
    assert sample.object == "node-1"
    assert sample.memory_bytes + sample.memory_available_bytes == _memory_bytes()
    assert before_s - 0.01 <= sample.cpu_s_total <= _busy_s() + 0.01, "but for rounding"
    assert 0 <= sample.cpu_pressure_percent <= 100
    later = await sampler().sample()
    assert later is not None
    assert later.cpu_s_total >= sample.cpu_s_total
    assert later.at >= sample.at
    assert later.network_receive_bytes_total >= sample.network_receive_bytes_total


async def test_pressure_comes_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "cpu").write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=4148477\n")
    (tmp_path / "io").write_text(
        "some avg10=3.00 avg60=1.00 avg300=0.10 total=1\nfull avg10=2.00 avg60=0 avg300=0 total=1\n"
    )
    sample = await sampler(tmp_path).sample()
    assert sample is not None
    assert sample.cpu_pressure_percent == 12.5
    assert sample.io_pressure_percent == 3.0
    assert sample.memory_pressure_percent == 0.0, "this kernel does not tell"


async def test_a_node_without_an_id_takes_no_sample() -> None:
    assert await NodeSampler(lambda: "", inline, SystemClock()).sample() is None


@pytest.mark.parametrize("text", ["", "full avg10=1.00\n", "nonsense\n"])
def test_a_pressure_file_without_the_figure_reads_zero(text: str) -> None:
    assert pressure_percent(text) == 0.0


def test_only_disks_with_hardware_behind_them_count(tmp_path: Path) -> None:
    for name in ("vda/device", "nvme0n1/device", "loop0", "dm-0", "md0"):
        (tmp_path / name).mkdir(parents=True)
    counters = dict.fromkeys(("vda", "vda1", "nvme0n1", "loop0", "dm-0", "md0"), 1)
    assert list(physical_disks(counters, tmp_path)) == ["nvme0n1", "vda"]


def test_only_nics_that_lead_out_count(tmp_path: Path) -> None:
    for name in ("eth0/device", "lo", "br-lan/bridge", "vnet0", "veth1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "vnet0" / "tun_flags").touch()
    every = dict.fromkeys(("lo", "eth0", "br-lan", "vnet0", "veth1"), 1)
    assert list(uplinks(every, tmp_path)) == ["eth0"]
    virtual = dict.fromkeys(("lo", "br-lan", "vnet0", "veth1"), 1)
    assert list(uplinks(virtual, tmp_path)) == ["veth1"], "a namespace has no hardware"
