"""A model of an etcd cluster's state, exact where the client can tell the difference.

Owns what the members agree on: keys with their versions, the history that watches read, leases on
the loop's clock, compaction, the quota. ``ModelMember`` (model_member.py) is one member of it as a
client meets it. The simulation and the simulated demo run on it, and it passes the same contract
tests as real etcd. It never waits, and draws nothing at random.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from controlplane.store.etcd_rpc import (
    TXN_OPS_MAX,
    Compare,
    DeleteOp,
    Event,
    Header,
    Op,
    PutOp,
    RangeOp,
    Target,
    Txn,
)
from controlplane.store.port import STORE_IS_FULL, KeyValue
from shared.errors import (
    ChangeTooLarge,
    Compacted,
    NotFound,
    StoreError,
    StoreFull,
)

REQUEST_BYTES_MAX = 3 * 2**19
# What an operation costs in a request beside its key and value; roughly protobuf's framing.
OP_BYTES = 16
# etcd raises a shorter time to live to one and a half election time-outs, in whole seconds.
LEASE_TTL_MIN_S = 2


class Watcher(Protocol):
    """A watch stream, as the cluster's state knows it."""

    def wake(self) -> None:
        """Look whether there is something to send."""
        ...

    def catch_up(self) -> None:
        """Move past revisions that hold nothing for this watch, before they are compacted."""
        ...


class _Version(Struct, frozen=True):
    """One version of a key; ``kv`` is None for a deletion."""

    revision: int
    number: int
    kv: KeyValue | None


class _Lease:
    def __init__(self, ttl_s: int) -> None:
        self.ttl_s = ttl_s
        self.keys: dict[str, None] = {}
        self.expiry: asyncio.TimerHandle | None = None


