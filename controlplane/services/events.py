"""Use cases of events: a page of history, and following it without a gap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from controlplane.services.context import Context, Permission, Principal
from controlplane.services.pages import walk
from controlplane.services.requests import EventQuery
from controlplane.services.revisions import epoch_of, present, seq_after
from controlplane.services.scope import authorize, object_ids
from controlplane.services.stretches import (
    Stretch,
    check_reach,
    newest_entries,
    page_start,
    stretch_after,
)
from controlplane.services.views import (
    EventList,
    ProgressFrameView,
    event_view,
    progress_frame_view,
)
from controlplane.store.history import EntryFilter
from controlplane.telemetry.progress import ProgressFrame
from shared.errors import FieldError, HistoryGone, ValidationFailed
from shared.model import Event

# Events sent to a follower in one piece; a slow one holds no more than this in memory.
FOLLOW_STEP = 100


class Start(Struct, frozen=True):
    """Where a follower starts; ``gap`` says that what it had asked for is not all here."""

    seq: int
    gap: bool


async def list_events(context: Context, principal: Principal, query: EventQuery) -> EventList:
    """Return a page of events, oldest first: those after ``since`` only, or the ``last`` ones.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable, HistoryGone.
    """
    authorize(principal, Permission.EVENTS_READ)
    if query.last is not None:
        return await _last_events(context, principal, query, query.last)
    filters = (principal.scope.tenant, query.since, query.object, query.kind)
    objects = object_ids(context, principal, query.object)
    here = walk(context.state, query.cursor, *filters, objects=objects)
    since = await page_start(context, here, query.since)
    wanted = _wanted(principal, query, here.objects, since, query.limit, here.at.seq)
    stretch = await stretch_after(context, wanted)
    epoch = epoch_of(context.state)
    return EventList(
        items=tuple(event_view(event, epoch) for event in events_of(stretch)),
        next_cursor=None if stretch.complete else here.cursor(str(stretch.seq)),
        revision=str(here.at),
    )


async def start(context: Context, principal: Principal, query: EventQuery) -> Start:
    """Return where a follower starts: after ``since``, or now.

    One whose ``since`` is of before a restore, or older than what is here, starts now and is told
    so: it lists again and has missed nothing since. Raises Forbidden, ValidationFailed.
    """
    authorize(principal, Permission.EVENTS_READ)
    if query.last is not None:
        raise _last_refused("is of a list; what is followed begins now, or after since")
    if query.progress:
        authorize(principal, Permission.OPERATIONS_READ)
    now = context.state.last_seq
    if query.since is None:
        return Start(now, gap=False)
    try:
        since = seq_after(context.state, query.since, "since")
        await check_reach(context, since)
    except HistoryGone:
        return Start(now, gap=True)
    except ValidationFailed as error:
        if any(fault.code != "expired" for fault in error.errors):
            raise
        return Start(now, gap=True)
    return Start(since, gap=False)


async def followed(
    context: Context,
    principal: Principal,
    query: EventQuery,
    objects: tuple[str, ...],
    since: int,
) -> Stretch:
    """Return the next stretch of a follower: ``objects`` are the ids of those it has named.

    Does not check permissions.
    """
    wanted = _wanted(principal, query, objects, since, FOLLOW_STEP)
    return await stretch_after(context, wanted)


def events_of(stretch: Stretch) -> Iterable[Event]:
    return (entry for entry in stretch.entries if isinstance(entry, Event))


def shown_progress(
    context: Context,
    principal: Principal,
    objects: tuple[str, ...],
    frames: Sequence[ProgressFrame],
) -> list[ProgressFrameView]:
    """Return the frames that a follower may see and wants; of what has ended there are none."""
    found: list[ProgressFrameView] = []
    for frame in frames:
        stored = context.state.operations.get(frame.operation)
        if stored is None or stored.record.tenant != principal.scope.tenant:
            continue
        operation = stored.record
        if not objects or operation.target in objects or operation.id in objects:
            found.append(progress_frame_view(frame, operation))
    return found


async def _last_events(
    context: Context, principal: Principal, query: EventQuery, count: int
) -> EventList:
    """Return the newest events: who follows from the answer's revision misses none."""
    if query.since is not None or query.cursor is not None:
        raise _last_refused("does not go together with since or cursor")
    at = present(context.state)
    objects = object_ids(context, principal, query.object)
    wanted = _wanted(principal, query, objects, 0, count, at.seq)
    found = await newest_entries(context, wanted)
    items = tuple(event_view(event, at.epoch) for event in found if isinstance(event, Event))
    return EventList(items=items, next_cursor=None, revision=str(at))


def _last_refused(message: str) -> ValidationFailed:
    return ValidationFailed((FieldError("/last", "not_allowed", message),))


def _wanted(
    principal: Principal,
    query: EventQuery,
    objects: tuple[str, ...],
    since: int,
    limit: int,
    until: int | None = None,
) -> EntryFilter:
    return EntryFilter(
        tenant=principal.scope.tenant,
        since=since,
        until=until,
        objects=objects,
        kinds=query.kind,
        limit=limit,
    )
