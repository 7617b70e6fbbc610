"""Errors as answers: RFC 9457 problems.

Every error leaves here as ``application/problem+json`` with the request's id. One that is not of
our tree is our fault: it is logged, once, here, and its text stays inside.
"""

from __future__ import annotations

import logging
from http import HTTPStatus

from msgspec.structs import replace

from controlplane.api.answer import Answer
from shared.codec import to_json
from shared.errors import MethodNotAllowed, NovacronError, StoreFull, Unauthenticated
from shared.model import Problem
from shared.problems import problem, problem_of

log = logging.getLogger(__name__)

PROBLEM_JSON = b"application/problem+json"
# An election takes about this long.
RETRY_AFTER_S = 2


def answer_to_error(error: Exception, request_id: str) -> Answer:
    """Return the answer that tells a client of ``error``."""
    told = _problem(error, request_id)
    headers: list[tuple[bytes, bytes]] = []
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b'Bearer realm="novacron"'))
    if isinstance(error, WrongMethod):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if told.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    return Answer(told.status, PROBLEM_JSON, to_json(told), tuple(headers))


class WrongMethod(MethodNotAllowed):
    """The path exists, and takes ``allowed``."""

    def __init__(self, method: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{method} is not possible here; {', '.join(allowed)} is")
        self.allowed = allowed


def _problem(error: Exception, request_id: str) -> Problem:
    if isinstance(error, NovacronError):
        told = problem_of(error, request_id)
        if told.status < HTTPStatus.INTERNAL_SERVER_ERROR or told.retryable:
            return told
        if isinstance(error, StoreFull):
            return told  # told in the log once, by who looks after the room
        log.error("request %s failed", request_id, exc_info=error)
        return told
    log.error("request %s broke", request_id, exc_info=error)
    hidden = problem("internal", "something broke here; the replica's log has it", status=500)
    return replace(hidden, request_id=request_id)
