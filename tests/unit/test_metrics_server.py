"""The agent's /metrics over a real loopback socket: answers, bounds, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent import metrics_server
from agent.metrics_server import CONNECTIONS_MAX, REQUEST_BYTES_MAX, MetricsServer


class Served:
    def __init__(self, server: MetricsServer, port: int) -> None:
        self.server, self.port = server, port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> tuple[str, dict[str, str], bytes]:
        """Return status line, headers and body of the answer to one request."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        return status, dict(line.split(": ", 1) for line in lines), body


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    server = MetricsServer(lambda: b"up 1\n", "text/plain; version=0.0.4")
    port = await server.start("127.0.0.1", 0)
    yield Served(server, port)
    await server.close()


async def test_it_answers_a_scrape(served: Served) -> None:
    status, headers, body = await served.ask(b"GET /metrics?x=1 HTTP/1.1\r\nHost: n1\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert headers == {
        "Content-Type": "text/plain; version=0.0.4",
        "Content-Length": "5",
        "Connection": "close",
    }
    assert body == b"up 1\n"


async def test_head_has_the_length_and_no_body(served: Served) -> None:
    status, headers, body = await served.ask(b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert (status, headers["Content-Length"], body) == ("HTTP/1.1 200 OK", "5", b"")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics SMTP/1.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * REQUEST_BYTES_MAX + b"\r\n\r\n", 431),
    ],
)
async def test_anything_else_is_refused(served: Served, request_bytes: bytes, status: int) -> None:
    line, headers, _ = await served.ask(request_bytes)
    assert line.split()[1] == str(status)
    assert headers["Connection"] == "close"
    assert ("Allow" in headers) is (status == 405)


async def test_connections_are_bounded_and_freed(served: Served) -> None:
    scrape = b"GET /metrics HTTP/1.1\r\n\r\n"
    silent = [await served.connect() for _ in range(CONNECTIONS_MAX)]
    line, _, _ = await served.ask(scrape)
    assert line.split()[1] == "503"
    for reader, writer in silent:
        writer.write(scrape)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
    line, _, _ = await served.ask(scrape)
    assert line.split()[1] == "200"


async def test_who_says_nothing_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_TIMEOUT_S", 0.01)
    reader, writer = await served.connect()
    writer.write(b"GET /metr")
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_who_leaves_early_harms_nobody(served: Served) -> None:
    _, writer = await served.connect()
    writer.write(b"GET /metr")
    writer.close()
    await writer.wait_closed()
    line, _, _ = await served.ask(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert line.split()[1] == "200"


async def test_closing_ends_open_connections(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET")
    await asyncio.sleep(0.01)
    await served.server.close()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    with pytest.raises(OSError, match="Connect"):
        await served.connect()


async def test_a_failing_figure_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bytes:
        raise KeyError("vm-1")

    server = MetricsServer(broken, "text/plain")
    served = Served(server, await server.start("127.0.0.1", 0))
    line, _, _ = await served.ask(b"GET /metrics HTTP/1.1\r\n\r\n")
    await server.close()
    assert line.split()[1] == "500"
    assert "vm-1" in caplog.text


async def test_a_server_that_never_started_closes() -> None:
    await MetricsServer(bytes, "text/plain").close()
