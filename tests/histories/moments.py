"""Holds what answers say of moments: the state at a revision is one state, whoever shows it.

Linear in the size of a history, and across all names: lists are compared with single VMs, replicas
with each other, and the order of the commits, as the revisions tell it, with the clients' clock.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise

from msgspec import Struct

from tests.histories.promises import ABSENT, Register
from tests.histories.record import Attempt, History, Kind, Outcome, Seen
from tests.histories.registers import all_seen, state_of
from tests.histories.verdict import Violation, violation

_REVISION = re.compile(r"(\d+)\.(\d+)\.\d+")
_ETAG = re.compile(r'"(\d+)\.(\d+)"')

# Epoch and revision, of a commit or of a state.
Moment = tuple[int, int]
BEFORE_ALL: Moment = (0, 0)


class Sight(Struct, frozen=True, kw_only=True):
    """What one answer showed of one name at one moment.

    ``since`` is the commit that its ETag names; ``id`` is empty where the name was absent.
    """

    at: Moment
    state: Register
    id: str
    since: Moment
    attempt: Attempt

    def same_as(self, other: Sight) -> bool:
        return (self.state, self.id, self.since) == (other.state, other.id, other.since)


def moment_of(revision: str) -> Moment:
    """Return the moment of an X-Novacron-Revision or a list's revision. Raises ValueError."""
    return _parsed(_REVISION, revision)


def commit_of(etag: str) -> Moment:
    """Return when the version that an ETag names was committed. Raises ValueError."""
    return _parsed(_ETAG, etag)


def check_moments(history: History) -> Iterator[Violation]:
    """Yield what cannot be if every answer shows the moment that it names."""
    sights = _sights(history)
    for name, of_name in sights.items():
        yield from _one_state_each(name, of_name)
        yield from _one_tag_each(name, of_name)
    for attempt in history.attempts:
        if attempt.outcome in (Outcome.OK, Outcome.DENIED):
            yield from _not_older_than_asked(attempt)
            yield from _list_of_one_moment(history, attempt)
    yield from _commits_in_order(history, sights)


def _parsed(pattern: re.Pattern[str], text: str) -> Moment:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a revision as the API gives them out")
    return int(match[1]), int(match[2])


def _sights(history: History) -> dict[str, list[Sight]]:
    """Return by name what was shown of it, in the order of the moments."""
    found: dict[str, list[Sight]] = {name: [] for name in history.head.names}
    for attempt in history.attempts:
        for name, at, seen in _shown(history, attempt):
            sight = Sight(
                at=at,
                state=ABSENT if seen is None else state_of(seen),
                id="" if seen is None else seen.id,
                since=BEFORE_ALL if seen is None else commit_of(seen.etag),
                attempt=attempt,
            )
            found[name].append(sight)
    return {name: sorted(sights, key=lambda each: each.at) for name, sights in found.items()}


def _shown(history: History, attempt: Attempt) -> Iterator[tuple[str, Moment, Seen | None]]:
    if attempt.kind is Kind.LIST and attempt.outcome is Outcome.OK:
        at = moment_of(attempt.pages[0].revision)
        shown = {seen.name: seen for seen in all_seen(attempt)}
        yield from ((name, at, shown.get(name)) for name in history.head.names)
    elif attempt.seen is not None:
        yield attempt.name, moment_of(attempt.revision), attempt.seen
    elif attempt.kind is Kind.GET and attempt.outcome is Outcome.DENIED:
        yield attempt.name, moment_of(attempt.revision), None


def _one_state_each(name: str, sights: list[Sight]) -> Iterator[Violation]:
    """Hold that a name's versions follow one another: each from its commit to the next one's."""
    for sight in sights:
        if sight.since > sight.at:
            yield violation("shown before it was committed", name, [sight.attempt])
    for before, after in pairwise(sights):
        if before.same_as(after):
            continue
        both = [before.attempt, after.attempt]
        if before.at == after.at:
            yield violation("two states at one revision", name, both)
        elif after.id and after.since <= before.at:
            # What the later moment shows had been committed by the earlier one.
            yield violation("an older state than at an earlier revision", name, both)


