"""A process that is paused: nothing of it runs, its sockets stay open, its clock goes on."""

from __future__ import annotations

import asyncio

import pytest

from shared.errors import Disconnected
from shared.protocol import Heartbeat
from tests.sim.network import CONNECT_TIMEOUT_S, KEEPALIVE_S
from tests.sim.process import Process, adopt_by_context, outside
from tests.sim.test_network import World, run
from tests.sim.virtual_loop import run_virtual


def test_what_came_due_while_paused_runs_late_and_in_order() -> None:
    ran: list[tuple[str, float]] = []

    def note(what: str) -> None:
        ran.append((what, asyncio.get_running_loop().time()))

    async def tick() -> None:
        for number in range(3):
            await asyncio.sleep(1)
            note(f"tick {number}")

    async def main() -> None:
        process = Process("host", "host.1")
        process.spawn(tick(), "ticks")
        await asyncio.sleep(1.5)
        process.pause()
        process.call_soon(note, "event")
        await asyncio.sleep(60)
        assert ran == [("tick 0", 1.0)]
        process.resume()
        await process.gone()

    run_virtual(main(), adopt_by_context)
    assert ran[1:] == [("event", 61.5), ("tick 1", 61.5), ("tick 2", 62.5)]


def test_what_a_paused_process_has_asked_for_goes_on_without_it() -> None:
    effects: list[str] = []

    async def arrive() -> None:
        await asyncio.sleep(10)
        effects.append("request")

    async def ask() -> None:
        await outside(arrive(), "request")
        effects.append("answer")

    async def main() -> None:
        process = Process("host", "host.1")
        process.spawn(ask(), "ask")
        await asyncio.sleep(1)
        process.pause()
        await asyncio.sleep(20)
        assert effects == ["request"]
        process.resume()
        await process.gone()

    run_virtual(main(), adopt_by_context)
    assert effects == ["request", "answer"]


def test_a_paused_process_can_be_killed() -> None:
    async def work(process: Process) -> None:
        await asyncio.sleep(5)
        process.check()
        pytest.fail("it is dead")

    async def main() -> None:
        process = Process("host", "host.1")
        process.spawn(work(process), "work")
        process.pause()
        await asyncio.sleep(10)
        process.kill()
        await process.gone()

    run_virtual(main(), adopt_by_context)


def test_messages_to_a_paused_process_wait_for_it() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        received = world.server.spawn(server.receive(), "receive")
        world.server.pause()
        await client.send(Heartbeat(number=1))
        await asyncio.sleep(KEEPALIVE_S / 2)
        assert not received.done()
        world.server.resume()
        assert (await received).number == 1

    run(test)


def test_what_a_process_sent_before_its_pause_arrives() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        await world.client.spawn(client.send(Heartbeat(number=1)), "send")
        world.client.pause()
        assert (await server.receive()).number == 1

    run(test)


def test_a_pause_that_outlasts_keepalive_breaks_the_streams() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        world.server.pause()
        world.network.paused(world.server)
        await asyncio.sleep(KEEPALIVE_S - 1)
        await client.send(Heartbeat(number=1))
        with pytest.raises(Disconnected):
            await client.receive()
        world.server.resume()
        with pytest.raises(Disconnected):
            await server.receive()

    run(test)


def test_a_pause_that_keepalive_outlasts_breaks_nothing() -> None:
    async def test(world: World) -> None:
        client, server = await world.connect()
        world.server.pause()
        world.network.paused(world.server)
        await asyncio.sleep(KEEPALIVE_S - 1)
        world.server.resume()
        await asyncio.sleep(KEEPALIVE_S)
        await client.send(Heartbeat(number=1))
        assert (await server.receive()).number == 1

    run(test)


def test_nobody_answers_who_dials_a_paused_process() -> None:
    async def test(world: World) -> None:
        world.server.pause()
        dialling = world.client.spawn(world.dial(), "dial")
        with pytest.raises(Disconnected):
            await dialling
        world.server.resume()
        dialling = world.client.spawn(world.dial(), "dial")
        await asyncio.sleep(CONNECT_TIMEOUT_S)
        assert dialling.exception() is None

    run(test)


@pytest.mark.parametrize("steps", range(12))
def test_a_process_can_die_at_any_await(steps: int) -> None:
    """Two of its tasks count in turn; it dies before the next of them would."""

    async def main() -> int:
        process = Process("host", "host.1")
        counted = 0

        async def work() -> None:
            nonlocal counted
            while True:
                process.check()
                counted += 1
                await asyncio.sleep(0)

        process.spawn(work(), "one")
        process.spawn(work(), "other")
        await process.alive_for(steps)
        await process.gone()
        return counted

    assert run_virtual(main(), adopt_by_context) == steps
