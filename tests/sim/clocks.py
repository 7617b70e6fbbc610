"""A machine's clocks: how fast they run, and what date they show.

Owns the way between the simulation's time, which nobody in it can see, and the time that one
machine's processes read and set their timers by. ``rate`` is how many seconds of its own pass in
one; what has passed stays passed when it changes. The date may jump; elapsed time never does.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

BIRTH = datetime(2030, 1, 1, tzinfo=UTC)


class HostClock:
    def __init__(self) -> None:
        self.rate = 1.0
        self.date_off_s = 0.0
        self._since_s = 0.0
        self._own_since_s = 0.0

    def own_s(self, true_s: float) -> float:
        """Return what this clock shows at a moment of the simulation's time."""
        return self._own_since_s + (true_s - self._since_s) * self.rate

    def true_s(self, own_s: float) -> float:
        """Return the first moment at which this clock shows ``own_s``: a timer is never early."""
        true_s = self._since_s + (own_s - self._own_since_s) / self.rate
        while self.own_s(true_s) < own_s:
            true_s = math.nextafter(true_s, math.inf)
        return true_s

    def run_at(self, rate: float, true_s: float) -> None:
        """Run at another rate from ``true_s`` on."""
        self._own_since_s = self.own_s(true_s)
        self._since_s = true_s
        self.rate = rate

    def date(self, true_s: float) -> datetime:
        return BIRTH + timedelta(seconds=self.own_s(true_s) + self.date_off_s)
