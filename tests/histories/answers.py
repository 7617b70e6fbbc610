"""What each documented answer means for what was asked (docs/problems.md)."""

from __future__ import annotations

from http import HTTPStatus

from tests.histories.record import Attempt, Kind, Outcome

NAME_TAKEN = "name_taken"
NOT_FOUND = "not_found"
MOVED_ON = "precondition_failed"
OUTCOME_UNKNOWN = "outcome_unknown"
# The change was made; there is nothing left to show.
DELETED_SINCE = "deleted_since"
# Not an answer: the request never left, because nobody accepted a connection.
NEVER_SENT = "never sent"

NOTHING_DONE = frozenset(
    {
        "unavailable",
        "no_leader",
        "leadership_lost",
        "release_too_old",
        "store_unavailable",
        "overloaded",
        # Of a walk through pages, which then begins anew.
        "cursor_expired",
        NEVER_SENT,
    }
)
DENIALS: dict[Kind, frozenset[str]] = {
    Kind.CREATE: frozenset({NAME_TAKEN}),
    Kind.CHANGE: frozenset({NOT_FOUND, MOVED_ON}),
    Kind.CONFIRM: frozenset({NOT_FOUND, MOVED_ON}),
    Kind.DELETE: frozenset({NOT_FOUND, MOVED_ON}),
    Kind.GET: frozenset({NOT_FOUND}),
    Kind.LIST: frozenset(),
}


def outcome_of(kind: Kind, status: int, code: str) -> Outcome:
    """Return what an answer says of a request; one that nobody documented says nothing."""
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return Outcome.OK
    if code == DELETED_SINCE and kind in (Kind.CHANGE, Kind.CONFIRM):
        return Outcome.OK
    if code in NOTHING_DONE:
        return Outcome.NOT_DONE
    if code in DENIALS[kind]:
        return Outcome.DENIED
    return Outcome.UNKNOWN


def is_documented(attempt: Attempt) -> bool:
    """Tell whether an answer is one that the request may get; no answer at all is none."""
    if attempt.outcome is not Outcome.UNKNOWN:
        return attempt.code != MOVED_ON or bool(attempt.if_match)
    return attempt.code in ("", OUTCOME_UNKNOWN)
