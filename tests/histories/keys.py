"""Holds what answers say of identity: keys are done once, ids and operations never used twice.

Nothing here depends on when something was seen, but for what came after an acknowledgement.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.histories.answers import DELETED_SINCE, NAME_TAKEN
from tests.histories.record import Attempt, History, Kind, Outcome
from tests.histories.registers import all_seen
from tests.histories.verdict import Violation, violation


def check_keys(history: History) -> Iterator[Violation]:
    """Yield what cannot be if a request with a key is done once, and ids are never used again."""
    by_key: dict[str, list[Attempt]] = {}
    for attempt in history.attempts:
        if attempt.key:
            by_key.setdefault(attempt.key, []).append(attempt)
    for attempts in by_key.values():
        yield from _done_once(attempts)
    yield from _operations_of_one_request(history)
    yield from _ids_of_one_vm(history)


def _done_once(attempts: list[Attempt]) -> Iterator[Violation]:
    done = sorted(
        (each for each in attempts if each.outcome is Outcome.OK and each.code != DELETED_SINCE),
        key=lambda each: each.returned_ns,
    )
    if not done:
        return
    first = done[0]
    for attempt in done[1:]:
        if _what_it_became(attempt) != _what_it_became(first):
            yield violation("one key became two things", first.name, [first, attempt])
    for attempt in attempts:
        if attempt.invoked_ns <= first.returned_ns:
            continue
        if attempt in done and not attempt.replayed:
            yield violation("a key was done again", first.name, [first, attempt])
        if attempt.outcome is Outcome.DENIED and attempt.code == NAME_TAKEN:
            yield violation("a key that was done was tried again", first.name, [first, attempt])


def _what_it_became(attempt: Attempt) -> str:
    return attempt.operation_id or (attempt.seen.id if attempt.seen else "")


def _operations_of_one_request(history: History) -> Iterator[Violation]:
    """Hold that no two requests were answered with the same operation, unless by their key."""
    first: dict[str, Attempt] = {}
    for attempt in history.attempts:
        if attempt.outcome is not Outcome.OK or not attempt.operation_id:
            continue
        other = first.setdefault(attempt.operation_id, attempt)
        if _request(other) != _request(attempt):
            yield violation("two requests became one operation", attempt.name, [other, attempt])


def _request(attempt: Attempt) -> str:
    return attempt.key or str(attempt.operation)


def _ids_of_one_vm(history: History) -> Iterator[Violation]:
    """Hold that an id is of the VM that one create made, and that a create's answer names it."""
    of_id: dict[str, tuple[str, Attempt]] = {}
    of_born: dict[str, tuple[str, Attempt]] = {}
    for attempt in history.attempts:
        named = [(seen.id, seen.born) for seen in all_seen(attempt)]
        if attempt.kind is Kind.CREATE and attempt.outcome is Outcome.OK:
            named.append((attempt.target, attempt.value))
        for id, born in named:
            first = of_id.setdefault(id, (born, attempt))
            if first[0] != born:
                yield violation("one id, two VMs", attempt.name, [first[1], attempt])
            first = of_born.setdefault(born, (id, attempt))
            if first[0] != id:
                yield violation("one create made two VMs", attempt.name, [first[1], attempt])
