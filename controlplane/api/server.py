"""The HTTP server: uvicorn in the running event loop, with TLS and explicit limits.

Signals are not its business: whoever runs it asks it to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from msgspec import Struct
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from controlplane.api.endpoint import ABORT
from shared.errors import ConfigInvalid, FieldError
from shared.units import KIB

# Connections at once; past that the answer is 503. A cell's CLI, console and monitoring need tens.
CONNECTIONS_MAX = 4096
BACKLOG = 1024
KEEP_ALIVE_S = 75
# From the first byte (or none) to the end of the headers.
HEAD_TIMEOUT_S = 15.0
HEAD_BYTES_MAX = 32 * KIB
# What is under way at a stop may go on for so long: longer than a write waits for a leader (6 s),
# and by that longer than any request but a long poll, which is ended.
STOP_S = 8


class ApiServerSettings(Struct, frozen=True, kw_only=True):
    """Where to listen, and the certificate to show; without one it is plain HTTP (for tests)."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


class ApiServer:
    """Serves one application; ``run`` returns after ``stop`` when all is closed."""

    def __init__(self, app: Starlette, settings: ApiServerSettings) -> None:
        self._app = app
        self._server = _Server(_config(app, settings))

    @property
    def port(self) -> int:
        """Return the port it listens on; only once it has started."""
        port: int = self._server.servers[0].sockets[0].getsockname()[1]
        return port

    async def started(self) -> None:
        """Return once it listens."""
        await self._server.listening.wait()

    async def run(self) -> None:
        """Serve until stopped, or until cancelled: then requests under way are finished first.

        Raises OSError when it cannot listen.
        """
        try:
            await self._server.serve()
        except SystemExit as error:  # how uvicorn says that it could not listen
            raise OSError("the API cannot listen; the log says why") from error
        except asyncio.CancelledError:
            self.stop()
            if self._server.started:
                await self._server.shutdown()
            raise

    def stop(self) -> None:
        """Take no new connection, end the event streams, let the rest finish for a while."""
        self._app.state.streams.close()
        self._server.should_exit = True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """Adds what uvicorn lacks: limits for the time and size of a request's head, and an abort."""

    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End at the server's stop; an idle client over TLS would not say goodbye for a while."""
        idle = self.cycle is None or self.cycle.response_complete
        super().shutdown()
        if idle:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        began_in_head = self._in_head
        super().data_received(data)
        if not (began_in_head and self._in_head):
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES_MAX:
            self._give_up()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        self._in_head = True
        self._head_bytes = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _config(app: Starlette, settings: ApiServerSettings) -> uvicorn.Config:
    context = _tls(settings)
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_Protocol,
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        backlog=BACKLOG,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_S,
        ssl_context_factory=None if context is None else (lambda config, default: context),
    )


def _tls(settings: ApiServerSettings) -> ssl.SSLContext | None:
    """Return TLS 1.2 or newer with the replica's certificate. Raises ConfigInvalid."""
    if settings.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as error:
        fault = FieldError("/tls/certificate", "unreadable", str(error))
        raise ConfigInvalid("of the API's TLS", (fault,)) from error
    return context
