"""The event stream (server-sent events): following history without a gap.

A follower has no queue: it is sent one stretch of history, and only when that is out the next one
is read, from where it stands. A slow reader so costs one stretch of memory; one that does not take
that within a time is closed, and resumes with the last id it saw.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.types import Receive, Send

from controlplane.services.context import Context, Principal
from controlplane.services.events import FOLLOW_STEP, start, stretch_after
from controlplane.services.requests import EventQuery
from controlplane.services.revisions import epoch_of
from controlplane.services.views import EventView, event_view
from shared.codec import to_json
from shared.errors import Overloaded, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

EVENT_STREAM = "text/event-stream"
# Proxies cut what is silent for 30 s or more.
HEARTBEAT_S = 15.0
HEARTBEAT = b": heartbeat\n\n"
# A reader that takes nothing for so long is gone or stuck.
SEND_TIMEOUT_S = 30.0
# Each follower looks at history after every commit: 500 of them cost about 2 ms a commit.
FOLLOWERS_MAX = 500
# How long a browser waits before it comes back after its stream ended.
RETRY_MS = 2000


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
        since = start(self._context, principal, query)
        if self._followers >= FOLLOWERS_MAX or self._closing.is_set():
            raise Overloaded(f"{self._followers} clients follow events here already")
        self._followers += 1
        ends: set[asyncio.Task[object]] = {
            asyncio.create_task(_gone(receive), name="event-stream-client"),
            asyncio.create_task(self._closing.wait(), name="event-stream-closing"),
        }
        try:
            await self._feed(principal, query, since, send, ends)
        except TimeoutError:
            log.info("a follower of events took nothing for %g s: closed", SEND_TIMEOUT_S)
            if abort is not None:
                abort()
        finally:
            self._followers -= 1
            for task in ends:
                task.cancel()

    async def _feed(
        self,
        principal: Principal,
        query: EventQuery,
        since: int,
        send: Send,
        ends: set[asyncio.Task[object]],
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [_CONTENT_TYPE]})
        await _send_part(send, b"retry: %d\n\n" % RETRY_MS)
        changed: asyncio.Task[object] | None = None
        try:
            while not any(task.done() for task in ends):
                # Armed before history is read: what comes between is not slept through.
                if changed is None or changed.done():
                    changed = asyncio.create_task(self._context.state.changes.wait())
                    await asyncio.sleep(0)
                stretch = await stretch_after(self._context, principal, query, since, FOLLOW_STEP)
                since = stretch.seq
                if stretch.events:
                    epoch = epoch_of(self._context.state)
                    views = (event_view(event, epoch) for event in stretch.events)
                    await _send_part(send, b"".join(map(render, views)))
                if stretch.complete and not await _first(changed, ends):
                    await _send_part(send, HEARTBEAT)
        finally:
            if changed is not None:
                changed.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def render(view: EventView) -> bytes:
    """Return one event in the stream's format; JSON has no newline of its own."""
    return b"id: %s\ndata: %s\n\n" % (view.id.encode(), to_json(view))


_CONTENT_TYPE = (b"content-type", EVENT_STREAM.encode())


async def _first(changed: asyncio.Task[object], ends: set[asyncio.Task[object]]) -> bool:
    """Wait for the next change or end; False when it is time for a sign of life."""
    done, _ = await asyncio.wait(
        {changed, *ends}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED
    )
    return bool(done)


async def _send_part(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
