"""Use cases of events: a page of history, and following it without a gap.

The newest part of history is in the cluster's state, all older ones in this replica's SQLite; the
two overlap, and ``seq`` is dense. The part in memory is taken before SQLite is asked: whatever is
trimmed from it meanwhile had been copied before.
"""

from __future__ import annotations

from msgspec import Struct

from controlplane.services.context import Context, Permission, Principal
from controlplane.services.pages import walk
from controlplane.services.requests import EventQuery
from controlplane.services.revisions import epoch_of, seq_after
from controlplane.services.scope import authorize
from controlplane.services.views import EventList, event_view
from controlplane.state import ClusterState
from controlplane.store.history import EventFilter
from shared.model import Event

# Events sent to a follower in one piece; a slow one holds no more than this in memory.
FOLLOW_STEP = 100


class Stretch(Struct, frozen=True):
    """Matching events in order, and the ``seq`` up to which there are no others.

    ``complete`` says that this is all there was; otherwise more follow at once.
    """

    events: tuple[Event, ...]
    seq: int
    complete: bool


async def list_events(context: Context, principal: Principal, query: EventQuery) -> EventList:
    """Return a page of events, oldest first, those after ``since`` only. Raises as ``start``."""
    authorize(principal, Permission.EVENTS_READ)
    filters = (principal.scope.tenant, query.since, query.object, query.kind)
    here = walk(context.state, query.cursor, *filters)
    since = _since(context, query) if here.last is None else int(here.last)
    stretch = await stretch_after(context, principal, query, since, query.limit, until=here.at.seq)
    epoch = epoch_of(context.state)
    return EventList(
        items=tuple(event_view(event, epoch) for event in stretch.events),
        next_cursor=None if stretch.complete else here.cursor(str(stretch.seq)),
        revision=str(here.at),
    )


def start(context: Context, principal: Principal, query: EventQuery) -> int:
    """Return the ``seq`` after which a follower starts: ``since``, or now.

    Raises Forbidden, ValidationFailed.
    """
    authorize(principal, Permission.EVENTS_READ)
    return context.state.last_seq if query.since is None else _since(context, query)


async def stretch_after(
    context: Context,
    principal: Principal,
    query: EventQuery,
    since: int,
    limit: int,
    *,
    until: int | None = None,
) -> Stretch:
    """Return up to ``limit`` matching events after ``since``, up to ``until`` or now.

    Does not check permissions.
    """
    state = context.state
    wanted = EventFilter(
        tenant=principal.scope.tenant,
        since=since,
        until=until,
        object=_object_id(context, principal, query.object),
        kind=query.kind,
        limit=limit + 1,
    )
    last_seq = max(state.last_seq if until is None else until, since)
    found, whole = _in_state(state, wanted)
    if not whole:
        older = await context.history.events(wanted)
        if len(older) <= limit:
            newest = older[-1].seq if older else since
            older += [event for event in found if event.seq > newest]
        found = older
    if len(found) > limit:
        return Stretch(tuple(found[:limit]), found[limit - 1].seq, complete=False)
    return Stretch(tuple(found), last_seq, complete=True)


def _since(context: Context, query: EventQuery) -> int:
    return 0 if query.since is None else seq_after(context.state, query.since, "since")


def _in_state(state: ClusterState, wanted: EventFilter) -> tuple[list[Event], bool]:
    """Return the matching events that are in memory, ``limit`` at most.

    Also tells whether nothing is missing between ``since`` and the last of them.
    """
    found: list[Event] = []
    # What was trimmed was the oldest: the numbers are dense at least in the newest part.
    first = max(wanted.since + 1, state.last_seq - len(state.history) + 1)
    whole = first == wanted.since + 1 or wanted.since >= state.last_seq
    last = state.last_seq if wanted.until is None else min(wanted.until, state.last_seq)
    for seq in range(first, last + 1):
        entry = state.history.get(seq)
        if entry is None:
            whole = False
        elif isinstance(entry, Event) and _matches(entry, wanted):
            found.append(entry)
            if len(found) == wanted.limit:
                break
    return found, whole


def _matches(event: Event, wanted: EventFilter) -> bool:
    return (
        event.tenant == wanted.tenant
        and wanted.object in (None, event.object)
        and wanted.kind in (None, event.kind)
    )


def _object_id(context: Context, principal: Principal, reference: str | None) -> str | None:
    """Return the id of an object named by id or name; what is gone has its id only."""
    if reference is None:
        return None
    state = context.state
    vm_id = state.vm_id_by_name(principal.scope.tenant, reference)
    return vm_id or state.node_id_by_name(reference) or reference
