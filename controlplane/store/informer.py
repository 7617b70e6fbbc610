"""A replica's memory of the cluster: listed once, then advanced by the watch.

While another replica leads, the watch is what advances the state. While this one leads, its own
commits do, and the watch only audits: every key must come back exactly as it was committed. After
a compaction everything is listed again and compared, so that readers never see a gap. What a
comparison with etcd finds although the watch looked healthy, a follower lists again. A leader's
memory is the truth: a difference there is a write of somebody who does not hold the term, or a
defect; it is counted and told, and only a person can say which it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from msgspec import Struct

from controlplane.state import Changes, ClusterState
from controlplane.store import keys
from controlplane.store.port import KeyValue, Store, WatchBatch
from controlplane.store.reading import Missing, Reading
from shared.codec import unpack
from shared.errors import Compacted, NovacronError, RecordUnreadable
from shared.model import HistoryEntry, Record, Replica

log = logging.getLogger(__name__)

# The store's own client has tried every member before it gives up.
RETRY_S = 1.0
# Records decoded and indexed before others get their turn: about 15 ms.
TAKEN_AT_ONCE = 500
# So many differences are told one by one; the rest is told as a number.
DIFFERENCES_TOLD_MAX = 20


class Difference(Struct, frozen=True, order=True):
    """A key at the revision that etcd has it at, and memory; 0 where it is not."""

    key: str
    listed: int
    known: int


class Informer:
    """``mismatches`` counts what memory was found to have otherwise than etcd.

    Each is also told to ``on_mismatch``, with how many there were at once.
    """

    def __init__(
        self,
        store: Store,
        state: ClusterState,
        on_mismatch: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._store = store
        self._state = state
        self._on_mismatch = on_mismatch
        self._auditing = False
        self._must_list = False
        self.leader_key = Changes()
        self.mismatches = 0
        self.unreadable: set[str] = set()
        # Up to which write of the mark memory has every one; None when it may lack some.
        self._marks_seen: int | None = None
        self._reading = Reading(store, state, self.unreadable)
        self.replicas: dict[str, Replica] = {}

    def audit_only(self) -> None:
        """Stop advancing the state: from now on the leader's commits do."""
        self._auditing = True
        self._must_list = False

    def follow_again(self) -> None:
        """Advance the state by the watch again, from a fresh listing: memory may be ahead."""
        self._auditing = False
        self._must_list = True
        self._marks_seen = None

    def note_whole(self, revision: int) -> None:
        """Take note that memory was found to have all that etcd had at a revision."""
        self._reading.whole_at = revision

    def note_differences(self, found: frozenset[Difference]) -> None:
        """Count and tell what a comparison found; a follower makes it good."""
        if not found:
            return
        whose = "the leader's" if self._auditing else "this follower's"
        for each in sorted(found)[:DIFFERENCES_TOLD_MAX]:
            log.error(
                "%s is at %d in etcd and at %d in %s memory (0: not there)",
                *(each.key, each.listed, each.known, whose),
            )
        log.error("%d keys differ between etcd and %s memory", len(found), whose)
        self._count(len(found))
        self._must_list = not self._auditing

    async def load(self, revision_min: int) -> None:
        """Make the state what etcd lists at a revision not below ``revision_min``.

        Once memory was whole, this is only for a replica that takes over. A first listing of many
        records is taken in steps, which leave the event loop to others in between: nobody reads
        before it is whole (``ClusterState.revision``). Later ones are taken at once, since somebody
        may.
        """
        is_first = self._state.revision == 0
        changes = await self._reading.at_takeover(revision_min, self._marks_seen)
        for start in range(0, len(changes.items), TAKEN_AT_ONCE):
            if start and is_first:
                await asyncio.sleep(0)
            for item in changes.items[start : start + TAKEN_AT_ONCE]:
                self._take_item(item)
        self._take_rest(changes)

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Follow the watch for ever."""
        await self._load_at_last()
        on_ready()
        next_revision = self._reading.whole_at + 1
        while True:
            try:
                if self._must_list and await self._list_again():
                    next_revision = self._reading.whole_at + 1
                next_revision = await self._follow(next_revision)
            except Compacted as compacted:
                log.warning("the watch fell behind a compaction: %s", compacted)
                self._must_list = not self._auditing
                next_revision = compacted.compact_revision
            except NovacronError as error:
                log.warning("the store cannot be followed: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _load_at_last(self) -> None:
        """List for the first time, however long the store is away."""
        while True:
            try:
                await self.load(0)
                return
            except NovacronError as error:
                log.warning("the store cannot be listed: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _list_again(self) -> bool:
        """Make the state a fresh listing; return whether it was taken.

        While the listing is under way this replica may have begun to lead: its memory is then the
        truth, and what was listed is older than it.
        """
        changes = await self._reading.everything(0)
        if self._auditing or changes.revision < self._state.revision:
            return False
        self._must_list = False
        for item in changes.items:
            self._take_item(item)
        self._take_rest(changes)
        return True

    async def _follow(self, next_revision: int) -> int:
        """Take batches until a listing is due; return the revision to go on from."""
        batches = self._store.watch(keys.ROOT, next_revision)
        try:
            async for batch in batches:
                if self._must_list or self._lacks_commits(batch):
                    break
                self._take_batch(batch)
                next_revision = batch.revision + 1
        finally:
            await batches.aclose()
        return next_revision

    def _take_rest(self, missing: Missing) -> None:
        """Drop what is not there any more; what is there has been taken."""
        if missing.listed is not None:
            self._drop_unlisted(missing.listed)
        registered = {item.key for item in missing.items if item.key.startswith(keys.REPLICAS)}
        for name in list(self.replicas):
            if keys.replica_key(name) not in registered:
                del self.replicas[name]
        self._reading.whole_at, self._marks_seen = missing.revision, missing.marks
        self._state.advanced(missing.committed or missing.revision)

    def _drop_unlisted(self, listed: frozenset[str]) -> None:
        # What is listed and can be read is in memory by now: when that is all, nothing is over.
        readable = listed - self.unreadable
        if sum(map(keys.holds_record, readable)) != self._state.record_count():
            for kind, record_id in list(self._state.record_ids()):
                if keys.key_of(kind, record_id) not in listed:
                    self._state.remove(kind, record_id)
        for seq in list(self._state.history):
            if keys.history_key(seq) not in listed:
                self._state.remove_history(seq)
        self.unreadable &= listed

    def _lacks_commits(self, batch: WatchBatch) -> bool:
        """Tell whether the watch has left out commits before this one: each writes the mark once.

        Then everything is listed, before readers are shown what lacks them.
        """
        mark = next((item for item in batch.puts if item.key == keys.MARK), None)
        if mark is None or self._auditing or self._marks_seen is None:
            return False
        if mark.version == self._marks_seen + 1:
            self._marks_seen = mark.version
            return False
        log.error("the watch has left out commits before revision %d", batch.revision)
        self._count(1)
        self._must_list, self._marks_seen = True, None
        return True

    def _take_batch(self, batch: WatchBatch) -> None:
        if keys.LEADER in batch.deletes or any(item.key == keys.LEADER for item in batch.puts):
            self.leader_key.notify()
        for item in batch.puts:
            if item.key.startswith(keys.REPLICAS):
                self._take_item(item)
            elif self._auditing:
                self._audit(item)
            else:
                self._take_item(item)
        for key in batch.deletes:
            if key.startswith(keys.REPLICAS):
                self.replicas.pop(key.removeprefix(keys.REPLICAS), None)
            elif not self._auditing:
                self._take_deletion(key)
        # Who leads, and who is registered, is written past the leader: its memory does not come to
        # such revisions, and a client that has seen one here would wait for them there.
        written = (*(item.key for item in batch.puts), *batch.deletes)
        if not self._auditing and any(map(keys.is_committed, written)):
            self._state.advanced(batch.revision)

    def _take_item(self, item: KeyValue) -> bool:
        """Take one key; a record that does not decode is set aside, and stops nothing."""
        try:
            if item.key.startswith(keys.HISTORY):
                keys.history_seq(item.key)
                self._state.put_history(unpack(item.value, HistoryEntry))  # type: ignore[arg-type]
            elif keys.holds_record(item.key):
                record: Record = unpack(item.value, keys.record_kind(item.key))
                self._state.put(record, item.mod_revision)
            elif item.key.startswith(keys.REPLICAS):
                self.replicas[item.key.removeprefix(keys.REPLICAS)] = unpack(item.value, Replica)
        except RecordUnreadable as error:
            self.unreadable.add(item.key)
            log.error("%s is set aside: %s", item.key, error)
            return False
        self.unreadable.discard(item.key)
        return True

    def _take_deletion(self, key: str) -> None:
        self.unreadable.discard(key)
        try:
            if key.startswith(keys.HISTORY):
                self._state.remove_history(keys.history_seq(key))
            elif keys.holds_record(key):
                kind, record_id = keys.record_of(key)
                self._state.remove(kind, record_id)
        except RecordUnreadable:
            return  # a key that a newer release wrote and now deletes: it was never taken

    def _audit(self, item: KeyValue) -> None:
        """Compare what the watch shows with the leader's memory, where that is not newer."""
        if not keys.holds_record(item.key):
            return
        try:
            kind, record_id = keys.record_of(item.key)
        except RecordUnreadable:
            return  # not a key of this release: it is in nobody's memory
        known = self._state.get(kind, record_id)
        if item.mod_revision > self._state.revision:
            return  # our own commit whose answer is still on its way
        if known is None or known.revision >= item.mod_revision:
            return
        log.error("%s at %d is not in the leader's memory", item.key, item.mod_revision)
        self._count(1)

    def _count(self, mismatches: int) -> None:
        self.mismatches += mismatches
        self._on_mismatch(mismatches)
