"""Puts the API together: an ASGI application over the use cases."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route as StarletteRoute
from starlette.types import Receive, Scope, Send

from controlplane.api.access import AccessLayer
from controlplane.api.answer import EXCHANGE, JSON, Answer, Exchange, send_answer
from controlplane.api.endpoint import Endpoint
from controlplane.api.openapi import build_document
from controlplane.api.problems import WrongMethod
from controlplane.api.routes import BASE, ROUTES, Route
from controlplane.api.stream import EventStreams
from controlplane.services.context import Context
from controlplane.telemetry.exporter import Metrics
from shared.codec import to_json
from shared.errors import NotFound

DOCUMENT_PATHS = ("/openapi.json", f"{BASE}/openapi.json")
_ID_PREFIX_BYTES = 5


def build_app(context: Context, metrics: Metrics) -> Starlette:
    """Return the application; ``app.state.streams.close()`` ends the event streams."""
    streams = EventStreams(context)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        streams.close()

    document = _Document(to_json(build_document(context.version)))
    routes = [
        StarletteRoute(path, endpoint=Endpoint(path, group, context, metrics, streams))
        for path, group in _by_path().items()
    ]
    routes += [StarletteRoute(path, endpoint=document) for path in DOCUMENT_PATHS]
    # Tells the requests of this process from those of any other, without asking anyone.
    prefix = f"req-{secrets.token_hex(_ID_PREFIX_BYTES)}"
    layer = Middleware(AccessLayer, context=context, metrics=metrics, id_prefix=prefix)
    app = Starlette(routes=routes, middleware=[layer], lifespan=lifespan)
    app.router.redirect_slashes = False
    app.router.default = _not_found
    app.state.streams = streams
    return app


class _Document:
    """Serves the OpenAPI document, to everyone."""

    def __init__(self, document: bytes) -> None:
        self._answer = Answer(200, JSON, document)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[EXCHANGE]
        exchange.route = DOCUMENT_PATHS[0]
        method = scope["method"]
        if method not in ("GET", "HEAD"):
            raise WrongMethod(method, ("GET", "HEAD"))
        await send_answer(send, self._answer, with_body=method == "GET")


def _by_path() -> dict[str, tuple[Route, ...]]:
    paths: dict[str, tuple[Route, ...]] = {}
    for route in ROUTES:
        paths[route.path] = (*paths.get(route.path, ()), route)
    return paths


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound("there is nothing under this path; /openapi.json lists what there is")
