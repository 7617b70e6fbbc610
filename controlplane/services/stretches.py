"""Stretches of history, across memory and SQLite, without a gap: of events, and of audit records.

The newest part of history is in the cluster's state, all older ones in this replica's SQLite; the
two overlap, and ``seq`` is dense. The part in memory is taken before SQLite is asked: whatever is
trimmed from it meanwhile had been copied before.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from controlplane.services.context import Context
from controlplane.services.pages import Walk
from controlplane.services.revisions import seq_after
from controlplane.state import ClusterState
from controlplane.store.history import EntryFilter, EntryType, kind_matches
from shared.errors import HistoryGone
from shared.model import AuditRecord, Event, FinishedOperation

Entry = Event | AuditRecord


class Stretch(Struct, frozen=True):
    """Matching entries in order, and the ``seq`` up to which there are no others.

    ``complete`` says that this is all there was; otherwise more follow at once.
    """

    entries: tuple[Entry, ...]
    seq: int
    complete: bool


async def stretch_after(context: Context, wanted: EntryFilter) -> Stretch:
    """Return what is wanted, up to ``until`` or now. Does not check permissions."""
    state, limit = context.state, wanted.limit
    wanted = replace(wanted, limit=limit + 1)
    last_seq = max(state.last_seq if wanted.until is None else wanted.until, wanted.since)
    found, whole = _in_state(state, wanted)
    if not whole:
        older = [
            entry
            for entry in await context.history.entries(wanted)
            if not isinstance(entry, FinishedOperation)
        ]
        if len(older) <= limit:
            newest = older[-1].seq if older else wanted.since
            older += [entry for entry in found if entry.seq > newest]
        found = older
    if len(found) > limit:
        return Stretch(tuple(found[:limit]), found[limit - 1].seq, complete=False)
    return Stretch(tuple(found), last_seq, complete=True)


async def newest_entries(context: Context, wanted: EntryFilter) -> tuple[Entry, ...]:
    """Return the newest of what is wanted, oldest first. Does not check permissions."""
    found, floor = _newest_in_state(context.state, wanted)
    missing = wanted.limit - len(found)
    if missing and floor > wanted.since:
        older = replace(wanted, until=floor, limit=missing, newest=True)
        found = [
            *(
                entry
                for entry in await context.history.entries(older)
                if not isinstance(entry, FinishedOperation)
            ),
            *found,
        ]
    return tuple(found)


async def page_start(context: Context, here: Walk, since: str | None) -> int:
    """Return the ``seq`` after which a page begins: where its walk stands, or ``since``.

    Raises ValidationFailed; HistoryGone when a walk would begin where this replica has a gap.
    """
    if here.last is not None:
        return int(here.last)
    if since is None:
        return 0
    seq = seq_after(context.state, since, "since")
    await check_reach(context, seq)
    return seq


async def check_reach(context: Context, since: int) -> None:
    """Raise HistoryGone unless all of history after ``since`` is here."""
    state = context.state
    first = state.last_seq - len(state.history) + 1
    if since + 1 >= first:
        return
    reach = await context.history.reach()
    if reach.last < first - 1 or since + 1 < reach.first:
        raise HistoryGone("this replica no longer has all of history since then: list again")


def _in_state(state: ClusterState, wanted: EntryFilter) -> tuple[list[Entry], bool]:
    """Return the matching entries that are in memory, ``limit`` at most.

    Also tells whether nothing is missing between ``since`` and the last of them.
    """
    found: list[Entry] = []
    # What was trimmed was the oldest: the numbers are dense at least in the newest part.
    first = max(wanted.since + 1, state.last_seq - len(state.history) + 1)
    whole = first == wanted.since + 1 or wanted.since >= state.last_seq
    last = state.last_seq if wanted.until is None else min(wanted.until, state.last_seq)
    for seq in range(first, last + 1):
        entry = state.history.get(seq)
        if entry is None:
            whole = False
        elif not isinstance(entry, FinishedOperation) and _matches(entry, wanted):
            found.append(entry)
            if len(found) == wanted.limit:
                break
    return found, whole


def _newest_in_state(state: ClusterState, wanted: EntryFilter) -> tuple[list[Entry], int]:
    """Return the newest matching entries that are in memory, ``limit`` at most, oldest first.

    Also tells the ``seq`` above which nothing is missing among them.
    """
    found: list[Entry] = []
    seq = state.last_seq if wanted.until is None else min(wanted.until, state.last_seq)
    while seq > wanted.since and len(found) < wanted.limit:
        entry = state.history.get(seq)
        if entry is None:
            break
        if not isinstance(entry, FinishedOperation) and _matches(entry, wanted):
            found.append(entry)
        seq -= 1
    return found[::-1], seq


def _matches(entry: Entry, wanted: EntryFilter) -> bool:
    if isinstance(entry, Event):
        entry_type, kind = EntryType.EVENT, entry.kind
    else:
        entry_type, kind = EntryType.AUDIT, entry.action
    return (
        entry_type is wanted.type
        and entry.tenant == wanted.tenant
        and (not wanted.objects or entry.object in wanted.objects)
        and kind_matches(kind, wanted.kinds)
    )
