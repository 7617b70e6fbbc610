"""Compares a replica's memory with what etcd lists, now and then, although its watch looks healthy.

Watches of etcd 3.4 have lost events without a word (etcd issues 15271, 17529, 18089 and 19179).
What differs in two looks some seconds apart is not on its way: nothing will bring it. The informer
is told, and does what there is to do.

Keys and revisions are compared, no values: no key has two values at one revision.
"""

from __future__ import annotations

import asyncio
import logging

from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.informer import Difference, Informer
from controlplane.store.port import KeyValue, Listing, Store
from controlplane.store.reading import COMPARED_AT_ONCE, known_revision
from shared.errors import NovacronError, RecordUnreadable

log = logging.getLogger(__name__)

# A listing of the keys of 50,000 VMs takes half a second of one etcd member.
PERIOD_S = 600.0
# The watch brings a change within milliseconds, and moves to another member within 2 to 3 s.
SETTLE_S = 5.0


class Comparison:
    def __init__(
        self, store: Store, state: ClusterState, informer: Informer, period_s: float = PERIOD_S
    ) -> None:
        self._period_s = period_s
        self._store = store
        self._state = state
        self._informer = informer

    async def run(self) -> None:
        """Compare once in a period, for ever; the first time when one has passed."""
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self.compare()
            except NovacronError as error:
                log.warning("memory was not compared with the store: %s", error)

    async def compare(self) -> None:
        """Tell the informer what differs in two looks. Raises what listing raises."""
        found = await self._differences()
        if found:
            await asyncio.sleep(SETTLE_S)
            found &= await self._differences()
        self._informer.note_differences(found)

    async def _differences(self) -> frozenset[Difference]:
        """Return what memory has not, or has of before, or has no longer to have.

        When there is nothing the informer is told at which revision.
        """
        listing = await self._store.list(keys.ROOT, keys_only=True)
        found: set[Difference] = set()
        for start in range(0, len(listing.items), COMPARED_AT_ONCE):
            for item in listing.items[start : start + COMPARED_AT_ONCE]:
                known = self._known(item)
                if known < item.mod_revision:
                    found.add(Difference(item.key, item.mod_revision, known))
            await asyncio.sleep(0)
        found |= self._unlisted(listing)
        if not found:
            self._informer.note_whole(listing.revision)
        return frozenset(found)

    def _known(self, item: KeyValue) -> int:
        """Return at which revision memory has a key; of what it cannot have, the one listed."""
        if item.key in self._informer.unreadable:
            return item.mod_revision
        try:
            return known_revision(self._state, item)
        except RecordUnreadable:
            return item.mod_revision

    def _unlisted(self, listing: Listing) -> set[Difference]:
        """Return what memory has of before the listing, which has it no more."""
        listed = {item.key for item in listing.items}
        found: set[Difference] = set()
        for kind, record_id in self._state.record_ids():
            key = keys.key_of(kind, record_id)
            stored = self._state.get(kind, record_id)
            if key not in listed and stored is not None and stored.revision <= listing.revision:
                found.add(Difference(key, 0, stored.revision))
        for seq in self._state.history:
            if keys.history_key(seq) not in listed:
                found.add(Difference(keys.history_key(seq), 0, seq))
        return found
