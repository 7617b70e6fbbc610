"""Time as a port.

Waiting is ``asyncio.sleep`` and ``asyncio.timeout`` on the loop's clock, which the simulation
replaces. This port is for the two other meanings of time: the date, which records carry and no
decision compares across machines, and elapsed time that counts suspension, which leases need.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Return the date in UTC; for people, never for safety."""
        ...

    def boottime_s(self) -> float:
        """Return seconds that pass while the machine sleeps too; only differences have meaning."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def boottime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
