"""The outbox's way to a replica: in order, repeated until acknowledged, backing off."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

from agent.outbox import Outbox
from agent.telemetry import RECONNECT_BACKOFF, Telemetry
from shared.errors import Disconnected, Forbidden
from shared.model import Sample
from shared.problems import problem_of
from shared.protocol import Batch, BatchSeen, TelemetryHello, TelemetryRefused
from shared.rendezvous import in_order
from tests.sim.virtual_loop import run_virtual
from tests.unit.agent_world import StillClock
from tests.unit.pipes import PipeEnd, pipe

HELLO = TelemetryHello(node_name="n1", node_id="node-1", incarnation="i1")


class Site:
    def __init__(self) -> None:
        self.outbox = Outbox(1.0)
        self.dialled: list[float] = []
        self.addresses: list[str] = []
        self.refusing = False
        self.joined = True
        self.streams: asyncio.Queue[PipeEnd] = asyncio.Queue()
        self.telemetry = Telemetry(
            ("r1:8444", "r2:8444"),
            self._dial,
            self.outbox,
            lambda: HELLO if self.joined else None,
            StillClock(),
            random.Random(1),
        )
        self.running = asyncio.ensure_future(self.telemetry.run())

    async def _dial(self, address: str) -> PipeEnd:
        self.dialled.append(asyncio.get_running_loop().time())
        self.addresses.append(address)
        if self.refusing:
            raise Disconnected("nobody listens")
        ours, theirs = pipe()
        self.streams.put_nowait(theirs)
        return ours

    async def accept(self) -> PipeEnd:
        async with asyncio.timeout(600):
            stream = await self.streams.get()
        assert await stream.receive() == HELLO
        return stream

    def sample(self) -> None:
        self.outbox.add([Sample(object="node-1", at=1.0)])
        self.outbox.seal()


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


def test_what_was_not_acknowledged_is_sent_again() -> None:
    async def main() -> None:
        it = Site()
        for _ in range(3):
            it.sample()
        stream = await it.accept()
        assert [(await stream.expect(Batch)).number for _ in range(3)] == [1, 2, 3]
        await stream.send(BatchSeen(number=2))
        await asyncio.sleep(1)
        await stream.close()

        stream = await it.accept()
        assert (await stream.expect(Batch)).number == 3
        assert len(it.outbox) == 1

    virtual(main())


def test_nothing_is_dialled_before_the_node_has_joined() -> None:
    async def main() -> None:
        it = Site()
        it.joined = False
        await asyncio.sleep(60)
        assert it.dialled == []
        it.joined = True
        await it.accept()

    virtual(main())


def test_a_refusal_is_an_end_and_another_replica_is_tried() -> None:
    async def main() -> None:
        it = Site()
        for _ in range(3):
            stream = await it.accept()
            await stream.send(TelemetryRefused(problem=problem_of(Forbidden("not you"))))
        await it.accept()
        assert not it.running.done()

    virtual(main())


def test_it_begins_with_its_own_replica_and_comes_back_to_it() -> None:
    async def main() -> None:
        it = Site()
        own, other = in_order(HELLO.node_id, ("r1:8444", "r2:8444"))
        for _ in range(2):
            stream = await it.accept()
            await stream.send(TelemetryRefused(problem=problem_of(Forbidden("not now"))))
        it.sample()
        stream = await it.accept()
        await stream.send(BatchSeen(number=1))
        await asyncio.sleep(1)
        await stream.close()
        await it.accept()
        assert it.addresses == [own, other, own, own]

    virtual(main())


def test_it_backs_off_also_after_it_was_served_once() -> None:
    async def main() -> None:
        it = Site()
        it.sample()
        stream = await it.accept()
        await stream.send(BatchSeen(number=1))
        await asyncio.sleep(1)
        it.refusing = True
        await stream.close()
        await asyncio.sleep(3600)
        # With the full jitter an attempt comes every 15 s on the average, never twice a second.
        assert len(it.dialled) < 2 * 3600 / (RECONNECT_BACKOFF.cap_s / 2)
        it.running.cancel()

    virtual(main())
