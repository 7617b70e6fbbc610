"""Ten minutes of rates out of counters, whatever agents send."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import astuple, replace

from controlplane.telemetry.windows import Rates, Windows
from shared.model import Sample


def sample(at: float, cpu_s: float = 0.0, name: str = "vm-1", **fields: Any) -> Sample:
    return Sample(object=name, at=at, cpu_s_total=cpu_s, **fields)


def test_rates_are_growth_per_second_and_gauges_are_kept() -> None:
    windows = Windows()
    before, after = (
        Sample(
            object="vm-1",
            at=1000.0 + 5.0 * n,
            cpu_s_total=10.0 * n,
            memory_bytes=1.0 + 4095.0 * n,
            memory_available_bytes=512.0 * n,
            disk_read_bytes_total=100.0 + 50.0 * n,
            disk_write_bytes_total=200.0 + 100.0 * n,
            disk_read_requests_total=10.0 + 5.0 * n,
            disk_write_requests_total=20.0 * n,
            network_receive_bytes_total=1000.0 * n,
            network_transmit_bytes_total=2000.0 * n,
            cpu_pressure_percent=1.5 * n,
            memory_pressure_percent=2.5 * n,
            io_pressure_percent=3.5 * n,
        )
        for n in (0, 1)
    )
    windows.add(before)
    windows.add(after)
    assert windows.latest("vm-1") == Rates(
        at=1005.0,
        cpu_percent=200.0,
        memory_bytes=4096.0,
        memory_available_bytes=512.0,
        disk_read_bytes_per_s=10.0,
        disk_write_bytes_per_s=20.0,
        disk_read_requests_per_s=1.0,
        disk_write_requests_per_s=4.0,
        network_receive_bytes_per_s=200.0,
        network_transmit_bytes_per_s=400.0,
        cpu_pressure_percent=1.5,
        memory_pressure_percent=2.5,
        io_pressure_percent=3.5,
    )


def test_one_sample_is_no_rate_yet() -> None:
    windows = Windows()
    assert windows.latest("vm-1") is None
    assert windows.add(sample(1000.0))
    assert (windows.latest("vm-1"), windows.series("vm-1"), len(windows)) == (None, None, 1)


def test_the_ring_keeps_the_last_window_in_order() -> None:
    windows = Windows(period_s=5.0, window_s=20.0)
    for i in range(12):
        windows.add(sample(5.0 * i, cpu_s=i * i))
    series = windows.series("vm-1")
    assert series is not None
    assert (series.as_of, series.period_s) == (55.0, 5.0)
    assert [point.at for point in series.points] == [40.0, 45.0, 50.0, 55.0]
    assert [point.cpu_percent for point in series.points] == [300.0, 340.0, 380.0, 420.0]
    assert windows.latest("vm-1") == series.points[-1]


@pytest.mark.parametrize("at", [1005.0, 1003.0, 1005.2])
def test_late_doubled_and_hurried_samples_are_ignored(at: float) -> None:
    windows = Windows()
    windows.add(sample(1000.0, 0.0))
    windows.add(sample(1005.0, 5.0))
    assert not windows.add(sample(at, 99.0))
    assert windows.ignored == 1
    windows.add(sample(1010.0, 10.0))
    latest = windows.latest("vm-1")
    assert latest is not None
    assert latest.cpu_percent == 100.0, "the ignored sample left no trace"


def test_a_counter_that_began_anew_is_zero_for_one_period() -> None:
    windows = Windows()
    for at, cpu_s in ((0.0, 1000.0), (5.0, 2.0), (10.0, 7.0)):
        windows.add(sample(at, cpu_s))
    series = windows.series("vm-1")
    assert series is not None
    assert [point.cpu_percent for point in series.points] == [0.0, 100.0]


@pytest.mark.parametrize("jump_s", [601.0, -601.0])
def test_a_long_silence_or_a_clock_set_back_starts_anew(jump_s: float) -> None:
    windows = Windows()
    windows.add(sample(5000.0, 0.0))
    windows.add(sample(5005.0, 5.0))
    assert windows.add(sample(5005.0 + jump_s, 6.0))
    assert windows.series("vm-1") is None
    windows.add(sample(5010.0 + jump_s, 11.0))
    latest = windows.latest("vm-1")
    assert latest is not None
    assert latest.cpu_percent == 100.0


def test_a_gap_is_averaged() -> None:
    windows = Windows()
    windows.add(sample(0.0, 0.0))
    windows.add(sample(60.0, 30.0))
    latest = windows.latest("vm-1")
    assert latest is not None
    assert latest.cpu_percent == 50.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["at", "cpu_s_total", "memory_bytes"])
def test_what_is_not_a_number_is_ignored(field: str, poison: float) -> None:
    windows = Windows()
    windows.add(sample(0.0))
    assert not windows.add(replace(sample(5.0), **{field: poison}))
    assert windows.ignored == 1
    assert windows.latest("vm-1") is None


def test_new_objects_are_refused_at_the_limit_and_known_ones_are_not() -> None:
    windows = Windows(objects_max=2)
    assert windows.add(sample(0.0, name="a"))
    assert windows.add(sample(0.0, name="b"))
    assert not windows.add(sample(0.0, name="c"))
    assert windows.add(sample(5.0, name="a"))
    assert (len(windows), windows.refused) == (2, 1)
    windows.forget("b")
    windows.forget("never-there")
    assert windows.add(sample(0.0, name="c"))


def test_objects_that_fell_silent_expire() -> None:
    windows = Windows()
    windows.add(sample(100.0, name="old"))
    windows.add(sample(200.0, name="new"))
    assert windows.expire(before=150.0) == 1
    assert len(windows) == 1
    assert windows.expire(before=150.0) == 0


def test_an_object_costs_what_the_module_says() -> None:
    windows = Windows()
    for i in range(500):
        windows.add(sample(5.0 * i, cpu_s=i * 1.5, memory_bytes=i * 4096.5))
    ring = windows._rings["vm-1"]
    flat = sys.getsizeof(ring._dates) + sys.getsizeof(ring._figures)
    last = sys.getsizeof(ring.last) + sum(map(sys.getsizeof, astuple(ring.last)))
    assert flat + last + sys.getsizeof(ring) < 8192


figures = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1e12)


@given(st.lists(st.tuples(st.floats(0, 100), figures, figures), max_size=30))
def test_no_figure_is_ever_negative_or_no_number(steps: list[tuple[float, float, float]]) -> None:
    windows = Windows(window_s=30.0)
    for at, counter, gauge in steps:
        windows.add(sample(at, counter, disk_read_bytes_total=counter, memory_bytes=gauge))
    series = windows.series("vm-1")
    points = () if series is None else series.points
    for point in points:
        assert all(math.isfinite(figure) and figure >= 0.0 for figure in astuple(point))
    dates = [point.at for point in points]
    assert dates == sorted(set(dates))
    assert len(dates) <= 6
