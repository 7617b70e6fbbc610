"""The verdict on a history: whether it shows enough to be judged, and what in it cannot be."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from tests.histories.answers import is_documented
from tests.histories.keys import check_keys
from tests.histories.linear import Act, SearchTooLong, Step, find_order, least
from tests.histories.moments import check_moments
from tests.histories.promises import (
    ABSENT,
    Changed,
    Created,
    Deleted,
    Register,
    Saw,
    SawOther,
)
from tests.histories.record import WRITES, Attempt, History, Outcome
from tests.histories.registers import EVER, RegisterHistory, coming_back, registers_of
from tests.histories.verdict import Violation, told, violation

# What a history must hold for a verdict on it to mean something.
CLIENTS_MIN = 8
OPERATIONS_MIN = 2000
FAULTS_MIN = 2
UNKNOWN_MIN = 0.05

NO_ORDER = "no order of its operations explains the answers"


class Counts(Struct, frozen=True, kw_only=True):
    """``operations`` are those that were answered or may have been done; of them ``unknown`` are
    changes that nobody ever answered for.
    """

    clients: int
    operations: int
    attempts: int
    writes: int
    unknown: int
    not_done: int
    faults: int
    lasted_s: float

    @property
    def unknown_share(self) -> float:
        return self.unknown / self.operations if self.operations else 0.0

    def __str__(self) -> str:
        return (
            f"{self.operations} operations ({self.writes} writes, {self.unknown_share:.1%} of "
            f"unknown outcome) of {self.clients} clients in {self.lasted_s:.1f} s, "
            f"{self.faults} faults, {self.not_done} attempts answered that nothing was done"
        )


def judge(history: History) -> list[Violation]:
    """Return all that cannot be."""
    return [
        *_undocumented(history),
        *check_moments(history),
        *check_keys(history),
        *(found for register in registers_of(history) for found in _no_order(register)),
    ]


def too_little(counts: Counts) -> list[str]:
    """Return why a history shows too little to be counted."""
    wanted = (
        ("clients", counts.clients, CLIENTS_MIN),
        ("operations", counts.operations, OPERATIONS_MIN),
        ("faults", counts.faults, FAULTS_MIN),
        ("share of unknown outcomes", counts.unknown_share, UNKNOWN_MIN),
    )
    return [f"{what}: {there:g} of {least:g}" for what, there, least in wanted if there < least]


def counts_of(history: History) -> Counts:
    operations: dict[int, list[Attempt]] = {}
    for attempt in history.attempts:
        operations.setdefault(attempt.operation, []).append(attempt)
    counted = [each for each in operations.values() if any(map(_may_count, each))]
    writes = [each for each in counted if each[0].kind in WRITES]
    times = [t for each in history.attempts for t in (each.invoked_ns, each.returned_ns)] or [0]
    return Counts(
        clients=len({each[0].client for each in counted}),
        operations=len(counted),
        attempts=len(history.attempts),
        writes=len(writes),
        unknown=sum(all(not _is_answer(a) for a in each) for each in writes),
        not_done=sum(each.outcome is Outcome.NOT_DONE for each in history.attempts),
        faults=len({(fault.blow, fault.began_ns) for fault in history.faults}),
        lasted_s=(max(times) - min(times)) / 1e9,
    )


def _may_count(attempt: Attempt) -> bool:
    return attempt.outcome is not Outcome.NOT_DONE


def _is_answer(attempt: Attempt) -> bool:
    return attempt.outcome in (Outcome.OK, Outcome.DENIED)


def _undocumented(history: History) -> Iterator[Violation]:
    for attempt in history.attempts:
        if not is_documented(attempt):
            yield violation("an answer that nobody documented", attempt.name, [attempt])


def _no_order(register: RegisterHistory) -> Iterator[Violation]:
    comes_back = coming_back(register.steps)
    try:
        stuck = find_order(register.steps, ABSENT, comes_back)
    except SearchTooLong as error:
        yield Violation("the search for an order was given up", register.name, (str(error),))
        return
    if stuck is None:
        return
    steps = _last_part(least(register.steps, ABSENT, comes_back))
    lines = [f"{_told(step)}: {told(register.attempts[step.id])}" for step in steps]
    yield Violation(NO_ORDER, register.name, tuple(lines))


def _last_part(steps: list[Step[Register]]) -> list[Step[Register]]:
    """Leave out what had ended before the first version that what is left speaks of."""
    spoken_of = {_version(step.act) for step in steps if not step.act.changes}
    spoken_of.add(_version(max(steps, key=lambda step: step.end or 0).act))
    begins = [step.begin for step in steps if step.begin != EVER and _makes(step.act) in spoken_of]
    since = min(begins, default=0)
    return [step for step in steps if step.begin >= since or (step.end or 0) >= since]


def _version(act: Act[Register]) -> str:
    """Return the value that a step asks for or forbids; empty for none in particular."""
    match act:
        case Saw(state) | SawOther(state):
            return state.value
        case Changed(_, only) | Deleted(only) if only is not None:
            return only.value
    return ""


def _makes(act: Act[Register]) -> str | None:
    return act.value if isinstance(act, Created | Changed) else None


def _told(step: Step[Register]) -> str:
    """Return what is asked of an order by one step."""
    if step.end is None:
        return f"maybe {step.act}"
    return f"{step.act}{', at any time before the answer' if step.begin == EVER else ''}"
