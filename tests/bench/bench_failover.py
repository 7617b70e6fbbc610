"""The gates of a failover: how long no write is accepted, what is lost, whom it stops.

A real cluster of three replicas and three etcd members holds 50,000 VM records, 1,000 agents'
sessions and the lab's own nodes with guests. Eight writers in a process of their own, which knows
nothing of the product, change labels through any replica and log every answer. One fault after the
other is done, each as often as asked for (``NOVACRON_BENCH_RUNS``, 20 by default;
``NOVACRON_BENCH_FAULTS`` names some of them); after each the cluster comes to rest again.

Nothing acknowledged may be lost: in the end each VM has the last number that its writer was told
of, or one that it has asked for since. All is timed by the machine's monotonic clock.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from tests.bench.result import BenchResult, figure
from tests.lab.failover import FAULTS, Fault, Run, done_to, writers_that_lost
from tests.lab.failover_cell import FailoverCell
from tests.lab.trial import Trial

RECORDS = 50_000
AGENTS = 1_000
RUNS = int(os.environ.get("NOVACRON_BENCH_RUNS", "20"))
STALL_GATE_S = 0.1


class Gate(Struct, frozen=True):
    """Limits of the gap; 0 where there is none."""

    p95_s: float = 0.0
    max_s: float = 0.0


GATES = {
    "leader_killed": Gate(p95_s=3.0),
    "leader_lost": Gate(p95_s=7.0, max_s=15.0),
    "leader_stopped": Gate(max_s=1.0),
    "leader_paused": Gate(),
    "etcd_leader_killed": Gate(max_s=3.0),
    "etcd_leader_paused": Gate(max_s=3.0),
}


def run() -> list[BenchResult]:
    """Do every fault as often as asked for, and hold what came of it against the gates."""
    wanted = os.environ.get("NOVACRON_BENCH_FAULTS", "")
    faults = [f for f in FAULTS if not wanted or f.name in wanted.split(",")]
    with (
        tempfile.TemporaryDirectory(prefix="novacron-failover-") as scratch,
        FailoverCell(Path(scratch), RECORDS, AGENTS) as cell,
    ):
        boots = {vm.name: len(cell.trial.counts(vm)) for vm in cell.guests()}
        since = cell.trial.witness.now()
        results: list[BenchResult] = []
        every: list[Run] = []
        for fault in faults:
            runs = [_told(fault, number, done_to(cell, fault)) for number in range(RUNS)]
            results += _held(fault, runs)
            every += runs
        results.append(_stalls(every))
        results += _nothing_lost(cell)
        results.append(_guests_stopped(cell, boots, since))
    return results


def _told(fault: Fault, number: int, run: Run) -> Run:
    heard = ", ".join(run.errors) or "no errors"
    line = f"  {fault.name} {number + 1}/{RUNS}: {run.gap_s:.2f} s; {heard}"
    print(line, file=sys.stderr, flush=True)
    return run


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _held(fault: Fault, runs: list[Run]) -> list[BenchResult]:
    gaps = [each.gap_s for each in runs]
    p95, longest = percentile(gaps, 0.95), max(gaps)
    name, gate = f"failover.{fault.name}", GATES[fault.name]
    results = [figure(f"{name}.median", percentile(gaps, 0.5), "s")]
    results.append(_at_most(f"{name}.p95", p95, gate.p95_s))
    results.append(_at_most(f"{name}.max", longest, gate.max_s))
    if fault.silent:
        heard = sum(bool(each.errors) for each in runs)
        results.append(_none(f"{name}.runs_with_errors", heard, "runs"))
    return results


def _stalls(runs: list[Run]) -> BenchResult:
    """Return what 99 % of the looks at a leader's event loop were late at most.

    They are those of each replica that took over, from just before it did until all was at rest.
    """
    counts: dict[float, float] = {}
    for run in runs:
        for bound, count in run.stalls.items():
            counts[bound] = counts.get(bound, 0.0) + count
    within = (bound for bound, count in sorted(counts.items()) if count >= 0.99 * counts[math.inf])
    return _at_most("failover.leader_stall_p99", next(within), STALL_GATE_S)


def _nothing_lost(cell: FailoverCell) -> list[BenchResult]:
    accepted = sum(line.status == 200 for line in cell.lines())
    return [
        figure("failover.accepted_writes", accepted, "writes"),
        _none("failover.acknowledged_writes_lost", writers_that_lost(cell), "writers"),
    ]


def _guests_stopped(cell: FailoverCell, boots: dict[str, int], since: float) -> BenchResult:
    trial: Trial = cell.trial
    trial.wait_counting(cell.guests())
    seen = trial.witness.account()
    until = trial.witness.now()
    stopped = sum(
        not seen.same_process(vm.id, since, until) or len(trial.counts(vm)) != boots[vm.name]
        for vm in cell.guests()
    )
    return _none("failover.guests_stopped", stopped, "guests")


def _at_most(name: str, value: float, limit: float) -> BenchResult:
    if not limit:
        return figure(name, value, "s")
    return BenchResult(
        name=name, value=round(value, 3), unit="s", gate=f"at most {limit:g}", holds=value <= limit
    )


def _none(name: str, count: int, unit: str) -> BenchResult:
    return BenchResult(name=name, value=float(count), unit=unit, gate="none", holds=not count)
