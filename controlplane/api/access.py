"""The outermost layer: request id, errors into problems, headers, metrics, the access log.

Plain ASGI. Whatever happens inside, exactly one line is logged and one observation made for each
request, also for one that was refused, broke, or whose client went away.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from datetime import datetime

from msgspec import Struct
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.api.answer import EXCHANGE, Exchange, send_answer
from controlplane.api.problems import answer_to_error
from controlplane.services.context import Context
from controlplane.services.revisions import cluster_revision
from controlplane.telemetry.exporter import Metrics
from shared.codec import to_json

access_log = logging.getLogger("access")
log = logging.getLogger(__name__)

# The client went away before there was an answer; no status of HTTP's says so.
CLIENT_GONE = 499

# Nothing here is for a browser to render, frame, cache or guess the type of.
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"strict-transport-security", b"max-age=31536000"),
)


class AccessLine(Struct, frozen=True, kw_only=True):
    """One request in the access log; ``route`` is the path's template, ``by`` a principal."""

    at: datetime
    request_id: str
    client: str
    by: str
    method: str
    path: str
    route: str
    status: int
    bytes: int
    duration_ms: float


class AccessLayer:
    """Wraps the application. Raises nothing but what happens after an answer has begun."""

    def __init__(self, app: ASGIApp, *, context: Context, metrics: Metrics, id_prefix: str) -> None:
        self._app = app
        self._context = context
        self._metrics = metrics
        self._ids = (f"{id_prefix}-{number}" for number in itertools.count(1))
        self._seen = (-1, -1)
        self._revision_header = (b"x-novacron-revision", b"")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(next(self._ids))
        scope[EXCHANGE] = exchange
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await self._answered(scope, receive, send, exchange)
        finally:
            self._tell(scope, exchange, loop.time() - started)

    async def _answered(
        self, scope: Scope, receive: Receive, send: Send, exchange: Exchange
    ) -> None:
        async def send_dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = self._dressed(message["headers"], exchange)
            else:
                exchange.sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_dressed)
        except Exception as error:
            if exchange.status:
                log.error("request %s broke in its answer", exchange.request_id, exc_info=error)
                raise
            answer = answer_to_error(error, exchange.request_id)
            await send_answer(send_dressed, answer, with_body=scope["method"] != "HEAD")

    def _dressed(
        self, headers: list[tuple[bytes, bytes]], exchange: Exchange
    ) -> list[tuple[bytes, bytes]]:
        state = self._context.state
        if (state.revision, state.last_seq) != self._seen:
            self._seen = (state.revision, state.last_seq)
            self._revision_header = (b"x-novacron-revision", cluster_revision(state).encode())
        return [
            *headers,
            *SECURITY_HEADERS,
            (b"x-request-id", exchange.request_id.encode()),
            self._revision_header,
        ]

    def _tell(self, scope: Scope, exchange: Exchange, duration_s: float) -> None:
        status = exchange.status or CLIENT_GONE
        method = scope["method"]
        self._metrics.http_request(exchange.route, method, status, duration_s)
        if not access_log.isEnabledFor(logging.INFO):
            return
        line = AccessLine(
            at=self._context.clock.now(),
            request_id=exchange.request_id,
            client=_client(scope),
            by=exchange.principal,
            method=method,
            path=scope["path"],
            route=exchange.route,
            status=status,
            bytes=exchange.sent_bytes,
            duration_ms=round(duration_s * 1000, 3),
        )
        # Every line comes from here: finding the caller's place again would double the cost.
        text = to_json(line).decode()
        access_log.handle(
            access_log.makeRecord(access_log.name, logging.INFO, __file__, 0, text, (), None)
        )


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""
