"""Problems as RFC 9457 tells them: how an error becomes one, and how one becomes an error again.

Every code that a client may meet, in an answer or in a record, is listed in ``docs/problems.md``.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.errors import FieldError, FieldErrors, NovacronError, Unavailable
from shared.model import Problem

TYPE_PREFIX = "urn:novacron:problem:"


def problem(
    code: str,
    detail: str,
    errors: tuple[FieldError, ...] = (),
    *,
    status: int = 409,
    retryable: bool = False,
) -> Problem:
    """Return a problem with a title made of its code."""
    return Problem(
        type=TYPE_PREFIX + code,
        title=code.replace("_", " ").capitalize(),
        status=status,
        code=code,
        detail=detail,
        retryable=retryable,
        errors=errors,
    )


def problem_of(error: NovacronError, request_id: str = "") -> Problem:
    """Return an error of our tree as a problem, with all its field errors."""
    return Problem(
        type=TYPE_PREFIX + error.code,
        title=error.code.replace("_", " ").capitalize(),
        status=error.http_status,
        code=error.code,
        detail=error.summary if isinstance(error, FieldErrors) else str(error),
        request_id=request_id,
        retryable=error.retryable,
        errors=error.errors if isinstance(error, FieldErrors) else (),
    )


def error_of(told: Problem) -> NovacronError:
    """Return the error that a problem was made of, for whoever passes on what another process said.

    A code that this release does not know becomes one with the same meaning for a client:
    Unavailable when it may be tried again.
    """
    kind = _BY_CODE.get(told.code) or (Unavailable if told.retryable else NovacronError)
    # Some make their text of other parts; a problem has the text, so nothing is made here.
    error = kind.__new__(kind)
    if isinstance(error, FieldErrors):
        errors = told.errors or (FieldError("", told.code, told.detail),)
        FieldErrors.__init__(error, told.detail, errors)
    else:
        Exception.__init__(error, told.detail)
    return error


def _kinds(kind: type[NovacronError]) -> Iterator[type[NovacronError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


# A class that takes its parent's code over comes later, and is not what the code stands for.
_BY_CODE: dict[str, type[NovacronError]] = {}
for _kind in _kinds(NovacronError):
    _BY_CODE.setdefault(_kind.code, _kind)
