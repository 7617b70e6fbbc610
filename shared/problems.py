"""Problems as RFC 9457 tells them: how an error becomes one, and the titles of those that are none.

Every code that a client may meet, in an answer or in a record, is listed in ``docs/problems.md``.
"""

from __future__ import annotations

from shared.errors import FieldError, FieldErrors, NovacronError
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