class ModelEtcd:
    """The state that all members share; ``quota_bytes`` 0 is no quota."""

    def __init__(self, cluster_id: int = 0x6D6F64656C, quota_bytes: int = 0) -> None:
        self.cluster_id = cluster_id
        self.quota_bytes = quota_bytes
        self.revision = 1
        self.compact_revision = 0
        self.raft_term = 2
        self.leader_id = 1
        self.full = False
        self._keys: list[str] = []
        self._versions: dict[str, list[_Version]] = {}
        self._history: list[tuple[Event, ...]] = []
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._bytes = 0
        # How large each member's file is: as its data once was, until it is defragmented.
        self._files: dict[int, int] = {}
        self._watches: list[Watcher] = []
        self._requests: list[asyncio.Task[object]] = []

    def header(self, member_id: int, revision: int = 0) -> Header:
        return Header(self.cluster_id, member_id, revision or self.revision, self.raft_term)

    @property
    def in_use_bytes(self) -> int:
        return self._bytes

    @property
    def size_bytes(self) -> int:
        """Return the size of the largest member, which is the first to be full."""
        return max(self._files.values(), default=self._bytes)

    def has_member(self, member_id: int) -> None:
        self._files.setdefault(member_id, self._bytes)

    def file_bytes(self, member_id: int) -> int:
        return self._files[member_id]

    def defragment(self, member_id: int) -> None:
        self._files[member_id] = self._bytes

    def range(self, op: RangeOp, newest: int) -> tuple[tuple[KeyValue, ...], bool, int]:
        """Return the keys as of ``op.revision``, or of ``newest``; whether more follow, and how
        many there are in all.
        """
        if op.revision > newest:
            raise StoreError("required revision is a future revision")
        revision = op.revision or newest
        if op.revision and op.revision < self.compact_revision:
            raise Compacted(op.revision + 1)
        there: list[KeyValue] = []
        for key in self._keys_in(op.key, op.range_end):
            version = self._version_at(key, revision)
            if version is not None and version.kv is not None:
                there.append(version.kv)
        wanted = [kv for kv in there if kv.mod_revision >= op.mod_revision_min]
        found = wanted[: op.limit] if op.limit else wanted
        if op.keys_only:
            found = [replace(kv, value=b"") for kv in found]
        return tuple(found), len(found) < len(wanted), len(there)

    def txn(self, txn: Txn) -> tuple[bool, tuple[tuple[KeyValue, ...], ...]]:
        """Execute all or nothing; return which branch, and the results of its reads.

        What uses the quota up is executed and told to be refused, as etcd does where its size (it
        measures every 100 ms) let the request pass.
        """
        _check_txn(txn)
        fills_up = self._fills_up(txn)
        succeeded = all(self._holds(compare) for compare in txn.compares)
        branch = txn.success if succeeded else txn.failure
        for op in branch:
            if isinstance(op, PutOp) and op.lease and op.lease not in self._leases:
                raise NotFound("the lease is gone")
        done = self._apply(branch)
        if fills_up:
            self.full = True
            raise StoreFull(STORE_IS_FULL)
        return succeeded, done

    def compact(self, revision: int) -> None:
        if revision <= self.compact_revision:
            raise Compacted(self.compact_revision)
        if revision > self.revision:
            raise StoreError("required revision is a future revision")
        for watch in self._watches:
            watch.catch_up()
        # The events of the compacted revision itself can still be watched.
        del self._history[: max(revision - self._first_revision(), 0)]
        self.compact_revision = revision
        for key in list(self._keys):
            self._forget_versions(key, revision)
        self._wake()

    def grant(self, ttl_s: int) -> tuple[int, int]:
        if self.full:
            raise StoreFull(STORE_IS_FULL)
        self._last_lease += 1
        lease = _Lease(max(ttl_s, LEASE_TTL_MIN_S))
        self._leases[self._last_lease] = lease
        self._renew(self._last_lease, lease)
        return self._last_lease, lease.ttl_s

    def keep_alive(self, lease_id: int) -> int:
        """Return the time to live, 0 for a lease that is gone."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0
        self._renew(lease_id, lease)
        return lease.ttl_s

    def revoke(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            raise NotFound("the lease is gone")
        if lease.expiry is not None:
            lease.expiry.cancel()
        self._apply([DeleteOp(key) for key in sorted(lease.keys)])

    def change_leader(self, member_id: int) -> None:
        """Elect a member: a new raft term, and every lease starts its time anew."""
        self.raft_term += 1
        self.leader_id = member_id
        for lease_id, lease in self._leases.items():
            self._renew(lease_id, lease)

    def disarm(self) -> None:
        """Clear the quota alarm. A member whose file is as large as before raises it again."""
        self.full = False

    def events_from(self, revision: int) -> Sequence[tuple[Event, ...]]:
        """Return the events of each revision from one on that is not compacted."""
        return self._history[max(revision - self._first_revision(), 0) :]

    def attach(self, watch: Watcher) -> None:
        self._watches.append(watch)

    def detach(self, watch: Watcher) -> None:
        self._watches = [each for each in self._watches if each is not watch]

    def serve(self, task: asyncio.Task[object]) -> None:
        """Keep a request until it is done, whether or not its client still waits."""
        self._requests.append(task)
        task.add_done_callback(self._served)

    async def close(self) -> None:
        """Drop the requests under way and stop the leases' clocks."""
        requests = list(self._requests)
        for task in requests:
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        for lease in self._leases.values():
            if lease.expiry is not None:
                lease.expiry.cancel()

    def _served(self, task: asyncio.Task[object]) -> None:
        self._requests.remove(task)
        if not task.cancelled():
            task.exception()  # its client may be gone: nobody else looks at it

    def _first_revision(self) -> int:
        """Return the revision of the oldest events kept, the next one when there are none."""
        return self.revision - len(self._history) + 1

    def _keys_in(self, key: str, range_end: str) -> list[str]:
        if not range_end:
            return [key] if key in self._versions else []
        return self._keys[bisect_left(self._keys, key) : bisect_left(self._keys, range_end)]

    def _version_at(self, key: str, revision: int) -> _Version | None:
        for version in reversed(self._versions.get(key, ())):
            if version.revision <= revision:
                return version
        return None

    def _holds(self, compare: Compare) -> bool:
        version = self._version_at(compare.key, self.revision)
        if version is None or version.kv is None:
            return compare.value == 0
        actual = {
            Target.VERSION: version.number,
            Target.CREATE_REVISION: version.kv.create_revision,
            Target.MOD_REVISION: version.kv.mod_revision,
        }
        return actual[compare.target] == compare.value

    def _fills_up(self, txn: Txn) -> bool:
        """Whether a transaction uses the quota up. Raises StoreFull for what adds data after that.

        So it stays until the alarm is disarmed.
        """
        puts = [op for op in (*txn.success, *txn.failure) if isinstance(op, PutOp)]
        if puts and self.full:
            raise StoreFull(STORE_IS_FULL)
        quota = self.quota_bytes
        return bool(puts and quota) and self.size_bytes + _bytes_of(puts) > quota

    def _apply(self, branch: Sequence[Op]) -> tuple[tuple[KeyValue, ...], ...]:
        """Execute operations at the next revision, which is used only if something changes."""
        revision = self.revision + 1
        events: list[Event] = []
        reads: list[tuple[KeyValue, ...]] = []
        for op in branch:
            if isinstance(op, PutOp):
                events.append(self._put(op, revision))
            elif isinstance(op, DeleteOp):
                events += self._delete(op, revision)
            else:
                reads.append(self.range(op, revision)[0])
        if events:
            self.revision = revision
            self._history.append(tuple(events))
            self._wake()
        return tuple(reads)

    def _put(self, op: PutOp, revision: int) -> Event:
        old = self._version_at(op.key, revision)
        created, number = revision, 1
        if old is not None and old.kv is not None:
            created, number = old.kv.create_revision, old.number + 1
            self._unlease(old.kv)
        kv = KeyValue(op.key, op.value, created, revision, op.lease, number)
        if op.lease:
            self._leases[op.lease].keys[op.key] = None
        self._remember(op.key, _Version(revision, number, kv))
        return Event(kv, deleted=False)

    def _delete(self, op: DeleteOp, revision: int) -> list[Event]:
        events: list[Event] = []
        for key in self._keys_in(op.key, op.range_end):
            old = self._version_at(key, revision)
            if old is None or old.kv is None:
                continue
            self._unlease(old.kv)
            self._remember(key, _Version(revision, 0, None))
            events.append(Event(KeyValue(key, b"", 0, revision), deleted=True))
        return events

    def _unlease(self, kv: KeyValue) -> None:
        lease = self._leases.get(kv.lease)
        if lease is not None:
            lease.keys.pop(kv.key, None)

    def _remember(self, key: str, version: _Version) -> None:
        if key not in self._versions:
            insort(self._keys, key)
        self._versions.setdefault(key, []).append(version)
        self._bytes += _version_bytes(key, version)
        for member_id, size in self._files.items():
            self._files[member_id] = max(size, self._bytes)

    def _forget_versions(self, key: str, revision: int) -> None:
        """Keep the newest version at ``revision``, unless it is a deletion, and all later ones."""
        versions = self._versions[key]
        kept = [version for version in versions if version.revision > revision]
        at = self._version_at(key, revision)
        if at is not None and at.kv is not None:
            kept.insert(0, at)
        self._bytes -= sum(_version_bytes(key, each) for each in versions)
        self._bytes += sum(_version_bytes(key, each) for each in kept)
        if kept:
            self._versions[key] = kept
        else:
            del self._versions[key]
            del self._keys[bisect_left(self._keys, key)]

    def _renew(self, lease_id: int, lease: _Lease) -> None:
        if lease.expiry is not None:
            lease.expiry.cancel()
        loop = asyncio.get_running_loop()
        lease.expiry = loop.call_later(lease.ttl_s, self.revoke, lease_id)

    def _wake(self) -> None:
        for watch in self._watches:
            watch.wake()


