"""Empties the outbox towards a replica: one stream, batches in order, cumulative acknowledgements.

Nodes are spread over the replicas by rendezvous hashing. A node whose replica does not answer goes
to the next in its order; after a stream that had served it begins with the first again. While
nobody answers the outbox keeps what it can; nothing here ever holds up the sampler.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

from agent.outbox import Outbox
from shared.channel import Channel
from shared.clock import Clock
from shared.errors import Disconnected, NovacronError
from shared.lifetime import until_one_ends
from shared.protocol import (
    BatchSeen,
    TelemetryAnswer,
    TelemetryHello,
    TelemetryMessage,
    TelemetryRefused,
)
from shared.rendezvous import in_order
from shared.retry import Backoff

log = logging.getLogger(__name__)

RECONNECT_BACKOFF = Backoff(first_s=1.0, cap_s=30.0)
# Not yet joined: the session will have told us who we are within a few seconds.
JOIN_WAIT_S = 1.0

TelemetryChannel = Channel[TelemetryMessage, TelemetryAnswer]


class DialTelemetry(Protocol):
    """Opens a telemetry stream to one replica. Raises Disconnected."""

    async def __call__(self, address: str) -> TelemetryChannel: ...


class Telemetry:
    def __init__(
        self,
        replicas: tuple[str, ...],
        dial: DialTelemetry,
        outbox: Outbox,
        hello: Callable[[], TelemetryHello | None],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """``hello`` returns None until this node has joined.

        ``last_taken_at`` is the date of the last acknowledgement in seconds since the epoch, or 0.
        """
        self._replicas = replicas
        self._dial = dial
        self._outbox = outbox
        self._hello = hello
        self._rng = rng
        self._clock = clock
        self._acknowledged = False
        self.last_taken_at = 0.0

    async def run(self) -> None:
        """Keep a stream to some replica, for ever."""
        delays = RECONNECT_BACKOFF.delays(self._rng)
        turn = 0
        while True:
            hello = self._hello()
            if hello is None:
                await asyncio.sleep(JOIN_WAIT_S)
                continue
            address = in_order(hello.node_id, self._replicas)[turn % len(self._replicas)]
            self._acknowledged = False
            try:
                await self._serve(await self._dial(address), hello)
            except NovacronError as error:
                log.warning("no telemetry to %s: %s", address, error)
            turn += 1
            if self._acknowledged:
                delays, turn = RECONNECT_BACKOFF.delays(self._rng), 0
            await asyncio.sleep(next(delays))

    async def _serve(self, channel: TelemetryChannel, hello: TelemetryHello) -> None:
        self._outbox.rewind()
        try:
            await until_one_ends(self._send(channel, hello), self._receive(channel))
        finally:
            await channel.close()

    async def _send(self, channel: TelemetryChannel, hello: TelemetryHello) -> None:
        await channel.send(hello)
        while True:
            await channel.send(await self._outbox.next_batch())

    async def _receive(self, channel: TelemetryChannel) -> None:
        while True:
            answer = await channel.receive()
            if isinstance(answer, TelemetryRefused):
                raise Disconnected(f"the replica refuses: {answer.problem.detail}")
            if isinstance(answer, BatchSeen):
                self._acknowledged = True
                self.last_taken_at = self._clock.now().timestamp()
                self._outbox.acknowledge(answer.number)
