"""Back-off with full jitter, bounded: the only way anything here tries again."""

from __future__ import annotations

import random
from collections.abc import Iterator

from msgspec import Struct


class Backoff(Struct, frozen=True):
    """Delays that double from ``first_s`` to ``cap_s``; each is drawn between zero and that.

    The jitter is full because whoever fails together must not try again together.
    """

    first_s: float
    cap_s: float

    def delays(self, rng: random.Random) -> Iterator[float]:
        """Yield the delay after each failure in a row."""
        bound_s = self.first_s
        while True:
            yield rng.uniform(0, bound_s)
            bound_s = min(self.cap_s, bound_s * 2)
