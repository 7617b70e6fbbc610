"""The last ten minutes of every node and VM: rates, made of the counters that agents send.

Owns what is kept and for how long. It is memory only and is lost with its process; what it returns
carries ``as_of``, the sampling agent's date. It never waits, never logs and reads no clock. It
trusts no sample: what is out of order, twice there or not a number is left out and counted.

Invariants: no rate is negative; points of an object are in order of time; an object costs about
10 kB (measured: 120 points of 12 single-precision figures are 5.8 kB and their dates 1 kB, the rest
is the last sample, containers and the allocator's slack), so a full table is about 1.1 GB.
"""

from __future__ import annotations

import math
from array import array

from msgspec import Struct
from msgspec.structs import astuple

from shared.model import Sample

WINDOW_S = 600.0
PERIOD_S = 5.0

# All nodes and VMs of the largest cell. With several replicas each holds only its share of them.
OBJECTS_MAX = 110_000

# Two samples that are closer together than this share of a period are noise: a rate over a few
# milliseconds shows how the sampler was scheduled, not what the VM did.
INTERVAL_SHARE_MIN = 0.1

SINGLE_MAX = 3.4e38  # the largest figure that single precision holds


class Rates(Struct, frozen=True, kw_only=True):
    """What an object did in the period that ended ``at`` (seconds since the epoch).

    ``cpu_percent`` is of one CPU: a VM that keeps four busy has 400.
    """

    at: float
    cpu_percent: float
    memory_bytes: float
    memory_available_bytes: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    disk_read_requests_per_s: float
    disk_write_requests_per_s: float
    network_receive_bytes_per_s: float
    network_transmit_bytes_per_s: float
    cpu_pressure_percent: float
    memory_pressure_percent: float
    io_pressure_percent: float


class Series(Struct, frozen=True, kw_only=True):
    """An object's points, oldest first; ``as_of`` is the date of the last one."""

    object: str
    as_of: float
    period_s: float
    points: tuple[Rates, ...]


COLUMNS = len(Rates.__struct_fields__) - 1


class Windows:
    """A ring of points per object."""

    def __init__(
        self,
        period_s: float = PERIOD_S,
        window_s: float = WINDOW_S,
        objects_max: int = OBJECTS_MAX,
    ) -> None:
        assert 0 < period_s <= window_s, "a window holds at least one period"
        self.period_s = period_s
        self.ignored = 0
        self.refused = 0
        self._window_s = window_s
        self._points_max = math.ceil(window_s / period_s)
        self._interval_min_s = period_s * INTERVAL_SHARE_MIN
        self._objects_max = objects_max
        self._rings: dict[str, _Ring] = {}

    def __len__(self) -> int:
        return len(self._rings)

    def add(self, sample: Sample) -> bool:
        """Take one sample in; says whether it was of use.

        An object's first sample is what the first rates are reckoned from, and makes no point.
        ``ignored`` counts samples that are late, doubled or hold something that is not a number;
        ``refused`` those of new objects for which there is no room.
        """
        ring = self._rings.get(sample.object)
        if not all(map(math.isfinite, astuple(sample)[1:])):
            self.ignored += 1
            return False
        if ring is None:
            if len(self._rings) >= self._objects_max:
                self.refused += 1
                return False
            self._rings[sample.object] = _Ring(sample)
            return True
        interval_s = sample.at - ring.last.at
        if abs(interval_s) > self._window_s:
            # Silent for longer than is kept, or a clock was set back by more: start anew. Without
            # this, one date from the future would shut an object's window for good.
            self._rings[sample.object] = _Ring(sample)
            return True
        if interval_s < self._interval_min_s:
            self.ignored += 1
            return False
        ring.append(sample, interval_s, self._points_max)
        return True

    def series(self, object_id: str) -> Series | None:
        """Return an object's points; None while there are none."""
        ring = self._rings.get(object_id)
        if ring is None or not len(ring):
            return None
        points = tuple(ring.point(age) for age in range(len(ring) - 1, -1, -1))
        return Series(object=object_id, as_of=points[-1].at, period_s=self.period_s, points=points)

    def latest(self, object_id: str) -> Rates | None:
        """Return an object's last point; None while there is none."""
        ring = self._rings.get(object_id)
        return None if ring is None or not len(ring) else ring.point(0)

    def forget(self, object_id: str) -> None:
        """Drop an object that is gone; does nothing for one that is not known."""
        self._rings.pop(object_id, None)

    def expire(self, before: float) -> int:
        """Drop the objects whose last sample is older than a date; returns how many they were.

        An object whose samples go to another replica now is never heard of again, nor deleted.
        """
        stale = [name for name, ring in self._rings.items() if ring.last.at < before]
        for name in stale:
            del self._rings[name]
        return len(stale)


class _Ring:
    """One object's points in two flat arrays, which grow up to the limit and are then reused."""

    __slots__ = ("_dates", "_figures", "_next", "last")

    def __init__(self, sample: Sample) -> None:
        self.last = sample
        self._dates = array("d")
        self._figures = array("f")
        self._next = 0

    def __len__(self) -> int:
        return len(self._dates)

    def append(self, sample: Sample, interval_s: float, points_max: int) -> None:
        row = array("f", _figures(self.last, sample, interval_s))
        if len(self._dates) < points_max:
            self._dates.append(sample.at)
            self._figures.extend(row)
        else:
            self._dates[self._next] = sample.at
            self._figures[self._next * COLUMNS : (self._next + 1) * COLUMNS] = row
        self._next = (self._next + 1) % points_max
        self.last = sample

    def point(self, age: int) -> Rates:
        """Return the point that is ``age`` places older than the last one."""
        index = (self._next - 1 - age) % len(self._dates)
        row = self._figures[index * COLUMNS : (index + 1) * COLUMNS]
        return Rates(at=self._dates[index], **dict(zip(_COLUMN_NAMES, row, strict=True)))


_COLUMN_NAMES = Rates.__struct_fields__[1:]


def _figures(before: Sample, now: Sample, interval_s: float) -> list[float]:
    """Return one row, in the order of ``Rates``."""
    row = [
        100.0 * _rate(before.cpu_s_total, now.cpu_s_total, interval_s),
        now.memory_bytes,
        now.memory_available_bytes,
        _rate(before.disk_read_bytes_total, now.disk_read_bytes_total, interval_s),
        _rate(before.disk_write_bytes_total, now.disk_write_bytes_total, interval_s),
        _rate(before.disk_read_requests_total, now.disk_read_requests_total, interval_s),
        _rate(before.disk_write_requests_total, now.disk_write_requests_total, interval_s),
        _rate(before.network_receive_bytes_total, now.network_receive_bytes_total, interval_s),
        _rate(before.network_transmit_bytes_total, now.network_transmit_bytes_total, interval_s),
        now.cpu_pressure_percent,
        now.memory_pressure_percent,
        now.io_pressure_percent,
    ]
    return [min(figure, SINGLE_MAX) if figure > 0.0 else 0.0 for figure in row]


def _rate(before: float, now: float, interval_s: float) -> float:
    """Return a counter's growth per second; 0 for the period in which it began anew.

    A counter falls when its VM is started again, but also when one of several devices behind a sum
    is unplugged. Taking the new value for growth would invent a peak in the second case.
    """
    return (now - before) / interval_s if now >= before else 0.0
