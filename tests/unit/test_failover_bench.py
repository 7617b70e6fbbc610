"""What the failover bench makes of its writers' log."""

from __future__ import annotations

import asyncio
import math

from controlplane.telemetry.stalls import LOOK_S, watch_stalls
from tests.bench.bench_failover import GATES, percentile
from tests.lab.failover import FAULTS, errors_of, longest_gap_s, stalls_between
from tests.lab.failover_cell import Line

LINES = [
    Line(0, 1, 9.0, 9.9, 200, ""),
    Line(1, 1, 9.9, 10.2, 0, "ConnectionResetError"),
    Line(1, 1, 10.2, 12.9, 503, "no_leader"),
    Line(0, 2, 10.1, 13.0, 200, ""),
    Line(1, 1, 13.0, 13.1, 200, ""),
    Line(0, 3, 90.0, 90.1, 200, ""),
]


def test_the_gap_is_the_longest_time_without_an_acceptance_around_the_fault() -> None:
    assert round(longest_gap_s(LINES, 10.0), 6) == 3.1


def test_whatever_else_was_heard_is_counted() -> None:
    assert errors_of(LINES, 10.0) == ("1 x 0 ConnectionResetError", "1 x 503 no_leader")
    assert errors_of(LINES, 12.95) == ()


def test_every_fault_has_its_gates() -> None:
    assert GATES.keys() == {fault.name for fault in FAULTS}


def test_a_percentile_is_one_of_the_values() -> None:
    gaps = [float(n) for n in range(1, 21)]
    assert percentile(gaps, 0.95) == 19.0
    assert percentile(gaps, 0.5) == 10.0
    assert percentile([4.0], 0.95) == 4.0


async def test_a_stall_of_the_loop_is_seen() -> None:
    seen: asyncio.Queue[float] = asyncio.Queue()
    watching = asyncio.ensure_future(watch_stalls(seen.put_nowait))
    loop = asyncio.get_running_loop()
    try:
        await seen.get()
        held_until_s = loop.time() + 4 * LOOK_S
        while loop.time() < held_until_s:
            pass
        assert await seen.get() >= 2 * LOOK_S
    finally:
        watching.cancel()


def _scrape(**counts: int) -> str:
    name = "novacron_event_loop_stall_seconds_bucket"
    return "".join(f'{name}{{le="{bound}"}} {count}.0\n' for bound, count in counts.items())


def test_stalls_are_those_between_two_looks_at_one_process() -> None:
    before = _scrape(**{"0.05": 90, "0.1": 95, "+Inf": 100})
    later = _scrape(**{"0.05": 190, "0.1": 197, "+Inf": 202})
    other = _scrape(**{"0.05": 3, "0.1": 4, "+Inf": 5})

    assert stalls_between(before, later) == {0.05: 100, 0.1: 102, math.inf: 102}
    assert stalls_between(before, other) == {0.05: 3, 0.1: 4, math.inf: 5}
