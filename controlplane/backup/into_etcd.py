"""Writes a restoration into etcd: all of it, or nothing that anybody would lead.

While it writes it holds the leader key, without a lease: no replica can lead meanwhile, of whatever
release, and none after a restore that was cut off. Every write is fenced by it, and by a mark that
tells two restores apart. One that was cut off is simply run again: it begins anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from datetime import datetime

from msgspec import Struct

from controlplane.backup.format import Header
from controlplane.backup.restoration import Restoration
from controlplane.store import keys
from controlplane.store.port import (
    Committed,
    Delete,
    Fence,
    KeyValue,
    Listing,
    NotCommitted,
    Put,
    Store,
    Write,
)
from shared.codec import pack, unpack
from shared.errors import (
    FieldError,
    LeadershipLost,
    OutcomeUnknown,
    RecordUnreadable,
    StoreError,
    StoreUnavailable,
)
from shared.model import SCHEMA_LEVEL, Applied, Cluster, LeaderKey

# No replica is called so: their names have no spaces.
RESTORING = "an unfinished restore"
NO_LEASE = 0
# One transaction of etcd's holds 128 operations and 1.5 MiB.
WRITES_MAX = 120
WRITE_BYTES_MAX = 1024 * 1024
# An election of etcd takes 1 to 2 s; the store's own client has tried for 3 s each time.
ATTEMPTS = 10
RETRY_S = 1.0


class Present(Struct, frozen=True, kw_only=True):
    """What etcd holds before a restore. ``cut_off``: the remains of another restore."""

    leader: str | None = None
    cut_off: bool = False
    replicas: tuple[str, ...] = ()
    cluster: Cluster | None = None
    keys: int = 0

    @property
    def is_empty(self) -> bool:
        return self.keys == 0


async def look(store: Store) -> Present:
    """Return what is in etcd now."""
    listing = await store.list(keys.ROOT)
    found = {item.key: item for item in listing.items}
    holder = _holder(found.get(keys.LEADER))
    own = [key for key in found if key != keys.LEADER and not key.startswith(keys.REPLICAS)]
    return Present(
        leader=None if holder is None else holder.replica,
        cut_off=holder is not None and holder.replica == RESTORING,
        replicas=tuple(
            key.removeprefix(keys.REPLICAS) for key in found if key.startswith(keys.REPLICAS)
        ),
        cluster=_cluster(found.get(keys.CLUSTER)),
        keys=len(own),
    )


def refusals(
    header: Header | None, present: Present, own: Cluster, now: datetime, *, replace: bool
) -> Iterator[FieldError]:
    """Yield all that stands against restoring a backup; ``own`` is the cell of this machine.

    Without a header the backup is damaged, and the rest is told all the same.
    """
    if header is not None:
        yield from _misfits(header, own, now)
    if present.leader is not None and not present.cut_off:
        message = f"replica {present.leader} leads: stop every replica first"
        yield FieldError("/etcd/leader", "leads", message)
    for name in present.replicas:
        message = "runs, or ended less than 15 s ago: stop every replica first"
        yield FieldError(f"/etcd/replicas/{name}", "runs", message)
    if not present.is_empty and not present.cut_off and not replace:
        what = "no cluster's" if present.cluster is None else f"cell {present.cluster.cell}'s"
        message = f"has {present.keys} keys already, {what}: --replace deletes them"
        yield FieldError("/etcd", "not_empty", message)


def _misfits(header: Header, own: Cluster, now: datetime) -> Iterator[FieldError]:
    """Yield why a backup is not for this cell, release or moment."""
    if (header.cell, header.cluster) != (own.cell, own.id):
        message = f"is a backup of cell {header.cell}, and this replica is of cell {own.cell}"
        yield FieldError("/file", "other_cell", message)
    if header.schema_level > SCHEMA_LEVEL:
        message = (
            f"was made by {header.release} at schema level {header.schema_level}; this release "
            f"knows levels up to {SCHEMA_LEVEL}"
        )
        yield FieldError("/file", "too_new", message)
    if now < header.made_at:
        message = f"this machine's clock shows {now:%Y-%m-%d %H:%M:%S}, which is before the backup"
        yield FieldError("/clock", "behind", message)


async def write(store: Store, restoration: Restoration, incarnation: str) -> None:
    """Make etcd hold the restoration and nothing else, and let replicas lead again.

    Raises LeadershipLost when something else has taken over, StoreError when what is read back is
    not what was written, and what the store raises: then run it again.
    """
    await _Writing(store, restoration, incarnation).run()


class _Writing:
    def __init__(self, store: Store, restoration: Restoration, incarnation: str) -> None:
        self._store = store
        self._restoration = restoration
        self._incarnation = incarnation
        self._leader_revision = 0
        self._mark_revision = 0
        self._commits = 0

    async def run(self) -> None:
        await self._hold()
        there = await self._store.list(keys.ROOT)
        # The cluster's record goes first and comes last: what is between is nobody's cluster.
        await self._commit([Delete(keys.CLUSTER)])
        await self._commit_all([Delete(item.key) for item in _records(there)])
        await self._commit_all(self._restoration.puts)
        await self._compare()
        await self._finish()

    async def _hold(self) -> None:
        """Take the leader key, or take it over from a restore that was cut off.

        It is never let go in between: a replica that waits for it would lead what is half there.
        """
        marker = LeaderKey(replica=RESTORING, incarnation=self._incarnation)
        leader = (await self._store.campaign(pack(marker), NO_LEASE)).leader
        holder = _holder(leader)
        if holder is None or holder.replica != RESTORING:
            raise LeadershipLost("a replica leads: stop every replica first")
        self._leader_revision = leader.create_revision
        mark = await self._store.get(keys.MARK)
        self._mark_revision = 0 if mark is None else mark.mod_revision

    async def _commit_all(self, writes: Sequence[Write]) -> None:
        for group in _groups(writes):
            await self._commit(group)

    async def _commit(self, writes: Sequence[Write], mark: Applied | None = None) -> None:
        """Write a group and the mark, until an answer says that they are there.

        The mark tells what became of an attempt whose answer was lost, as it does for the applier;
        and of two restores that hold the same key only the later one goes on.
        """
        self._commits += 1
        mark = mark or Applied(group=f"{self._incarnation}.{self._commits}", seq=0)
        group = [*writes, Put(keys.MARK, pack(mark))]
        for _ in range(ATTEMPTS):
            fence = Fence(self._leader_revision, self._mark_revision)
            try:
                outcome = await self._store.commit(fence, group)
            except (OutcomeUnknown, StoreUnavailable):
                await asyncio.sleep(RETRY_S)
                continue
            if isinstance(outcome, Committed):
                self._mark_revision = outcome.revision
            else:
                self._mark_revision = self._check_ours(outcome, mark)
            return
        raise StoreUnavailable("etcd does not answer: run the restore again")

    def _check_ours(self, outcome: NotCommitted, mark: Applied) -> int:
        """Return the mark's revision if an earlier attempt wrote it. Raises LeadershipLost."""
        if outcome.mark is None or outcome.mark.value != pack(mark):
            raise LeadershipLost("another restore has taken over: let it come to its end")
        return outcome.mark.mod_revision

    async def _compare(self) -> None:
        """Raise StoreError unless etcd holds what was written, and nothing else."""
        found = {item.key: item.value for item in _records(await self._store.list(keys.ROOT))}
        if found != {put.key: put.value for put in self._restoration.puts}:
            raise StoreError("etcd does not hold what was written: see whether its members agree")

    async def _finish(self) -> None:
        """Write the cluster's record and let go of the leader key, at once: now replicas may lead.

        One may have done so before the answer is here, and have written its own mark.
        """
        cluster = self._restoration.cluster
        last: list[Write] = [Put(keys.CLUSTER, pack(cluster)), Delete(keys.LEADER)]
        try:
            await self._commit(last, self._restoration.mark)
        except LeadershipLost:
            there = _cluster(await self._store.get(keys.CLUSTER))
            if there is None or there.epoch != cluster.epoch:
                raise


def _records(listing: Listing) -> list[KeyValue]:
    """Return all but what processes write of themselves, and what this one does."""
    own = (keys.LEADER, keys.MARK)
    return [
        item
        for item in listing.items
        if item.key not in own and not item.key.startswith(keys.REPLICAS)
    ]


def _groups(writes: Sequence[Write]) -> Iterator[list[Write]]:
    group: list[Write] = []
    size_bytes = 0
    for each in writes:
        each_bytes = len(each.key) + (len(each.value) if isinstance(each, Put) else 0)
        if group and (len(group) == WRITES_MAX or size_bytes + each_bytes > WRITE_BYTES_MAX):
            yield group
            group, size_bytes = [], 0
        group.append(each)
        size_bytes += each_bytes
    if group:
        yield group


def _holder(leader: KeyValue | None) -> LeaderKey | None:
    try:
        return None if leader is None else unpack(leader.value, LeaderKey)
    except RecordUnreadable:
        return LeaderKey(replica="?", incarnation="")


def _cluster(found: KeyValue | None) -> Cluster | None:
    try:
        return None if found is None else unpack(found.value, Cluster)
    except RecordUnreadable:
        return None
