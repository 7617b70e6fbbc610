"""One path of the API as an ASGI application: from a raw request to a handler and its answer.

The order of the checks is part of the interface: method (405), token (401), permission (403), then
what was sent (400, 413, 422), then what it is about (404, 409).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from controlplane.api.answer import (
    EXCHANGE,
    Answer,
    Exchange,
    Headers,
    Streamed,
    json_answer,
    send_answer,
    send_streamed,
)
from controlplane.api.auth import authenticate
from controlplane.api.body import Reader, read_body
from controlplane.api.problems import WrongMethod
from controlplane.api.routes import BASE, Call, Route
from controlplane.api.stream import EVENT_STREAM, SEND_TIMEOUT_S, EventStreams
from controlplane.api.terms import check_patch_type, preferred_wait_s, request_key
from controlplane.commands.terms import Expected, RequestKey
from controlplane.services.context import Context, Principal
from controlplane.services.context import Scope as Tenancy
from controlplane.services.etags import etag_of, expectation, is_known
from controlplane.services.operations import await_end
from controlplane.services.rehearsal import Rehearsal
from controlplane.services.requests import DryRunQuery, EventQuery, WaitQuery
from controlplane.services.revisions import epoch_of, parse_cluster_revision
from controlplane.services.scope import authorize
from controlplane.services.views import OperationView
from controlplane.services.writes import carry_out, tied
from controlplane.telemetry.exporter import Metrics
from shared.errors import MalformedRequest, Overloaded, Unavailable
from shared.states import OPERATION_ENDS

T = TypeVar("T")

# How long a read waits for a replica to see a write that the client has seen elsewhere.
CATCH_UP_S = 2.0
# Set by the server: cuts the connection without waiting for what is not read.
ABORT = "novacron.abort"
# Backups, and scrapes, that one replica sends at a time: two monitors of one cell, and a look.
STREAMS_MAX = 4
REPLAYED = (b"idempotency-replayed", b"true")


class _Sent(Struct):
    """The headers that mean something here."""

    authorization: bytes | None = None
    accept: bytes = b""
    content_length: bytes | None = None
    min_revision: bytes | None = None
    last_event_id: bytes | None = None
    content_type: bytes | None = None
    idempotency_key: bytes | None = None
    if_match: bytes | None = None
    if_none_match: bytes | None = None
    prefer: bytes | None = None


_HEADERS = {
    b"authorization": "authorization",
    b"accept": "accept",
    b"content-length": "content_length",
    b"x-novacron-min-revision": "min_revision",
    b"last-event-id": "last_event_id",
    b"content-type": "content_type",
    b"idempotency-key": "idempotency_key",
    b"if-match": "if_match",
    b"if-none-match": "if_none_match",
    b"prefer": "prefer",
}
# Those that hold a list, which a client or a proxy may send in several lines.
_LISTS = frozenset({"accept", "if_match", "if_none_match", "prefer"})


class _Prepared(Struct, frozen=True):
    """A route with its readers."""

    route: Route
    query: Reader[Struct]
    body: Reader[Struct]


class _Request(Struct, frozen=True):
    """One request, up to its body."""

    prepared: _Prepared
    principal: Principal
    scope: Scope
    query: Struct
    sent: _Sent

    @property
    def route(self) -> Route:
        return self.prepared.route

    @property
    def is_dry_run(self) -> bool:
        return isinstance(self.query, DryRunQuery) and self.query.dry_run


class Endpoint:
    """All methods of one path."""

    def __init__(
        self,
        path: str,
        routes: tuple[Route, ...],
        context: Context,
        metrics: Metrics,
        streams: EventStreams,
    ) -> None:
        self._path = path
        self._context = context
        self._metrics = metrics
        self._streams = streams
        self._streaming = 0
        self._methods = {
            route.method: _Prepared(route, Reader(route.query), Reader(route.body, route.immutable))
            for route in routes
        }
        if "GET" in self._methods:
            self._methods["HEAD"] = self._methods["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[EXCHANGE]
        exchange.route = self._path
        method: str = scope["method"]
        prepared = self._methods.get(method)
        if prepared is None:
            raise WrongMethod(method, tuple(self._methods))
        route = prepared.route
        sent = _read_headers(scope)
        principal = self._principal(route, sent, exchange)
        query = prepared.query.query(scope["query_string"])
        if sent.min_revision is not None:
            await self._catch_up(sent.min_revision)
        if route.follows and method == "GET" and EVENT_STREAM.encode() in sent.accept:
            assert isinstance(query, EventQuery), "only lists of events are followed"
            if sent.last_event_id:
                query = replace(query, since=sent.last_event_id.decode("latin-1"))
            await self._streams.follow(principal, query, receive, send, scope.get(ABORT))
            return
        request = _Request(prepared, principal, scope, query, sent)
        if route.streams:
            await self._stream(request, receive, send)
            return
        if method in ("GET", "HEAD"):
            answer = await self._read(request)
        else:
            raw = await read_body(receive, sent.content_length)
            answer = await self._write(request, raw)
        await send_answer(send, answer, with_body=method != "HEAD")

    async def _stream(self, request: _Request, receive: Receive, send: Send) -> None:
        """Send an answer as it is made; few at a time, since each reads all there is."""
        if self._streaming >= STREAMS_MAX:
            raise Overloaded(f"{STREAMS_MAX} of these are being sent already")
        self._streaming += 1
        scope = request.scope
        try:
            body = request.prepared.body.body(b"")
            answer = await request.route.handler(self._call(self._context, request, body))
            assert isinstance(answer, Streamed), "the route says so"
            with_body = scope["method"] != "HEAD"
            await send_streamed(
                send, receive, answer, with_body=with_body, piece_limit_s=SEND_TIMEOUT_S
            )
        except TimeoutError:
            if (abort := scope.get(ABORT)) is not None:
                abort()
        finally:
            self._streaming -= 1

    async def _read(self, request: _Request) -> Answer:
        body = request.prepared.body.body(b"")
        handling = self._tagged(request.route.handler(self._call(self._context, request, body)))
        if isinstance(request.query, WaitQuery):
            handling = self._streams.unless_closing(handling)
        result, etag = await handling
        known = request.sent.if_none_match
        if etag is not None and known is not None and is_known(etag, known.decode("latin-1")):
            return Answer(304, b"", b"", ((b"etag", etag.encode()),))
        return _answer(request.route, result, etag)

    async def _write(self, request: _Request, raw: bytes) -> Answer:
        context, principal = self._context, request.principal
        if request.route.method == "PATCH":
            check_patch_type(request.sent.content_type)
        body = request.prepared.body.body(raw)
        key = self._key(request, raw)
        if request.is_dry_run:
            rehearsal = Rehearsal(context.state, context.clock, self._expected(request))
            call = self._call(tied(context, rehearsal), request, body)
            return json_answer(200, await request.route.handler(call))
        result, replayed = await carry_out(
            context,
            principal,
            key,
            lambda: self._expected(request),
            lambda tied_to: request.route.handler(self._call(tied_to, request, body)),
        )
        more: Headers = (REPLAYED,) if replayed else ()
        etag = etag_of(context.state, result)
        wait_s = preferred_wait_s(request.sent.prefer)
        if wait_s is not None and isinstance(result, OperationView):
            result, etag = await self._awaited(principal, result, etag, wait_s)
            more = (*more, (b"preference-applied", b"wait=%d" % wait_s))
        answer = _answer(request.route, result, etag)
        ended = isinstance(result, OperationView) and result.state in OPERATION_ENDS
        status = 200 if wait_s is not None and ended else answer.status
        return replace(answer, status=status, headers=(*answer.headers, *more))

    async def _awaited(
        self, principal: Principal, operation: OperationView, etag: str | None, wait_s: int
    ) -> tuple[OperationView, str | None]:
        """Return an operation at its end, or after a while; it is accepted, whatever comes."""
        waiting = await_end(self._context, principal, operation, wait_s)
        try:
            return await self._streams.unless_closing(self._tagged(waiting))
        except Unavailable:
            return operation, etag

    async def _tagged(self, work: Awaitable[T]) -> tuple[T, str | None]:
        """Return what ``work`` returns and its ETag, both of one moment: no commit in between."""
        result = await work
        return result, etag_of(self._context.state, result)

    def _call(self, context: Context, request: _Request, body: Struct) -> Call:
        path = request.scope.get("path_params", {})
        return Call(context, self._metrics, request.principal, path, request.query, body)

    def _key(self, request: _Request, raw: bytes) -> RequestKey | None:
        if not request.route.changes:
            return None
        target = (request.scope["path"], request.scope["query_string"])
        header = request.sent.idempotency_key
        return request_key(header, request.principal, request.route.method, target, raw)

    def _expected(self, request: _Request) -> Expected | None:
        if not request.route.changes or request.sent.if_match is None:
            return None
        path = request.scope.get("path_params", {})
        if_match = request.sent.if_match.decode("latin-1")
        return expectation(self._context, request.principal, path, if_match)

    def _principal(self, route: Route, sent: _Sent, exchange: Exchange) -> Principal:
        if route.permission is None:
            return Principal("anonymous", frozenset(), Tenancy(), exchange.request_id)
        context = self._context
        principal = authenticate(
            context.state, context.clock, sent.authorization, exchange.request_id
        )
        exchange.principal = principal.name
        authorize(principal, route.permission)
        return principal

    async def _catch_up(self, wanted: bytes) -> None:
        """Wait until this replica has seen what the client has.

        Raises MalformedRequest, Unavailable. A revision of before a restore asks for nothing.
        """
        revision = parse_cluster_revision(wanted.decode("latin-1"))
        if revision is None:
            raise MalformedRequest("X-Novacron-Min-Revision is not a revision of this API")
        state = self._context.state
        try:
            async with asyncio.timeout(CATCH_UP_S):
                while revision.epoch >= epoch_of(state) and revision.revision > state.revision:
                    await state.changes.wait()
        except TimeoutError:
            raise Unavailable("this replica has not seen the revision asked for yet") from None


def _read_headers(scope: Scope) -> _Sent:
    sent = _Sent()
    for name, value in scope["headers"]:
        field = _HEADERS.get(name)
        if field is None:
            continue
        before = getattr(sent, field) if field in _LISTS else None
        setattr(sent, field, b"%s, %s" % (before, value) if before else value)
    return sent


def _answer(route: Route, result: object, etag: str | None) -> Answer:
    if isinstance(result, Answer):
        return result
    headers: Headers = () if etag is None else ((b"etag", etag.encode()),)
    if route.status == 202 and isinstance(result, OperationView):
        headers = (*headers, (b"location", f"{BASE}/operations/{result.id}".encode()))
    return json_answer(route.status, result, headers)
