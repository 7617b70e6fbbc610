"""The simulated network: streams keep their order or break; cuts hold back, and heal."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from shared.errors import Disconnected
from shared.model import Term
from shared.protocol import SESSION_METHOD, Heartbeat, HeartbeatSeen
from tests.sim.cluster import METHODS
from tests.sim.network import KEEPALIVE_S, WINDOW_MESSAGES, Network, Stream
from tests.sim.process import Process, adopt_by_context
from tests.sim.trace import Trace
from tests.sim.virtual_loop import run_virtual

ADDRESS = "server:1"


class World:
    """A client's and a server's host, one stream between them."""

    def __init__(self, seed: int = 1) -> None:
        self.network = Network(random.Random(seed), Trace(), METHODS)
        self.client = Process("client", "client.1")
        self.server = Process("server", "server.1")
        self.accepted: asyncio.Queue[Stream] = asyncio.Queue()
        self.network.listen(self.server, ADDRESS, self._serve)

    async def connect(self) -> tuple[Stream, Stream]:
        stream = await self.client.spawn(self.dial(), "dial")
        return stream, await self.accepted.get()

    async def dial(self) -> Stream:
        return await self.network.dial(ADDRESS, SESSION_METHOD)

    async def _serve(self, method: str, stream: Stream, host: str) -> None:
        assert (method, host) == (SESSION_METHOD, "client")
        self.accepted.put_nowait(stream)
        await asyncio.get_running_loop().create_future()


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(World())

    run_virtual(main(), adopt_by_context)


async def numbers(stream: Stream, count: int) -> list[int]:
    return [(await stream.receive()).number for _ in range(count)]


def test_messages_arrive_in_order_as_new_objects() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        sent = [Heartbeat(number=number) for number in range(50)]
        for message in sent:
            await client.send(message)
        received = [await server.receive() for _ in sent]
        assert received == sent
        assert all(one is not other for one, other in zip(received, sent, strict=True))

    run(test)


def test_both_directions_carry() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        await server.send(HeartbeatSeen(term=Term(1, 2), number=3))
        assert await client.receive() == HeartbeatSeen(term=Term(1, 2), number=3)

    run(test)


def test_a_cut_holds_back_one_direction_until_it_heals() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        world.network.cut("client", "server")
        await client.send(Heartbeat(number=1))
        await server.send(HeartbeatSeen(term=Term(1, 2), number=3))
        assert (await client.receive()).number == 3
        waiting = asyncio.ensure_future(server.receive())
        await asyncio.sleep(KEEPALIVE_S - 1)
        assert not waiting.done()
        world.network.heal("client", "server")
        assert (await waiting).number == 1

    run(test)


def test_keepalive_breaks_what_stays_cut() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        world.network.cut("client", "server")
        await client.send(Heartbeat(number=1))
        for stream in (client, server):
            with pytest.raises(Disconnected):
                await stream.receive()

    run(test)


def test_breaking_tells_both_ends() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        assert world.network.break_streams("server", "client") == 1
        for stream in (client, server):
            with pytest.raises(Disconnected):
                await stream.receive()
            with pytest.raises(Disconnected):
                await stream.send(Heartbeat(number=1))

    run(test)


def test_what_was_sent_before_the_end_arrives_before_it() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        await client.send(Heartbeat(number=1))
        await client.close()
        assert await numbers(server, 1) == [1]
        with pytest.raises(Disconnected):
            await server.receive()

    run(test)


def test_a_killed_process_sends_no_more_and_its_peer_learns_of_it() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        world.client.kill()
        with pytest.raises(asyncio.CancelledError):
            await client.send(Heartbeat(number=1))
        with pytest.raises(Disconnected):
            await server.receive()

    run(test)


def test_without_power_the_peer_learns_it_from_keepalive_only() -> None:
    async def test(world: World) -> None:
        _, server = await world.connect()
        world.client.kill(power_loss=True)
        waiting = asyncio.ensure_future(server.receive())
        await asyncio.sleep(KEEPALIVE_S - 1)
        assert not waiting.done()
        with pytest.raises(Disconnected):
            await waiting

    run(test)


def test_a_sender_waits_for_a_slow_reader() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()

        async def send_all() -> None:
            for number in range(WINDOW_MESSAGES + 1):
                await client.send(Heartbeat(number=number))

        sending = asyncio.ensure_future(send_all())
        await asyncio.sleep(10)
        assert not sending.done()
        assert await numbers(server, WINDOW_MESSAGES + 1) == list(range(WINDOW_MESSAGES + 1))
        await sending

    run(test)


def test_nobody_listens_at_a_dead_process() -> None:
    async def test(world: World) -> None:
        world.server.kill()
        dialling = world.client.spawn(world.dial(), "dial")
        with pytest.raises(Disconnected):
            await dialling

    run(test)


def test_dialling_across_a_cut_gives_up() -> None:
    async def test(world: World) -> None:
        world.network.cut("server", "client")
        dialling = world.client.spawn(world.dial(), "dial")
        with pytest.raises(Disconnected):
            await dialling

    run(test)


def test_a_slow_link_keeps_the_order() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        world.network.slow("client", "server", 1.0, 5.0)
        for number in range(20):
            await client.send(Heartbeat(number=number))
        world.network.speed_up("client", "server")
        await client.send(Heartbeat(number=20))
        assert await numbers(server, 21) == list(range(21))
        assert asyncio.get_running_loop().time() >= 1.0

    run(test)


def test_a_half_open_stream_still_delivers_what_is_on_its_way() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        await client.send(Heartbeat(number=1))
        assert world.network.half_open("client", "server") == 1
        for broken in (client.send(Heartbeat(number=2)), client.receive()):
            with pytest.raises(Disconnected):
                await broken
        await client.close()
        assert await numbers(server, 1) == [1]
        await server.send(HeartbeatSeen(term=Term(1, 2), number=1))
        again = await world.client.spawn(world.dial(), "dial")
        second = await world.accepted.get()
        await again.send(Heartbeat(number=1))
        assert await numbers(second, 1) == [1]
        with pytest.raises(Disconnected):
            await server.receive()
        assert asyncio.get_running_loop().time() >= KEEPALIVE_S

    run(test)
