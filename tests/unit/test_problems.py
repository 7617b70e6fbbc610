"""Problems and the error tree: every error says what a client may conclude from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.errors import (
    ConfigInvalid,
    FieldError,
    FieldErrors,
    NovacronError,
    OutcomeUnknown,
    StoreFull,
    Unavailable,
    ValidationFailed,
)
from shared.problems import TYPE_PREFIX, problem, problem_of


def tree(kind: type[NovacronError] = NovacronError) -> Iterator[type[NovacronError]]:
    """Yield the one tree; a module's private variant of an error speaks with its parent's code."""
    if kind.__module__ == NovacronError.__module__:
        yield kind
    for each in kind.__subclasses__():
        yield from tree(each)


def test_an_error_becomes_a_problem() -> None:
    told = problem_of(StoreFull("etcd is full"), "req-1")

    assert (told.type, told.code, told.status) == (TYPE_PREFIX + "store_full", "store_full", 507)
    assert (told.title, told.detail, told.request_id) == ("Store full", "etcd is full", "req-1")


def test_field_errors_are_all_there() -> None:
    errors = (FieldError("/a", "x", "is bad"), FieldError("", "y", "is worse"))

    for error in (ValidationFailed(errors), ConfigInvalid("c.toml", errors)):
        assert problem_of(error).errors == errors
        assert "/a: is bad; /: is worse" in str(error)


@pytest.mark.parametrize("kind", sorted(set(tree()), key=str))
def test_every_error_has_a_code_of_its_own(kind: type[NovacronError]) -> None:
    same = [other for other in tree() if other.code == kind.code and other is not kind]

    # Errors about fields share the summary of their kind's base, which is never raised itself.
    assert same == [] or kind in (NovacronError, FieldErrors)
    assert 400 <= kind.http_status < 600
    assert kind.code == kind.code.lower()


def test_what_may_be_tried_again_says_so() -> None:
    assert all(kind.retryable and kind.http_status == 503 for kind in tree(Unavailable))
    assert OutcomeUnknown.retryable


def test_a_problem_of_its_own_making() -> None:
    told = problem("start_failed", "it does not stay up")

    assert (told.title, told.status, told.retryable) == ("Start failed", 409, False)