def _one_tag_each(name: str, sights: list[Sight]) -> Iterator[Violation]:
    """Hold that an ETag names one version, and a version has one ETag."""
    by_tag: dict[Moment, Sight] = {}
    by_state: dict[Register, Sight] = {}
    for sight in sights:
        if not sight.id:
            continue
        first = by_tag.setdefault(sight.since, sight)
        if (first.state, first.id) != (sight.state, sight.id):
            yield violation("two versions with one ETag", name, [first.attempt, sight.attempt])
        first = by_state.setdefault(sight.state, sight)
        if (first.since, first.id) != (sight.since, sight.id):
            yield violation("one version with two ETags", name, [first.attempt, sight.attempt])


def _not_older_than_asked(attempt: Attempt) -> Iterator[Violation]:
    if attempt.min_revision:
        told = attempt.pages[0].revision if attempt.pages else attempt.revision
        if moment_of(told) < moment_of(attempt.min_revision):
            yield violation("older than what was asked for", attempt.name, [attempt])


def _list_of_one_moment(history: History, attempt: Attempt) -> Iterator[Violation]:
    if attempt.kind is not Kind.LIST or attempt.outcome is not Outcome.OK:
        return
    names = [seen.name for seen in all_seen(attempt)]
    if len({page.revision for page in attempt.pages}) > 1:
        yield violation("pages of several moments", "", [attempt])
    if len(names) != len(set(names)) or not set(names) <= set(history.head.names):
        yield violation("a list shows a VM twice, or one that it should not", "", [attempt])


def _commits_in_order(history: History, sights: dict[str, list[Sight]]) -> Iterator[Violation]:
    """Hold that a write was committed after all that was seen before it, and before its answer."""
    newest = _Newest(history)
    writers: dict[str, list[Attempt]] = {}
    for attempt in history.attempts:
        if attempt.value and attempt.kind in (Kind.CREATE, Kind.CHANGE):
            writers.setdefault(attempt.value, []).append(attempt)
    for name, of_name in sights.items():
        seen = {sight.state.value: sight for sight in of_name if sight.id}
        for value, sight in seen.items():
            attempts = writers.get(value, [])
            if not attempts:
                continue  # read of what nobody wrote: the register says so
            yield from _committed_in_time(name, sight, attempts, newest)
    for attempt in history.attempts:
        if attempt.kind is Kind.DELETE and attempt.outcome is Outcome.OK:
            yield from _gone_for_good(attempt, sights[attempt.name])


def _committed_in_time(
    name: str, sight: Sight, attempts: list[Attempt], newest: _Newest
) -> Iterator[Violation]:
    first = min(attempts, key=lambda each: each.invoked_ns)
    before = newest.before(first.invoked_ns)
    if before is not None and moment_of(before.revision) >= sight.since:
        yield violation(
            "committed before a revision that was seen before it was asked for",
            name,
            [before, first, sight.attempt],
        )
    for attempt in attempts:
        if attempt.outcome is Outcome.OK and moment_of(attempt.revision) < sight.since:
            yield violation(
                "acknowledged with a revision before its commit", name, [attempt, sight.attempt]
            )


def _gone_for_good(deleted: Attempt, sights: list[Sight]) -> Iterator[Violation]:
    at = moment_of(deleted.revision)
    late = [each for each in sights if each.id == deleted.target and each.at >= at]
    if late:
        yield violation(
            "still there at its deletion's revision", deleted.name, [deleted, late[0].attempt]
        )


class _Newest:
    """Finds the answer with the newest revision of those that were there at a time."""

    def __init__(self, history: History) -> None:
        answered = sorted(
            (each for each in history.attempts if each.revision), key=lambda each: each.returned_ns
        )
        self._times = [each.returned_ns for each in answered]
        self._newest = list(accumulate(answered, _newer))

    def before(self, time_ns: int) -> Attempt | None:
        found = bisect_left(self._times, time_ns)
        return self._newest[found - 1] if found else None


def _newer(one: Attempt, other: Attempt) -> Attempt:
    return max(one, other, key=lambda each: moment_of(each.revision))
