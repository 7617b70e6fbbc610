"""The gates of a failover: how long no write is accepted, what is lost, whom it stops.

A real cluster of three replicas and three etcd members holds 50,000 VM records, 1,000 agents'
sessions and the lab's own nodes with guests. Eight writers in a process of their own, which knows
nothing of the product, change labels through any replica and log every answer. One fault after the
other is done, each as often as asked for (``NOVACRON_BENCH_RUNS``, 20 by default); after each the
cluster comes to rest again.

The gap of a run is the longest time around its fault in which no write was accepted. Nothing
acknowledged may be lost: in the end each VM has the last number that its writer was told of, or one
that it has asked for since. What fault driver and writers do is timed by one clock, the machine's
monotonic one.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from msgspec import Struct

from tests.bench.failover_cell import WRITERS, FailoverCell, Line
from tests.bench.result import BenchResult, figure
from tests.lab.trial import Trial

RECORDS = 50_000
AGENTS = 1_000
RUNS = int(os.environ.get("NOVACRON_BENCH_RUNS", "20"))
# A replica that stands still for longer than any lease of it.
PAUSED_S = 8.0
# How long a machine that was lost is away, before it comes back for the next run.
LOST_S = 12.0
# Around a fault: from a little before it until the slowest gate has passed twice.
WINDOW_BEFORE_S, WINDOW_AFTER_S = 0.5, 30.0
STALL_GATE_S = 0.1

_BUCKET = re.compile(
    r'^novacron_event_loop_stall_seconds_bucket\{le="(?P<le>[^"]+)"\} (?P<count>[0-9.e+]+)', re.M
)

Strike = Callable[[FailoverCell], None]


class Fault(Struct, frozen=True):
    """A kind of fault with its gates: ``p95_s`` and ``max_s`` of the gap, 0 where there is none.

    ``silent``: no client may hear an error.
    """

    name: str
    strike: Strike
    p95_s: float
    max_s: float = 0.0
    silent: bool = False


def kill_leader(cell: FailoverCell) -> None:
    """kill -9, with the supervisor there to start it again."""
    cell.trial.kill(cell.leader())


def lose_leader(cell: FailoverCell) -> None:
    """kill -9, and nobody starts it again for a while: its machine is gone."""
    leader = cell.leader()
    cell.lab.link.set_restart(leader, False)
    cell.trial.kill(leader)
    time.sleep(LOST_S)
    cell.lab.link.set_restart(leader, True)


def stop_leader(cell: FailoverCell) -> None:
    """SIGTERM: it hands over."""
    os.kill(cell.lab.link.pid_of(cell.leader()), signal.SIGTERM)


def pause_leader(cell: FailoverCell) -> None:
    """SIGSTOP beyond the lease, then SIGCONT."""
    with cell.trial.stopped(cell.leader()):
        time.sleep(PAUSED_S)


def kill_etcd_leader(cell: FailoverCell) -> None:
    cell.trial.kill(cell.etcd_leader())


def pause_etcd_leader(cell: FailoverCell) -> None:
    with cell.trial.stopped(cell.etcd_leader()):
        time.sleep(PAUSED_S)


FAULTS = (
    Fault("leader_killed", kill_leader, p95_s=3.0),
    Fault("leader_lost", lose_leader, p95_s=7.0, max_s=15.0),
    Fault("leader_stopped", stop_leader, p95_s=1.0, max_s=1.0),
    Fault("leader_paused", pause_leader, p95_s=0.0),
    Fault("etcd_leader_killed", kill_etcd_leader, p95_s=0.0, max_s=3.0, silent=True),
    Fault("etcd_leader_paused", pause_etcd_leader, p95_s=0.0, max_s=3.0, silent=True),
)


class Run(Struct, frozen=True):
    """One fault: the longest gap, and the answers in its window that were no acceptance."""

    gap_s: float
    errors: tuple[str, ...]


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
        for fault in faults:
            runs = [_one(cell, fault, number) for number in range(RUNS)]
            results += _held(fault, runs)
        results.append(_stalls(cell))
        results += _nothing_lost(cell)
        results.append(_guests_stopped(cell, boots, since))
    return results


def _one(cell: FailoverCell, fault: Fault, number: int) -> Run:
    cell.settle()
    at = time.monotonic()
    fault.strike(cell)
    cell.settle()
    assert cell.writers_live(), "a writer heard what no client should: see the lab's writers.log"
    lines = cell.lines()
    told = Run(longest_gap_s(lines, at), errors_of(lines, at))
    heard = ", ".join(told.errors) or "no errors"
    line = f"  {fault.name} {number + 1}/{RUNS}: {told.gap_s:.2f} s; {heard}"
    print(line, file=sys.stderr, flush=True)
    return told


def longest_gap_s(lines: Iterable[Line], at: float) -> float:
    """Return the longest time around ``at`` without an accepted write, as writers heard of them."""
    accepted = sorted(
        line.got
        for line in lines
        if line.status == 200 and at - WINDOW_BEFORE_S <= line.got <= at + WINDOW_AFTER_S
    )
    assert len(accepted) > 1, "writes were accepted before and after"
    return max(later - earlier for earlier, later in itertools.pairwise(accepted))


def errors_of(lines: Iterable[Line], at: float) -> tuple[str, ...]:
    """Return what writers heard after ``at`` besides acceptance, each kind once with its number."""
    counts: dict[str, int] = {}
    for line in lines:
        if line.status != 200 and at <= line.got:
            what = f"{line.status} {line.code}".strip()
            counts[what] = counts.get(what, 0) + 1
    return tuple(f"{count} x {what}" for what, count in sorted(counts.items()))


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _held(fault: Fault, runs: list[Run]) -> list[BenchResult]:
    gaps = [each.gap_s for each in runs]
    p95, longest = percentile(gaps, 0.95), max(gaps)
    name = f"failover.{fault.name}"
    results = [figure(f"{name}.median", percentile(gaps, 0.5), "s")]
    results.append(_at_most(f"{name}.p95", p95, fault.p95_s))
    results.append(_at_most(f"{name}.max", longest, fault.max_s))
    if fault.silent:
        heard = sum(bool(each.errors) for each in runs)
        results.append(_none(f"{name}.runs_with_errors", heard, "runs"))
    return results


def _stalls(cell: FailoverCell) -> BenchResult:
    """Return what 99 % of the looks at an event loop were late at most, on the worst replica."""
    worst_s = 0.0
    for text in cell.scrapes():
        buckets = [(float(m["le"]), float(m["count"])) for m in _BUCKET.finditer(text)]
        total = buckets[-1][1]
        worst_s = max(worst_s, next(le for le, count in buckets if count >= 0.99 * total))
    return _at_most("failover.loop_stall_p99", worst_s, STALL_GATE_S)


def _nothing_lost(cell: FailoverCell) -> list[BenchResult]:
    lines = cell.lines()
    lost = 0
    for writer in range(WRITERS):
        told = max(x.number for x in lines if x.writer == writer and x.status == 200)
        found = cell.written(writer)
        lost += found < told
    accepted = sum(line.status == 200 for line in lines)
    return [
        figure("failover.accepted_writes", accepted, "writes"),
        _none("failover.acknowledged_writes_lost", lost, "writers"),
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
