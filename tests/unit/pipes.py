"""A stream between two parties in memory, as the unit tests need it: in order, or broken."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from shared.errors import Disconnected


class PipeEnd:
    """One end of a stream: the port ``Channel``, with what a test wants to see of it."""

    def __init__(self) -> None:
        self.peer = self
        self.closed = False
        self.sent: list[Any] = []
        self._arrived: deque[Any] = deque()
        self._changed = asyncio.Event()

    async def send(self, message: Any) -> None:
        if self.closed or self.peer.closed:
            raise Disconnected("the peer is gone")
        self.sent.append(message)
        self.peer._arrived.append(message)
        self.peer._changed.set()

    async def receive(self) -> Any:
        while not self._arrived:
            if self.closed or self.peer.closed:
                raise Disconnected("the peer is gone")
            self._changed.clear()
            await self._changed.wait()
        return self._arrived.popleft()

    async def close(self) -> None:
        self.closed = True
        self._changed.set()
        self.peer._changed.set()

    async def expect(self, kind: type[Any]) -> Any:
        """Return the next message of a kind; what comes before it is dropped."""
        async with asyncio.timeout(600):
            while True:
                message = await self.receive()
                if isinstance(message, kind):
                    return message


def pipe() -> tuple[PipeEnd, PipeEnd]:
    one, other = PipeEnd(), PipeEnd()
    one.peer, other.peer = other, one
    return one, other
