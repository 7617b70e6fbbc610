"""What a replica has to read from etcd for its memory to be whole.

Nothing is read twice: a key has no two values at one revision, so that keys and revisions say what
memory lacks. Watches of etcd have lost revisions without a word (etcd issues 15271, 17529, 18089
and 19179), so that a new leader must not take its memory for whole unasked; but to list the keys of
50,000 VMs takes a second on a busy machine, in which nobody leads. Three ways, from the cheapest:

- Each commit writes the applier's mark once, and etcd counts a key's writes. Where the watch has
  brought every number up to the mark as it is now, it has brought every commit.
- Once memory was compared with everything, only what has changed since is listed, and the rest is
  counted. A key that is there, has not changed since and is not in memory cannot be; what memory
  has too much of makes the numbers differ.
- Everything is compared.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Set

from msgspec import Struct

from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.port import KeyValue, Listing, Store
from shared.codec import unpack
from shared.errors import RecordUnreadable
from shared.model import Cluster

log = logging.getLogger(__name__)

# Up to so many keys are read one by one, at a millisecond each; more are listed with all others.
READ_SINGLY_MAX = 200
# Revisions compared before others get their turn: about 10 ms.
COMPARED_AT_ONCE = 5000


class Missing(Struct, frozen=True):
    """What memory has to take to be as etcd is at a revision.

    ``marks`` is how often the mark had been written by then, and ``committed`` the revision of the
    last commit, or of what was written past the leader after it; 0 where there was none. ``listed``
    are all keys that there are; None where memory is known to have none besides.
    """

    revision: int
    committed: int
    marks: int
    items: tuple[KeyValue, ...]
    listed: frozenset[str] | None = None


class Reading:
    """Reads for one memory; ``unreadable`` are the keys that it has set aside.

    ``whole_at``: the revision at which memory was last compared with everything, 0 before that.
    """

    def __init__(self, store: Store, state: ClusterState, unreadable: Set[str]) -> None:
        self._store = store
        self._state = state
        self._unreadable = unreadable
        self.whole_at = 0

    async def at_takeover(self, revision_min: int, marks_seen: int | None) -> Missing:
        """Return what a new leader's memory lacks; ``revision_min`` is its term's.

        ``marks_seen``: up to which write of the mark it has every one; None when it does not know.
        """
        found: Missing | None = None
        if marks_seen is not None:
            found = await self._proven(revision_min, marks_seen)
        if found is None and self.whole_at:
            found = await self._changed(revision_min)
        return found or await self.everything(revision_min)

    async def everything(self, revision_min: int) -> Missing:
        """Compare with all keys that there are; memory may be of any moment."""
        listing = await self._store.list(keys.ROOT, revision_min=revision_min, keys_only=True)
        if not await self._began_anew(listing.revision):
            wanted: list[str] = []
            for start in range(0, len(listing.items), COMPARED_AT_ONCE):
                part = listing.items[start : start + COMPARED_AT_ONCE]
                wanted += [item.key for item in part if self._differs(item)]
                await asyncio.sleep(0)
            if len(wanted) <= READ_SINGLY_MAX:
                items = await self._read(wanted, listing.revision)
                return _all_of(listing, items)
        listing = await self._store.list(keys.ROOT, revision_min=listing.revision)
        is_new = await self._began_anew(listing.revision)
        items = tuple(item for item in listing.items if is_new or self._differs(item))
        return _all_of(listing, items)

    async def _began_anew(self, revision: int) -> bool:
        """Whether memory is of an earlier epoch: its revisions say nothing about this etcd's.

        So it is in a replica that could not reach etcd, and was not stopped, during a restore.
        """
        known = self._state.cluster()
        if known is None:
            return False
        found = await self._store.get(keys.CLUSTER, revision=revision)
        if found is not None and unpack(found.value, Cluster).epoch == known.epoch:
            return False
        log.warning("etcd was restored from a backup: all that it holds is read again")
        return True

    async def _proven(self, revision_min: int, marks_seen: int) -> Missing | None:
        """Return the replicas alone; None unless every commit has been seen."""
        replicas = await self._store.list(keys.REPLICAS, revision_min=revision_min)
        revision = replicas.revision
        (committed, marks), is_new = await asyncio.gather(
            self._mark(revision), self._began_anew(revision)
        )
        if is_new or marks != marks_seen:
            return None
        return Missing(revision, committed, marks, replicas.items)

    async def _changed(self, revision_min: int) -> Missing | None:
        """Return what has changed since memory was whole; None when that does not add up."""
        revision, wanted = 0, list[str]()
        # Only a leader writes there, and while one takes over nobody does: one after the other is
        # as if at one moment.
        for prefix in keys.COMMITTED:
            listing = await self._list_changed(prefix, revision_min, keys_only=True)
            new = sum(not self._has(item) for item in listing.items)
            if listing.count != self._held(prefix) + new:
                return None
            wanted += [item.key for item in listing.items if self._differs(item)]
            revision = revision or listing.revision
        if await self._began_anew(revision):
            return None
        replicas = await self._store.list(keys.REPLICAS, revision_min=revision)
        if len(wanted) <= READ_SINGLY_MAX:
            items = await self._read(wanted, revision)
        else:
            lists = [
                await self._list_changed(prefix, revision, keys_only=False)
                for prefix in keys.COMMITTED
            ]
            items = tuple(item for each in lists for item in each.items if self._differs(item))
        return Missing(revision, *await self._mark(revision), (*replicas.items, *items))

    async def _mark(self, revision: int) -> tuple[int, int]:
        """Return when the mark had been written last by a revision, and how often."""
        mark = await self._store.get(keys.MARK, revision=revision)
        return (0, 0) if mark is None else (mark.mod_revision, mark.version)

    async def _list_changed(self, prefix: str, revision_min: int, *, keys_only: bool) -> Listing:
        return await self._store.list(
            prefix,
            revision_min=revision_min,
            keys_only=keys_only,
            changed_from=self.whole_at + 1,
        )

    async def _read(self, wanted: Iterable[str], revision: int) -> tuple[KeyValue, ...]:
        found = [await self._store.get(key, revision=revision) for key in wanted]
        return tuple(each for each in found if each is not None)

    def _held(self, prefix: str) -> int:
        """Return how many keys below a prefix memory has, or has set aside."""
        aside = sum(key.startswith(prefix) for key in self._unreadable)
        if prefix == keys.HISTORY:
            return len(self._state.history) + aside
        return sum(map(self._state.count, keys.kinds_below(prefix))) + aside

    def _has(self, item: KeyValue) -> bool:
        if item.key in self._unreadable:
            return True
        try:
            return known_revision(self._state, item) != 0
        except RecordUnreadable:
            return False

    def _differs(self, item: KeyValue) -> bool:
        """Whether memory lacks a key, or has it at another revision."""
        if item.key.startswith(keys.REPLICAS) or item.key in self._unreadable:
            return True
        try:
            return known_revision(self._state, item) != item.mod_revision
        except RecordUnreadable:
            return True  # not a key of this release: it is looked at, and set aside


def known_revision(state: ClusterState, item: KeyValue) -> int:
    """Return at which revision memory has a key, 0 when it is not there.

    For keys that memory does not keep, or not with their revision, that is the one of the item.
    Raises RecordUnreadable for a key that is not of this release.
    """
    if item.key.startswith(keys.HISTORY):
        # Entries never change, and are only kept by their number.
        return item.mod_revision if keys.history_seq(item.key) in state.history else 0
    if not keys.holds_record(item.key):
        return item.mod_revision
    if item.key == keys.CLUSTER:
        return next((stored.revision for stored in state.clusters.values()), 0)
    stored = state.get(*keys.record_of(item.key))
    return 0 if stored is None else stored.revision


def _all_of(listing: Listing, items: tuple[KeyValue, ...]) -> Missing:
    """Return what memory lacks of a listing of everything."""
    committed = (each.mod_revision for each in listing.items if keys.is_committed(each.key))
    return Missing(
        revision=listing.revision,
        committed=max(committed, default=0),
        marks=next((each.version for each in listing.items if each.key == keys.MARK), 0),
        items=items,
        listed=frozenset(each.key for each in listing.items),
    )
