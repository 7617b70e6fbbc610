"""What records were a while ago, so that all pages of one walk can show one moment.

Kept is what changes took away, newest last, and never a copy of what is: a walk costs nothing while
nothing changes, and any number of walks share the same past. Where it no longer reaches, it says
so; it never guesses.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from msgspec import Struct

Value = TypeVar("Value")
Key = tuple[type, str]

# A VM's older self shares most of itself with the newer: 0.6 kB each, 12 MB in all. To look through
# all takes 10 ms. At the rate that one etcd takes they are 20 s; a walk of 50,000 VMs is 2 s.
CHANGES_MAX = 20_000


class _Change(Struct, Generic[Value], frozen=True, gc=False):
    """What a record was before a change that came after revision ``since``, up to ``revision``."""

    since: int
    revision: int
    kind: type
    id: str
    before: Value | None


class Past(Generic[Value]):
    def __init__(self) -> None:
        # The oldest revision that can be told of.
        self._floor = 0
        self._changes: deque[_Change[Value]] = deque()
        self._pending: dict[Key, Value | None] = {}
        self._turned = 0

    def note(self, kind: type, record_id: str, before: Value | None) -> None:
        """Take what a record was before a change that is being made; None: it was not there."""
        self._pending.setdefault((kind, record_id), before)

    def seal(self, since: int, revision: int) -> None:
        """Say that what was noted came after ``since`` and is complete up to ``revision``."""
        noted, self._pending = self._pending, {}
        if since == 0 or len(noted) > CHANGES_MAX:
            # A first or wholly new listing: there is no moment before it.
            self._changes.clear()
            self._floor = revision
            return
        for (kind, record_id), before in noted.items():
            self._changes.append(_Change(since, revision, kind, record_id, before))
        while len(self._changes) > CHANGES_MAX:
            self._forget_oldest()

    def turn(self, revision: int) -> None:
        """Forget what was there at the last turn already; ``revision`` is the present."""
        while self._changes and self._changes[0].revision <= self._turned:
            self._forget_oldest()
        self._turned = revision

    def since(self, kind: type, revision: int) -> dict[str, Value | None] | None:
        """Return what the records of a kind that changed after ``revision`` were at it.

        None when that cannot be told: it is too long ago, or within changes that came as one.
        """
        if revision < self._floor:
            return None
        found: dict[str, Value | None] = {}
        for change in reversed(self._changes):
            if change.revision <= revision:
                break
            if change.since < revision:
                return None
            if change.kind is kind:
                found[change.id] = change.before
        return found

    def _forget_oldest(self) -> None:
        self._floor = self._changes.popleft().revision
