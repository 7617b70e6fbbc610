"""The API's gate: an authenticated GET of one VM against a bare Starlette route.

Both run under the same server class, in one process, over TLS 1.3 with the same certificate; a
client in a process of its own asks over keep-alive connections, one request at a time on each. On
our side every production layer is on: access log to a file, metrics, authorization; 50,000 VMs are
in memory. Runs of 0.3 s alternate, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from controlplane.api.server import ApiServer, ApiServerSettings
from controlplane.api.stream import EventStreams
from controlplane.pki import issue, key_pem, make_authority, new_key
from shared.tls import Identity, Role
from tests.bench.bootstrap import lower_bound
from tests.bench.result import BenchResult, figure
from tests.running_vms import running_vm
from tests.unit.api_world import BORN, CELL, World

VMS = 50_000
NODES = 500
PAIRS = 40
RUN_S = 0.3
CONNECTIONS = 4
RATIO_MIN = 0.5
# The first pairs pay for caches and connections that later ones find warm.
WARM_UP_PAIRS = 3


class Pair(Struct, frozen=True):
    """Requests per second of two runs that followed each other."""

    bare: float
    api: float


def run() -> list[BenchResult]:
    """Measure, and hold the ratio against its gate."""
    return asyncio.run(_measure())


async def _measure() -> list[BenchResult]:
    with tempfile.TemporaryDirectory(prefix="novacron-bench-") as folder:
        directory = Path(folder)
        handler = logging.FileHandler(directory / "access.log")
        access = logging.getLogger("access")
        level, propagates = access.level, access.propagate
        access.addHandler(handler)
        access.setLevel(logging.INFO)
        access.propagate = False
        try:
            pairs = await _pairs(directory)
        finally:
            access.removeHandler(handler)
            access.setLevel(level)
            access.propagate = propagates
            handler.close()
    return _results(pairs)


async def _pairs(directory: Path) -> list[Pair]:
    world = _cell()
    path = f"/api/v1/vms/{sorted(world.state.vms)[VMS // 2]}"
    _write_certificate(directory)
    async with (
        _serving(world.app(), directory) as api_port,
        _serving(_bare_app(world), directory) as bare_port,
        _client() as client,
    ):
        api = {"port": api_port, "path": path}
        bare = {"port": bare_port, "path": "/ok"}
        common = {"token": world.token, "ca": str(directory / "ca.crt")}
        pairs = []
        for number in range(WARM_UP_PAIRS + PAIRS):
            # The order changes from pair to pair, so that neither side always comes second.
            sides = [bare, api] if number % 2 else [api, bare]
            rates = {side["port"]: await _rate(client, {**side, **common}) for side in sides}
            pairs.append(Pair(bare=rates[bare_port], api=rates[api_port]))
    return pairs[WARM_UP_PAIRS:]


def _results(pairs: list[Pair]) -> list[BenchResult]:
    ratios = [pair.api / pair.bare for pair in pairs]
    low = lower_bound(ratios)
    gate = f"at least {RATIO_MIN} (95 % lower bound of the median of {len(pairs)} pairs)"
    median = statistics.median
    return [
        figure("api.bare_starlette", median(p.bare for p in pairs), "requests/s"),
        figure("api.get_vm", median(p.api for p in pairs), "requests/s"),
        figure("api.ratio_median", median(ratios), "ratio"),
        BenchResult(
            name="api.ratio", value=round(low, 3), unit="ratio", gate=gate, holds=low >= RATIO_MIN
        ),
    ]


def _bare_app(world: World) -> Starlette:
    async def ok(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/ok", ok)])
    app.state.streams = EventStreams(world.context)  # what the server closes at its end
    return app


@asynccontextmanager
async def _serving(app: Starlette, directory: Path) -> AsyncIterator[int]:
    settings = ApiServerSettings(
        host="127.0.0.1",
        port=0,
        certificate=directory / "server.crt",
        key=directory / "server.key",
    )
    server = ApiServer(app, settings)
    running = asyncio.create_task(server.run())
    await server.started()
    try:
        yield server.port
    finally:
        server.stop()
        await running


@asynccontextmanager
async def _client() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.http_load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None, "it was made with a pipe"
        process.stdin.close()
        await process.wait()


async def _rate(client: asyncio.subprocess.Process, order: dict[str, Any]) -> float:
    assert client.stdin is not None, "it was made with a pipe"
    assert client.stdout is not None, "it was made with a pipe"
    whole = {**order, "seconds": RUN_S, "connections": CONNECTIONS}
    client.stdin.write(json.dumps(whole).encode() + b"\n")
    answer = json.loads(await client.stdout.readline())
    return float(answer["answered"] / answer["seconds"])


def _write_certificate(directory: Path) -> None:
    now = datetime.now(UTC)
    authority = make_authority(CELL, new_key(), now)
    key = new_key()
    certificate = issue(authority, Identity(CELL, Role.REPLICA, "r1"), (), key.public_key(), now)
    (directory / "ca.crt").write_bytes(authority.certificate_pem())
    (directory / "server.crt").write_bytes(certificate)
    (directory / "server.key").write_bytes(key_pem(key))


def _cell() -> World:
    """Return a cell of 500 nodes with 50,000 running VMs."""
    world = World()
    nodes = [world.join(f"n{number}") for number in range(NODES)]
    for number in range(VMS):
        vm = running_vm(world.ids.new("vm"), number, nodes[number % NODES], "boot", BORN)
        world.state.put(vm, number + 1)
    world.state.advanced(VMS)
    return world
