"""The footprint gate: memory and CPU of an agent with ten VMs and of the control plane, at rest.

Read from ``/proc`` over a minute in which nobody asks for anything; guests, heartbeats, samples
and lease renewals go on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from shared.model import BootSpec, VmSpec
from shared.units import MIB
from tests.bench.bench_create import VmBody
from tests.bench.result import BenchResult, figure
from tests.lab.cluster import Lab, LabPlan

VMS = 10
# Starts are long over by then, and the first windows of samples are full.
SETTLE_S = 30.0
MEASURE_S = 60.0
AGENT_MEMORY_MAX_MIB = 72.0
AGENT_CPU_MAX_PERCENT = 1.0
CONTROL_PLANE_MEMORY_MAX_MIB = 140.0

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def run() -> list[BenchResult]:
    """Measure one node's agent and one replica, and hold them against their gates."""
    with Lab(LabPlan(nodes=1, cpus=8, memory_mib=8192)) as lab:
        api = lab.api()
        for operation in [api.create_vm(_body(number)) for number in range(VMS)]:
            ended = api.wait(operation)
            assert ended.state == "succeeded", f"a create ended {ended.state}: {ended.error}"
        api.close()
        state = lab.state()
        agent_pid, replica_pid = state.nodes[0].agent_pid, state.replicas[0].pid
        assert agent_pid is not None, "the agent runs"
        assert replica_pid is not None, "the replica runs"
        time.sleep(SETTLE_S)
        agent_cpu_s, replica_cpu_s = _cpu_s(agent_pid), _cpu_s(replica_pid)
        time.sleep(MEASURE_S)
        agent_percent = (_cpu_s(agent_pid) - agent_cpu_s) / MEASURE_S * 100
        replica_percent = (_cpu_s(replica_pid) - replica_cpu_s) / MEASURE_S * 100
        agent_mib, replica_mib = _resident_mib(agent_pid), _resident_mib(replica_pid)
    return [
        _at_most("footprint.agent_memory", agent_mib, "MiB", AGENT_MEMORY_MAX_MIB),
        _at_most("footprint.agent_cpu", agent_percent, "% of a CPU", AGENT_CPU_MAX_PERCENT),
        _at_most(
            "footprint.control_plane_memory", replica_mib, "MiB", CONTROL_PLANE_MEMORY_MAX_MIB
        ),
        figure("footprint.control_plane_cpu", replica_percent, "% of a CPU"),
    ]


def _body(number: int) -> VmBody:
    return VmBody(
        name=f"rest-{number}",
        spec=VmSpec(
            vcpus=1,
            memory_mib=128,
            boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline="console=ttyS0"),
        ),
    )


def _at_most(name: str, value: float, unit: str, limit: float) -> BenchResult:
    return BenchResult(
        name=name,
        value=round(value, 2),
        unit=unit,
        gate=f"at most {limit:g}",
        holds=value <= limit,
    )


def _cpu_s(pid: int) -> float:
    """Return the CPU time a process has used, from the fields after its name (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
