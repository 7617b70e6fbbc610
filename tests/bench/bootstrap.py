"""Confidence bounds of a median by the bootstrap (Efron 1979): resample, sort, read off.

Seeded, so that the same measurements always give the same bounds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

RESAMPLES = 4000
CONFIDENCE = 0.95


def lower_bound(values: Sequence[float]) -> float:
    """Return the one-sided 95 % lower bound of the median."""
    return _medians(values)[int(RESAMPLES * (1 - CONFIDENCE))]


def upper_bound(values: Sequence[float]) -> float:
    """Return the one-sided 95 % upper bound of the median."""
    return _medians(values)[int(RESAMPLES * CONFIDENCE)]


def _medians(values: Sequence[float]) -> list[float]:
    rng = random.Random(1)
    return sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
