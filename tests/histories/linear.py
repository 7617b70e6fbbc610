"""Whether the steps of clients on one object can have happened one after the other.

The search of J. M. Wing and C. Gong (Testing and Verifying Concurrent Objects, 1993): from the
start, take a step that no other one has to come before, if the object in its present state allows
what the step saw; go back where nothing can be taken. As in G. Lowe's (Testing for Linearizability,
2017) nothing is looked at twice. What keeps it fast:

- A step that changes nothing is taken as soon as it can be, which never spoils anything.
- A state that cannot come back is not left while a step still needs it.
- A step of unknown outcome has no end: it may be taken at any time after its beginning, or never.
  It is taken only right before a step that is possible through it. (Where a step overwrites all
  that matters to later ones, as in a register, it could as well have been left out otherwise.) Of
  several that are as good as each other, only the first is tried.
- Whoever has several objects asks for each by itself, which is all the same: a history is
  linearizable if each object's part of it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import replace

# A history of 2,000 operations takes some thousand looks; a violation may take a hundred times as
# many. Past this the search has gone astray, and says so instead of running for hours.
LOOKS_MAX = 3_000_000

S = TypeVar("S", bound=Hashable)


class Act(Protocol[S]):
    """What a step does and saw. ``needs``: the one state that it fits, if there is only one."""

    @property
    def changes(self) -> bool: ...

    @property
    def needs(self) -> S | None: ...

    def follow(self, now: S) -> S | None:
        """Return the state after the step; None when it cannot be taken in this one."""
        ...


class Step(Struct, Generic[S], frozen=True, kw_only=True):
    """One step. ``begin`` and ``end`` are the times between which it happened.

    ``end`` None: nobody knows whether it did; of those with the same ``kin`` it does not matter
    which. ``after`` are ids of steps with an end that it comes after, whatever the times say.
    """

    id: int
    act: Act[S]
    begin: int
    end: int | None
    after: tuple[int, ...] = ()
    kin: Hashable = None


class Stuck(Struct, Generic[S], frozen=True):
    """How far the best try came: the ids taken, the state then, and who could never be taken."""

    taken: tuple[int, ...]
    state: S
    step: Step[S]


class SearchTooLong(Exception):
    """The search was given up: nothing is known."""


class _Place(Struct, Generic[S]):
    """Where the search is: a set of steps taken, as bits, and the state.

    ``first``: of the steps in the order of their ends, those before this one are all taken.
    ``through``: a step of unknown outcome was taken last, in this state: the next one is one that
    could not be taken in it.
    """

    taken: int
    state: S
    first: int
    path: _Path | None
    through: S | None = None


class _Path(Struct):
    position: int
    before: _Path | None


def find_order(
    steps: Iterable[Step[S]],
    start: S,
    comes_back: Callable[[S], bool] = lambda state: True,
    looks_max: int = LOOKS_MAX,
) -> Stuck[S] | None:
    """Return None when there is an order; otherwise how far the search came.

    ``comes_back`` may deny that a state, once left, can ever be again. Raises SearchTooLong.
    """
    return _Search(steps, comes_back).run(start, looks_max)


class _Search(Generic[S]):
    def __init__(self, steps: Iterable[Step[S]], comes_back: Callable[[S], bool]) -> None:
        self._steps = sorted(steps, key=lambda step: step.begin)
        self._comes_back = comes_back
        self._begins = [step.begin for step in self._steps]
        positions = {step.id: position for position, step in enumerate(self._steps)}
        self._after = [
            sum(1 << positions[each] for each in set(step.after) if each in positions)
            for step in self._steps
        ]
        ended = [(step.end, at) for at, step in enumerate(self._steps) if step.end is not None]
        self._by_end = sorted(ended)
        self._required = sum(1 << at for _, at in ended)
        self._changing = sum(1 << at for at, step in enumerate(self._steps) if step.act.changes)
        self._needing: dict[S, int] = {}
        for _, at in ended:
            needs = self._steps[at].act.needs
            if needs is not None:
                self._needing[needs] = self._needing.get(needs, 0) | 1 << at

    def run(self, start: S, looks_max: int) -> Stuck[S] | None:
        waiting = [_Place(0, start, 0, None)]
        looked: set[tuple[int, S, S | None]] = set()
        best = waiting[0]
        while waiting:
            place = self._settled(waiting.pop())
            if self._required & ~place.taken == 0:
                return None
            here = (place.taken, place.state, place.through)
            if here in looked:
                continue
            looked.add(here)
            if len(looked) > looks_max:
                raise SearchTooLong(f"after {looks_max} looks at {len(self._steps)} steps")
            if self._score(place) > self._score(best):
                best = place
            waiting += self._next(place)
        return self._stuck(best)

    def _settled(self, place: _Place[S]) -> _Place[S]:
        """Take all that changes nothing and can be taken."""
        while True:
            place.first = self._first(place)
            found = [
                at
                for at in self._open(place, ~self._changing)
                if self._steps[at].act.follow(place.state) is not None
            ]
            if not found:
                return place
            # None of them was possible before, or it would have been taken then.
            place.through = None
            for at in found:
                place.taken |= 1 << at
                place.path = _Path(at, place.path)

    def _next(self, place: _Place[S]) -> list[_Place[S]]:
        """Return where a change leads from here, the most urgent one last."""
        found = []
        tried: set[Hashable] = set()
        for at in self._open(place, self._changing):
            step = self._steps[at]
            state = step.act.follow(place.state)
            if state is None or step.kin in tried or not self._is_use(place, at):
                continue
            if not self._may_leave(place, at, state):
                continue
            if step.kin is not None:
                tried.add(step.kin)
            through = place.state if step.end is None else None
            path = _Path(at, place.path)
            there = _Place(place.taken | 1 << at, state, place.first, path, through)
            found.append((self._urgency(at), there))
        found.sort(key=lambda each: each[0], reverse=True)
        return [there for _, there in found]

    def _is_use(self, place: _Place[S], at: int) -> bool:
        """Tell whether a step makes use of the one before it, if that was of unknown outcome."""
        return place.through is None or self._steps[at].act.follow(place.through) is None

    def _may_leave(self, place: _Place[S], at: int, state: S) -> bool:
        if state == place.state or self._comes_back(place.state):
            return True
        return not self._needing.get(place.state, 0) & ~place.taken & ~(1 << at)

    def _open(self, place: _Place[S], among: int) -> list[int]:
        """Return the steps that nothing has to come before any more, in order of beginning."""
        horizon = self._by_end[place.first][0] if place.first < len(self._by_end) else None
        limit = len(self._steps)
        if horizon is not None:
            # Who begins after the first end that is not taken has to wait for it.
            limit = bisect_left(self._begins, horizon + 1)
        left = among & ~place.taken & ((1 << limit) - 1)
        found = []
        while left:
            bit = left & -left
            left ^= bit
            at = bit.bit_length() - 1
            if self._after[at] & ~place.taken == 0:
                found.append(at)
        return found

    def _first(self, place: _Place[S]) -> int:
        first = place.first
        while first < len(self._by_end) and place.taken >> self._by_end[first][1] & 1:
            first += 1
        return first

    def _urgency(self, at: int) -> tuple[bool, int]:
        end = self._steps[at].end
        return (end is None, self._begins[at] if end is None else end)

    def _score(self, place: _Place[S]) -> int:
        return (place.taken & self._required).bit_count()

    def _stuck(self, best: _Place[S]) -> Stuck[S]:
        taken = []
        path = best.path
        while path is not None:
            taken.append(self._steps[path.position].id)
            path = path.before
        blocked = self._steps[self._by_end[self._first(best)][1]]
        return Stuck(tuple(reversed(taken)), best.state, blocked)


def least(
    steps: Sequence[Step[S]], start: S, comes_back: Callable[[S], bool] = lambda state: True
) -> list[Step[S]]:
    """Return few of the steps that still have no order, so that a reader sees why.

    Only what makes an order easier is left out: what came later, and what changed nothing.
    """

    def fails(some: Sequence[Step[S]]) -> bool:
        try:
            return find_order(some, start, comes_back, LOOKS_MAX // 100) is not None
        except SearchTooLong:
            return False

    ends = sorted({step.end for step in steps if step.end is not None})
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if fails(_until(steps, ends[middle])):
            high = middle
        else:
            low = middle + 1
    left = _until(steps, ends[low])
    for step in sorted(left, key=lambda step: step.begin):
        rest = [each for each in left if each.id != step.id]
        if not step.act.changes and fails(rest):
            left = rest
    return sorted(left, key=lambda step: step.begin)


def _until(steps: Sequence[Step[S]], time: int) -> list[Step[S]]:
    """Return what had begun by a time; what had not ended by then may end whenever, or never."""
    found = []
    for step in steps:
        if step.begin > time:
            continue
        if step.end is None or step.end <= time:
            found.append(step)
        elif step.act.changes:
            found.append(replace(step, end=None))
    return found
