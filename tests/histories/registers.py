"""Makes a history's attempts the steps of one register for each VM's name (see ``promises.py``).

Revisions play no part here: what is concluded rests on values and times alone. ETags are opaque,
and stand for the version that they were first seen with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from tests.histories.answers import DELETED_SINCE, MOVED_ON, NAME_TAKEN, NOT_FOUND
from tests.histories.linear import Step
from tests.histories.promises import (
    ABSENT,
    Act,
    Changed,
    Created,
    Deleted,
    Register,
    Saw,
    SawOther,
)
from tests.histories.record import Attempt, Freshness, History, Kind, Outcome, Seen

# Earlier than everything.
EVER = -1
Tags = dict[tuple[str, str], Register]


class RegisterHistory(Struct, frozen=True, kw_only=True):
    """The steps of one name, and by their ids the attempts that they come from."""

    name: str
    steps: tuple[Step[Register], ...]
    attempts: dict[int, Attempt]


def registers_of(history: History) -> list[RegisterHistory]:
    """Return one register for each name of a history, all steps in it."""
    tags = _tags(history)
    return [_Builder(name, tags).build(attempts) for name, attempts in _by_name(history).items()]


def sharpened(steps: Sequence[Step[Register]]) -> tuple[Step[Register], ...]:
    """Say what is known of steps of unknown outcome: those whose value was seen have happened.

    Of the others it does not matter which one happened, as long as they do the same.
    """
    writers = _writers(steps)
    sure = [step for step in steps if step.end is not None]
    unsure = [step for step in steps if step.end is None]
    seen: dict[str, int] = {}
    fresh = sure
    while fresh:
        # What is found to have happened has itself seen something, perhaps.
        _note_seen(fresh, seen)
        fresh = [
            replace(step, end=seen[value])
            for step in unsure
            if (value := _written(step)) in seen and writers[value] == 1
        ]
        found = {step.id for step in fresh}
        unsure = [step for step in unsure if step.id not in found]
        sure = [*sure, *fresh]
    meant = {value for step in steps for value in _needed(step)}
    return (*sure, *(step if _written(step) in meant else _with_kin(step) for step in unsure))


def coming_back(steps: Iterable[Step[Register]]) -> Callable[[Register], bool]:
    """Return what tells whether a state, once left, can be again: values are written once."""
    writers = _writers(steps)
    return lambda state: state == ABSENT or writers[state.value] > 1


def _writers(steps: Iterable[Step[Register]]) -> Counter[str]:
    return Counter(_written(step) for step in steps)


def _written(step: Step[Register]) -> str:
    return step.act.value if isinstance(step.act, Created | Changed) else ""


def _note_seen(steps: Iterable[Step[Register]], seen: dict[str, int]) -> None:
    """Note until when at the latest each value was there."""
    for step in steps:
        for value in _needed(step):
            if step.end is not None:
                seen[value] = min(seen.get(value, step.end), step.end)


def _needed(step: Step[Register]) -> tuple[str, ...]:
    needs = step.act.needs
    return () if needs in (None, ABSENT) else (needs.born, needs.value)


def _with_kin(step: Step[Register]) -> Step[Register]:
    return replace(step, kin=(type(step.act), step.act.needs))


def state_of(seen: Seen) -> Register:
    return Register(seen.born, seen.value)


def all_seen(attempt: Attempt) -> Iterator[Seen]:
    """Yield every VM that an answer showed."""
    if attempt.seen is not None:
        yield attempt.seen
    for page in attempt.pages:
        yield from page.seen


def _tags(history: History) -> Tags:
    tags: Tags = {}
    for attempt in history.attempts:
        for seen in all_seen(attempt):
            tags.setdefault((seen.name, seen.etag), state_of(seen))
    return tags


def _by_name(history: History) -> dict[str, list[Attempt]]:
    """Sort the attempts by name; a list is an attempt on every name."""
    found: dict[str, list[Attempt]] = {name: [] for name in history.head.names}
    for attempt in history.attempts:
        names: Iterable[str] = (attempt.name,)
        if attempt.kind is Kind.LIST:
            names = history.head.names
        for name in names:
            found[name].append(attempt)
    return found


class _Builder:
    """Builds one register."""

    def __init__(self, name: str, tags: Tags) -> None:
        self._name = name
        self._tags = tags
        self._steps: list[Step[Register]] = []
        self._attempts: dict[int, Attempt] = {}
        self._of_sessions: list[int] = []

    def build(self, attempts: Iterable[Attempt]) -> RegisterHistory:
        efforts: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in sorted(attempts, key=lambda each: each.invoked_ns):
            if attempt.outcome is Outcome.NOT_DONE:
                continue
            effort = attempt.key or f"operation {attempt.operation}"
            efforts[effort].append(attempt)
        for together in efforts.values():
            self._take(together)
        self._order_sessions()
        return RegisterHistory(
            name=self._name, steps=sharpened(self._steps), attempts=self._attempts
        )

    def _take(self, effort: list[Attempt]) -> None:
        """Take the attempts of one operation, or of one key: together they change once at most."""
        done = [each for each in effort if each.outcome is Outcome.OK]
        unknown = any(each.outcome is Outcome.UNKNOWN for each in effort)
        change = self._change(effort[0])
        changed: tuple[int, ...] = ()
        if change is not None and (done or unknown):
            first = min(done, key=lambda each: each.returned_ns) if done else effort[0]
            end = first.returned_ns if done else None
            changed = (self._add(change, first, effort[0].invoked_ns, end),)
        for attempt in effort:
            if attempt.outcome is Outcome.DENIED:
                self._take_denial(attempt)
            elif attempt.outcome is Outcome.OK:
                self._take_sight(attempt, changed)

    def _change(self, attempt: Attempt) -> Act | None:
        only = self._tag(attempt.if_match) if attempt.if_match else None
        if attempt.kind is Kind.CREATE:
            return Created(attempt.value)
        if attempt.kind is Kind.CHANGE:
            return Changed(attempt.value, only)
        if attempt.kind is Kind.DELETE:
            return Deleted(only)
        return None

    def _take_denial(self, attempt: Attempt) -> None:
        if attempt.code == NAME_TAKEN:
            # Decided where the change would be made, whatever revision was asked for.
            self._add(SawOther(ABSENT), attempt, attempt.invoked_ns, attempt.returned_ns)
        elif attempt.code == NOT_FOUND:
            self._look(Saw(ABSENT), attempt)
        elif attempt.code == MOVED_ON:
            self._look(SawOther(self._tag(attempt.if_match)), attempt)

    def _take_sight(self, attempt: Attempt, changed: tuple[int, ...]) -> None:
        """Take what a success shows; what a change shows comes after it."""
        if attempt.kind is Kind.CONFIRM:
            confirmed = self._tag(attempt.if_match)
            self._add(Saw(confirmed), attempt, attempt.invoked_ns, attempt.returned_ns)
        if attempt.kind is Kind.LIST:
            shown = [s for page in attempt.pages for s in page.seen if s.name == self._name]
            self._look(Saw(state_of(shown[0]) if shown else ABSENT), attempt)
        elif attempt.code == DELETED_SINCE:
            # That VM is gone, at some time after its change; the name may be another's by now.
            self._add(Saw(ABSENT), attempt, EVER, attempt.returned_ns, changed)
        elif attempt.seen is not None:
            self._look(Saw(state_of(attempt.seen)), attempt, changed)

    def _tag(self, etag: str) -> Register:
        return self._tags.get((self._name, etag), Register("nothing that was ever seen", etag))

    def _look(self, act: Act, attempt: Attempt, after: tuple[int, ...] = ()) -> None:
        """Add a look at the state as a replica knew it."""
        begin = attempt.invoked_ns if attempt.freshness is Freshness.LATEST else EVER
        step_id = self._add(act, attempt, begin, attempt.returned_ns, after)
        if attempt.freshness is Freshness.SESSION:
            self._of_sessions.append(step_id)

    def _add(
        self, act: Act, attempt: Attempt, begin: int, end: int | None, after: tuple[int, ...] = ()
    ) -> int:
        step = Step(id=len(self._steps), act=act, begin=begin, end=end, after=after)
        self._steps.append(step)
        self._attempts[step.id] = attempt
        return step.id

    def _order_sessions(self) -> None:
        """Put each look that asks for what its client has seen after what that has."""
        known: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for step in self._steps:
            if step.end is not None:
                known[self._attempts[step.id].client].append((step.end, step.id))
        for position in self._of_sessions:
            step, attempt = self._steps[position], self._attempts[position]
            before = (id for end, id in known[attempt.client] if end <= attempt.invoked_ns)
            self._steps[position] = replace(step, after=(*step.after, *before))
