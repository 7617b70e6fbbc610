"""What is in the memory or on the disk of other replicas: figures of nodes and VMs, segments of
history.

Agents send their samples to one replica each, and nobody else knows which: all are asked at once,
and the newest answer counts. A peer that does not answer soon is done without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from controlplane.sessions.leader_link import PeerCall
from controlplane.sessions.peer_messages import (
    OBJECTS_MAX,
    FiguresRead,
    PeerAnswer,
    PeerRefused,
    ReadFigures,
    ReadHistory,
    Segment,
)
from controlplane.telemetry.windows import Rates, Series, Windows
from shared.errors import NovacronError, Unavailable
from shared.model import HistoryEntry
from shared.problems import error_of

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A page of figures must not wait longer for a replica that hangs; one that is dead refuses at once.
FIGURES_LIMIT_S = 1.0
# A segment is read from a disk.
SEGMENT_LIMIT_S = 5.0


class PeerReads:
    def __init__(
        self, windows: Windows, peers: Callable[[], tuple[str, ...]], call: PeerCall
    ) -> None:
        """``peers`` are the addresses of the other replicas that are registered now."""
        self._windows = windows
        self._peers = peers
        self._call = call
        self.period_s = windows.period_s

    async def latest(self, objects: Iterable[str]) -> dict[str, Rates]:
        """Return the newest figures of each object, whichever replica has them."""
        wanted = tuple(objects)
        found = [self._own_latest(wanted)]
        for start in range(0, len(wanted), OBJECTS_MAX):
            part = wanted[start : start + OBJECTS_MAX]
            found += [read.latest for read in await self._figures(ReadFigures(objects=part))]
        newest: dict[str, Rates] = {}
        for each in found:
            for object_id, rates in each.items():
                if object_id not in newest or newest[object_id].at < rates.at:
                    newest[object_id] = rates
        return newest

    async def series(self, object_id: str) -> Series | None:
        """Return an object's points of the last minutes, from the replica that has the newest."""
        own = self._windows.series(object_id)
        read = await self._figures(ReadFigures(objects=(object_id,), whole=True))
        found = [own, *(each.series.get(object_id) for each in read)]
        return max(
            (each for each in found if each is not None), key=lambda s: s.as_of, default=None
        )

    async def segment(self, after: int, until: int) -> tuple[HistoryEntry, ...]:
        """Return entries of history in (``after``, ``until``], without a gap among them.

        They begin as early as any peer has them; empty when every peer answered and none has any.
        Raises Unavailable when one that may have earlier ones did not answer.
        """
        best: tuple[HistoryEntry, ...] = ()
        silent: NovacronError | None = None
        request = ReadHistory(after=after, until=until)
        for address in self._peers():
            try:
                answer = await self._call(address, request, SEGMENT_LIMIT_S)
                entries = _expect(answer, Segment).entries()
            except NovacronError as error:
                silent = error
                continue
            if entries and (not best or entries[0].seq < best[0].seq):
                best = entries
            if best and best[0].seq == after + 1:
                return best
        if silent is not None:
            raise Unavailable(f"a peer does not tell what it has of history: {silent}") from silent
        return best

    def _own_latest(self, objects: tuple[str, ...]) -> dict[str, Rates]:
        own = {each: self._windows.latest(each) for each in objects}
        return {each: rates for each, rates in own.items() if rates is not None}

    async def _figures(self, request: ReadFigures) -> list[FiguresRead]:
        asked = [self._call(address, request, FIGURES_LIMIT_S) for address in self._peers()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        read: list[FiguresRead] = []
        for answer in answers:
            if isinstance(answer, FiguresRead):
                read.append(answer)
            elif isinstance(answer, BaseException) and not isinstance(answer, NovacronError):
                raise answer
        return read


def _expect(answer: PeerAnswer, kind: type[Answer]) -> Answer:
    if isinstance(answer, PeerRefused):
        raise error_of(answer.problem)
    if not isinstance(answer, kind):
        raise Unavailable("the peer answered something else")
    return answer