def _check_txn(txn: Txn) -> None:
    counts = (len(txn.compares), len(txn.success), len(txn.failure))
    if max(counts) > TXN_OPS_MAX:
        raise ChangeTooLarge("etcd refused the transaction: too many operations in txn request")
    if _bytes_of((*txn.success, *txn.failure)) > REQUEST_BYTES_MAX:
        raise ChangeTooLarge("etcd refused the transaction: request is too large")
    for branch in (txn.success, txn.failure):
        puts = [op.key for op in branch if isinstance(op, PutOp)]
        deletes = [op for op in branch if isinstance(op, DeleteOp)]
        overlap = any(_deletes(delete, key) for delete in deletes for key in puts)
        if overlap or len(set(puts)) < len(puts):
            raise StoreError("etcd refused the transaction: duplicate key given in txn request")


def _deletes(op: DeleteOp, key: str) -> bool:
    return op.key <= key < op.range_end if op.range_end else op.key == key


def _bytes_of(ops: Sequence[Op]) -> int:
    return sum(
        OP_BYTES + len(op.key.encode()) + (len(op.value) if isinstance(op, PutOp) else 0)
        for op in ops
    )


def _version_bytes(key: str, version: _Version) -> int:
    return OP_BYTES + len(key.encode()) + (len(version.kv.value) if version.kv else 0)
