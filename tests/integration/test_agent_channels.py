"""An agent's connections to its replicas: open to all of them, whoever it has a stream with."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from agent.session_grpc import Dialler
from tests.integration.world import World

pytestmark = pytest.mark.etcd


async def test_a_connection_to_every_replica_is_held_and_made_again(world: World) -> None:
    came: Counter[int] = Counter()
    there = asyncio.Event()

    async def listen() -> tuple[asyncio.Server, int]:
        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            port = writer.get_extra_info("sockname")[1]
            came[port] += 1
            there.set()
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        return server, server.sockets[0].getsockname()[1]

    servers = [await listen() for _ in range(2)]
    ports = [port for _, port in servers]
    dialler = Dialler(world.cell.node_tls("n1"), random.Random(1))
    holding = asyncio.ensure_future(dialler.keep_open(f"127.0.0.1:{port}" for port in ports))
    try:
        async with asyncio.timeout(30):
            while min(came[port] for port in ports) < 2:
                there.clear()
                await there.wait()
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await dialler.close()
        for server, _ in servers:
            server.close()
