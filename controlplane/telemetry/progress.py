"""How far long operations are: the latest figure of each, in the memory of this replica only.

It is lost with its process, and says of when it is (``as_of``). Whoever follows gets the latest
figure of each operation since it last looked, never every one: a slow reader costs no more memory
than a fast one.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from msgspec import Struct

from shared.clock import Clock

# Far more than run at once in the largest cell; of more the ones that were longest silent go.
OPERATIONS_MAX = 10_000
# What one reader has not taken yet.
WAITING_MAX = 1_000


class Progress(Struct, frozen=True, kw_only=True):
    """Where a long step is; kept in the memory of the replica that runs it only."""

    percent: float
    eta_s: float | None
    as_of: datetime
    bytes_done: int | None = None
    bytes_total: int | None = None


class ProgressFrame(Struct, frozen=True, kw_only=True):
    """One figure of one operation; ``detail`` is a few words for people."""

    operation: str
    progress: Progress
    detail: str = ""


class ProgressBoard:
    """Takes figures from whoever runs operations, and shows them to whoever asks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: dict[str, ProgressFrame] = {}
        self._readers: dict[BoardReader, None] = {}

    def put(
        self,
        operation_id: str,
        percent: float,
        eta_s: float | None = None,
        *,
        bytes_done: int | None = None,
        bytes_total: int | None = None,
        detail: str = "",
    ) -> None:
        """Take the newest figure of an operation."""
        progress = Progress(
            percent=percent,
            eta_s=eta_s,
            as_of=self._clock.now(),
            bytes_done=bytes_done,
            bytes_total=bytes_total,
        )
        self.take(ProgressFrame(operation=operation_id, progress=progress, detail=detail))

    def take(self, frame: ProgressFrame) -> None:
        """Take a figure as another replica has it, unless it is here already."""
        if self._latest.get(frame.operation) == frame:
            return
        _put_last(self._latest, frame, OPERATIONS_MAX)
        for reader in self._readers:
            reader.offer(frame)

    def all(self) -> tuple[ProgressFrame, ...]:
        """Return the latest figure of each operation that has not ended."""
        return tuple(self._latest.values())

    def forget(self, operation_id: str) -> None:
        """Drop what is known of an operation: it has ended."""
        self._latest.pop(operation_id, None)

    def latest(self, operation_id: str) -> Progress | None:
        frame = self._latest.get(operation_id)
        return None if frame is None else frame.progress

    def subscribe(self) -> BoardReader:
        """Return a reader of all figures from now on; close it when it is done with."""
        reader = BoardReader(self)
        self._readers[reader] = None
        return reader

    def unsubscribe(self, reader: BoardReader) -> None:
        self._readers.pop(reader, None)


class BoardReader:
    def __init__(self, board: ProgressBoard) -> None:
        self._board = board
        self._waiting: dict[str, ProgressFrame] = {}
        self._there = asyncio.Event()

    def offer(self, frame: ProgressFrame) -> None:
        _put_last(self._waiting, frame, WAITING_MAX)
        self._there.set()

    async def wait(self) -> None:
        """Return once there is something to take."""
        await self._there.wait()

    def take(self) -> tuple[ProgressFrame, ...]:
        """Return the latest figure of each operation that moved since it was last taken."""
        taken = tuple(self._waiting.values())
        self._waiting.clear()
        self._there.clear()
        return taken

    def close(self) -> None:
        self._board.unsubscribe(self)


def _put_last(frames: dict[str, ProgressFrame], frame: ProgressFrame, at_most: int) -> None:
    frames.pop(frame.operation, None)
    frames[frame.operation] = frame
    if len(frames) > at_most:
        del frames[next(iter(frames))]
