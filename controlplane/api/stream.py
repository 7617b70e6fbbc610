"""The event stream (server-sent events): following history without a gap.

A follower has no queue: it is sent one stretch of history, and only when that is out the next one
is read, from where it stands. A slow reader so costs one stretch of memory; one that does not take
that within a time is closed, and resumes with the last id it saw.

Frames without a name are events. ``resync``: what was asked for is not all here, list again and go
on reading. ``resume``: the stream ends, its id is where to go on. ``progress``: how far an
operation is; no part of history and without an id. A frame of an id alone, which browsers take and
do not dispatch, moves on a reader whose filter lets nothing pass: with the first frame, with each
sign of life and each stretch that was passed over. Not with every commit: some clients in other
languages dispatch it as an empty event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from msgspec import Struct
from starlette.types import Receive, Send

from controlplane.api.answer import until_gone
from controlplane.services.context import Context, Principal, ProgressReader
from controlplane.services.events import (
    FOLLOW_STEP,
    Start,
    events_of,
    followed,
    shown_progress,
    start,
)
from controlplane.services.requests import EventQuery
from controlplane.services.revisions import epoch_of, event_id
from controlplane.services.scope import FollowedObjects
from controlplane.services.stretches import Stretch
from controlplane.services.views import EventView, event_view
from shared.codec import to_json
from shared.errors import Overloaded, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

EVENT_STREAM = "text/event-stream"
# Proxies cut what is silent for 30 s or more.
HEARTBEAT_S = 15.0
HEARTBEAT = b": heartbeat\n"
# A reader that takes nothing for so long is gone or stuck.
SEND_TIMEOUT_S = 30.0
# Each follower looks at history after every commit: 500 of them cost about 2 ms a commit.
FOLLOWERS_MAX = 500
# How long a browser waits before it comes back after its stream ended.
RETRY_MS = 2000
GAP = "what came after that is not all here; list again, and go on reading here"


class Place(Struct, frozen=True):
    """The data of a ``resync`` or ``resume`` frame: where the stream goes on from."""

    id: str
    detail: str = ""


class EventStreams:
    """All followers of this replica."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._followers = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End all streams and long polls, and refuse new ones: the replica stops."""
        self._closing.set()

    async def unless_closing(self, work: Awaitable[T]) -> T:
        """Return what ``work`` returns. Raises Unavailable when the replica stops before that."""
        working = asyncio.ensure_future(work)
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({working, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Unavailable("this replica stops: ask again")
            return working.result()
        finally:
            working.cancel()
            closing.cancel()

    async def follow(
        self,
        principal: Principal,
        query: EventQuery,
        receive: Receive,
        send: Send,
        abort: Callable[[], None] | None = None,
    ) -> None:
        """Send events after ``query.since`` (or from now on) until the client goes away.

        ``abort`` cuts the connection; a mere close would wait for the reader that does not read.
        Raises Forbidden, ValidationFailed, Overloaded, all before the answer begins.
        """
        begin = await start(self._context, principal, query)
        if self._followers >= FOLLOWERS_MAX or self._closing.is_set():
            raise Overloaded(f"{self._followers} clients follow events here already")
        self._followers += 1
        ends: set[asyncio.Future[Any]] = {
            asyncio.create_task(until_gone(receive), name="event-stream-client"),
            asyncio.create_task(self._closing.wait(), name="event-stream-closing"),
        }
        reader = self._context.progress.subscribe() if query.progress else None
        follower = _Follower(self._context, principal, query, send, begin.seq, reader)
        try:
            await follower.run(begin, ends)
        except TimeoutError:
            log.info(
                "a follower of events took nothing for %g s after %s: closed",
                SEND_TIMEOUT_S,
                follower.place(),
            )
            if abort is not None:
                abort()
        finally:
            self._followers -= 1
            for task in ends:
                task.cancel()
            if reader is not None:
                reader.close()


class _Follower:
    """One follower: where it stands in history, and what it has been sent of that."""

    def __init__(
        self,
        context: Context,
        principal: Principal,
        query: EventQuery,
        send: Send,
        since: int,
        reader: ProgressReader | None,
    ) -> None:
        self._context = context
        self._principal = principal
        self._query = query
        self._objects = FollowedObjects(context, principal, query.object)
        self._send = send
        self._reader = reader
        self._since = since
        self._told = since
        self._sent_s = 0.0

    def place(self) -> str:
        """Return the id from which the follower goes on."""
        return event_id(epoch_of(self._context.state), self._since)

    async def run(self, begin: Start, ends: set[asyncio.Future[Any]]) -> None:
        """Send until one of ``ends`` is done. Raises TimeoutError where nothing is taken."""
        headers = [(b"content-type", EVENT_STREAM.encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        # In one part with its id: who is cut off before it has read the one has not read the other.
        first = self._place(b"resync", GAP) if begin.gap else self._position()
        await self._part(b"retry: %d\n" % RETRY_MS + first)
        detail = "the replica stops; go on from this id"
        try:
            await self._follow(ends)
        except Unavailable as error:
            log.warning("a stream of events ended at %s: %s", self.place(), error)
            detail = f"{error}; then go on from this id"
        # To a client that has gone this goes nowhere; one that is still there need not guess.
        await self._part(self._place(b"resume", detail))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, ends: set[asyncio.Future[Any]]) -> None:
        moved: asyncio.Future[Any] | None = None
        try:
            while not any(end.done() for end in ends):
                # Armed before history is read: what comes between is not slept through.
                changed = self._context.state.changes.next()
                if self._reader is not None and (moved is None or moved.done()):
                    moved = asyncio.create_task(self._reader.wait(), name="event-stream-progress")
                try:
                    complete = await self._tell()
                    if complete:
                        await self._wait({changed, *ends, *([moved] if moved else [])})
                finally:
                    changed.cancel()
        finally:
            if moved is not None:
                moved.cancel()

    async def _tell(self) -> bool:
        """Send what there is to tell, one stretch of it; return whether that was all."""
        context, principal, query = self._context, self._principal, self._query
        objects = self._objects.ids()
        stretch: Stretch = await followed(context, principal, query, objects, self._since)
        self._since = stretch.seq
        if stretch.entries:
            epoch = epoch_of(context.state)
            views = (event_view(event, epoch) for event in events_of(stretch))
            await self._part(b"".join(map(render, views)))
            self._told = stretch.entries[-1].seq
        if self._since - self._told >= FOLLOW_STEP:
            await self._part(self._position())
        if self._reader is not None:
            frames = shown_progress(context, principal, objects, self._reader.take())
            if frames:
                await self._part(
                    b"".join(b"event: progress\ndata: %s\n\n" % to_json(f) for f in frames)
                )
        return stretch.complete

    async def _wait(self, signs: set[asyncio.Future[Any]]) -> None:
        """Wait for a sign of something to tell; give one of life when it is time for that."""
        left_s = self._sent_s + HEARTBEAT_S - asyncio.get_running_loop().time()
        if left_s > 0:
            await asyncio.wait(signs, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        else:
            await self._part(HEARTBEAT + self._position())

    def _position(self) -> bytes:
        self._told = self._since
        return b"id: %s\n\n" % self.place().encode()

    def _place(self, name: bytes, detail: str) -> bytes:
        data = to_json(Place(self.place(), detail))
        return b"event: %s\nid: %s\ndata: %s\n\n" % (name, self.place().encode(), data)

    async def _part(self, body: bytes) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._sent_s = asyncio.get_running_loop().time()


def render(view: EventView) -> bytes:
    """Return one event in the stream's format; JSON has no newline of its own."""
    return b"id: %s\ndata: %s\n\n" % (view.id.encode(), to_json(view))
