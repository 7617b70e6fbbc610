"""Answers ``GET /metrics`` on the agent's loopback port, and nothing else.

A Prometheus scrape is one small request without a body, so a whole HTTP server would be out of
proportion. Bounded in every direction: size and time of a request, number of connections. One
answer per connection. It knows no metrics; a callable writes them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus

log = logging.getLogger(__name__)

# A scrape's request line and headers; Prometheus sends some 300 bytes.
REQUEST_BYTES_MAX = 4096

# On loopback a request arrives at once; this is for those who connect and say nothing.
REQUEST_TIMEOUT_S = 5.0

# One scraper, a second one being set up, and a person with curl.
CONNECTIONS_MAX = 8

PLAIN = "text/plain; charset=utf-8"

Render = Callable[[], bytes]


class MetricsServer:
    """Listens from ``start`` to ``close``."""

    def __init__(self, render: Render, content_type: str) -> None:
        self._render = render
        self._content_type = content_type
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port (for ``port`` 0); raises OSError when it is taken."""
        assert self._server is None, "a server is started once"
        self._server = await asyncio.start_server(
            self._connected, host=host, port=port, limit=REQUEST_BYTES_MAX
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening and end every connection; does nothing when it never listened."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.write(_answer(HTTPStatus.SERVICE_UNAVAILABLE))
            writer.close()
            return
        task = asyncio.create_task(self._converse(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(await self._respond(reader))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass  # whoever asked is slow or gone, and waits for nothing
        finally:
            writer.close()

    async def _respond(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _answer(HTTPStatus.BAD_REQUEST)
        method, path = words[0], words[1].split(b"?", 1)[0]
        if path != b"/metrics":
            return _answer(HTTPStatus.NOT_FOUND)
        if method not in (b"GET", b"HEAD"):
            return _answer(HTTPStatus.METHOD_NOT_ALLOWED, allow=True)
        try:
            body = self._render()
        except Exception:  # a figure that cannot be read must not end the agent
            log.exception("the metrics could not be written")
            return _answer(HTTPStatus.INTERNAL_SERVER_ERROR)
        answer = _head(HTTPStatus.OK, self._content_type, len(body))
        return answer if method == b"HEAD" else answer + body


def _answer(status: HTTPStatus, allow: bool = False) -> bytes:
    body = f"{status.phrase}\n".encode()
    return _head(status, PLAIN, len(body), allow) + body


def _head(status: HTTPStatus, content_type: str, length: int, allow: bool = False) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
        "Connection: close",
    ]
    if allow:
        lines.append("Allow: GET, HEAD")
    return "\r\n".join([*lines, "", ""]).encode()
