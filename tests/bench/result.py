"""What a bench returns: figures, the gates they are held against, and whether they hold."""

from __future__ import annotations

from msgspec import Struct


class BenchResult(Struct, frozen=True, kw_only=True):
    """One figure. ``gate`` says in words what must hold; it is empty for a mere figure."""

    name: str
    value: float
    unit: str
    gate: str
    holds: bool


def figure(name: str, value: float, unit: str) -> BenchResult:
    """Return a figure that is held against no gate."""
    return BenchResult(name=name, value=round(value, 3), unit=unit, gate="", holds=True)
