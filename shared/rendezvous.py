"""Rendezvous hashing: which of some places a thing goes to, without anybody who decides.

Each thing has its own order of the places. When a place is gone, only what went there moves, and
spreads over all others (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
1998).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def in_order(thing: str, places: Iterable[str]) -> list[str]:
    """Return the places, the one first that the thing goes to while all are there."""
    return sorted(places, key=lambda place: (_weight(thing, place), place), reverse=True)


def _weight(thing: str, place: str) -> bytes:
    # Not hash(): that is another one in every process.
    return hashlib.blake2b(f"{thing}\0{place}".encode(), digest_size=8).digest()
