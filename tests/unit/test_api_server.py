"""The server on a real socket: TLS, limits of a request's head, keep-alive, a clean stop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controlplane.api import server as server_module
from controlplane.api.server import HEAD_BYTES_MAX, ApiServer, ApiServerSettings
from controlplane.pki import issue, key_pem, make_authority, new_key
from shared.errors import ConfigInvalid
from shared.tls import Identity, Role
from tests.unit.api_world import CELL, World

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(
    world: World, settings: ApiServerSettings | None = None
) -> AsyncIterator[ApiServer]:
    server = ApiServer(world.app(), settings or ApiServerSettings(host="127.0.0.1", port=0))
    running = asyncio.create_task(server.run())
    await server.started()
    try:
        yield server
    finally:
        server.stop()
        await running


@asynccontextmanager
async def connected(
    server: ApiServer, context: ssl.SSLContext | None = None
) -> AsyncIterator[Connection]:
    name = None if context is None else "localhost"
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, ssl=context, server_hostname=name
    )
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(connection: Connection, request: str) -> tuple[int, dict[str, str], bytes]:
    reader, writer = connection
    writer.write(request.encode())
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.splitlines()
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
        bodiless = request.startswith("HEAD") or " 304 " in status
        length = 0 if bodiless else int(headers["content-length"])
        return int(status.split()[1]), headers, await reader.readexactly(length)


def get(world: World, path: str, method: str = "GET", **headers: str) -> str:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {world.token}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines) + "\r\n\r\n"


async def test_an_answer_without_a_body_leaves_the_connection_in_order() -> None:
    world = World()
    world.join("n1")
    async with serving(world) as server, connected(server) as connection:
        _, headers, _ = await answer(connection, get(world, "/api/v1/nodes/n1"))
        known = {"If-None-Match": headers["etag"]}
        status, headers, _ = await answer(connection, get(world, "/api/v1/nodes/n1", **known))
        assert status == 304
        assert not {"content-length", "content-type", "transfer-encoding"} & set(headers)
        assert (await answer(connection, get(world, "/healthz")))[0] == 200


async def closed(connection: Connection) -> bool:
    """Wait until the server has closed the connection; nothing may have been answered."""
    try:
        async with asyncio.timeout(5):
            return await connection[0].read() == b""
    except ConnectionError:
        return True


@pytest.fixture
def world() -> World:
    return World()


async def test_keep_alive_goes_on_after_head_and_after_a_body_that_was_refused(
    world: World,
) -> None:
    async with serving(world) as server, connected(server) as connection:
        status, headers, _ = await answer(connection, get(world, "/api/v1/vms", "HEAD"))
        assert (status, int(headers["content-length"]) > 0) == (200, True)
        assert "server" not in headers
        body = "x" * 100_000
        refused = (
            f"POST /api/v1/vms HTTP/1.1\r\nHost: l\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        assert (await answer(connection, refused))[0] == 401
        assert (await answer(connection, get(world, "/api/v1/vms")))[0] == 200


async def test_tls_shows_the_replicas_certificate(world: World, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = make_authority(CELL, new_key(), now)
    key = new_key()
    (tmp_path / "crt").write_bytes(
        issue(authority, Identity(CELL, Role.REPLICA, "r1"), (), key.public_key(), now)
    )
    (tmp_path / "key").write_bytes(key_pem(key))
    settings = ApiServerSettings(
        host="127.0.0.1", port=0, certificate=tmp_path / "crt", key=tmp_path / "key"
    )
    context = ssl.create_default_context(cadata=authority.certificate_pem().decode())
    async with serving(world, settings) as server, connected(server, context) as connection:
        assert (await answer(connection, get(world, "/api/v1/vms")))[0] == 200
        old = ssl.create_default_context(cadata=authority.certificate_pem().decode())
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with connected(server, old) as second:
            assert (await answer(second, get(world, "/healthz")))[0] == 200
    missing = ApiServerSettings(
        host="127.0.0.1", port=0, certificate=tmp_path / "none", key=tmp_path / "none"
    )
    with pytest.raises(ConfigInvalid):
        ApiServer(world.app(), missing)


async def test_a_head_that_never_ends_is_cut_off(world: World) -> None:
    async with serving(world) as server, connected(server) as connection:
        connection[1].write(b"GET / HTTP/1.1\r\n")
        for _ in range(HEAD_BYTES_MAX // 1000 + 2):
            connection[1].write(b"a: " + b"b" * 1000 + b"\r\n")
            await asyncio.sleep(0)
        assert await closed(connection)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT"])
async def test_a_client_that_says_nothing_is_cut_off(
    world: World, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server_module, "HEAD_TIMEOUT_S", 0.02)
    async with serving(world) as server, connected(server) as connection:
        connection[1].write(sent)
        assert await closed(connection)


async def test_a_stop_ends_event_streams_and_takes_no_new_connection(world: World) -> None:
    async with serving(world) as server:
        port = server.port
        async with connected(server) as (reader, writer):
            writer.write(get(world, "/api/v1/events", Accept="text/event-stream").encode())
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            server.stop()
            async with asyncio.timeout(5):
                assert (await reader.read()).endswith(b"0\r\n\r\n")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_port_that_is_taken_is_an_error(world: World) -> None:
    async with serving(world) as server:
        other = ApiServer(world.app(), ApiServerSettings(host="127.0.0.1", port=server.port))
        with pytest.raises(OSError, match="cannot listen"):
            await other.run()
