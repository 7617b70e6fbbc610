"""What is done to a cluster of three replicas and three members, and what its writers heard of it.

A fault is a function over the cell; it returns once it has healed. The gap of a run is the longest
time around its fault in which no write was accepted.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable

from msgspec import Struct

from tests.lab.failover_cell import REPLICA_LIMIT_S, WRITERS, FailoverCell, Line
from tests.lab.link import wait_until

# A replica that stands still for longer than any lease of it.
PAUSED_S = 8.0
# What a scrape of tens of thousands of VMs costs a replica is over by then.
QUIET_S = 3.0
# How long a machine that was lost is away, before it comes back for the next run.
LOST_S = 12.0
# Around a fault: from a little before it until the slowest gate has passed twice.
WINDOW_BEFORE_S, WINDOW_AFTER_S = 0.5, 30.0
Strike = Callable[[FailoverCell], None]

_BUCKET = re.compile(
    r'^novacron_event_loop_stall_seconds_bucket\{le="(?P<le>[^"]+)"\} (?P<count>[0-9.e+]+)', re.M
)


class Fault(Struct, frozen=True):
    """A kind of fault. ``silent``: no client may hear an error."""

    name: str
    strike: Strike
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
    """SIGTERM: it hands over, and answers until it ends."""
    leader, link = cell.leader(), cell.lab.link
    before = link.program(leader)
    os.kill(link.pid_of(leader), signal.SIGTERM)
    wait_until(lambda: link.program(leader) != before, f"a new {leader}", limit_s=REPLICA_LIMIT_S)


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
    Fault("leader_killed", kill_leader),
    Fault("leader_lost", lose_leader),
    Fault("leader_stopped", stop_leader),
    Fault("leader_paused", pause_leader),
    Fault("etcd_leader_killed", kill_etcd_leader, silent=True),
    Fault("etcd_leader_paused", pause_etcd_leader, silent=True),
)


class Run(Struct, frozen=True):
    """One fault: the longest gap, and the answers in its window that were no acceptance.

    ``stalls``: how late the looks at the event loop of who leads since came, of each bound in
    seconds how many came within it.
    """

    gap_s: float
    errors: tuple[str, ...]
    stalls: dict[float, float]


def done_to(cell: FailoverCell, fault: Fault) -> Run:
    """Do a fault to a cell at rest, and return what came of it once it is at rest again."""
    cell.settle()
    before = cell.scrapes()
    time.sleep(QUIET_S)
    at = time.monotonic()
    fault.strike(cell)
    cell.settle()
    leader = cell.leader()
    stalls = stalls_between(before[leader], cell.scrapes()[leader])
    assert cell.writers_live(), "a writer heard what no client should: see the lab's writers.log"
    lines = cell.lines()
    return Run(longest_gap_s(lines, at), errors_of(lines, at), stalls)


def stalls_between(before: str, after: str) -> dict[float, float]:
    """Return a replica's looks at its event loop between two scrapes, of each bound how many.

    A process that is new since then has all its looks in the second.
    """
    earlier, later = _stalls(before), _stalls(after)
    if earlier[math.inf] > later[math.inf]:
        return later
    return {bound: count - earlier[bound] for bound, count in later.items()}


def _stalls(scrape: str) -> dict[float, float]:
    return {float(found["le"]): float(found["count"]) for found in _BUCKET.finditer(scrape)}


def writers_that_lost(cell: FailoverCell) -> int:
    """Return how many writers were told of a write that is not there any more."""
    lines = cell.lines()
    lost = 0
    for writer in range(WRITERS):
        told = max(each.number for each in lines if each.writer == writer and each.status == 200)
        lost += cell.written(writer) < told
    return lost


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
