"""The store on etcd: ``EtcdStore`` is the port ``Store`` over the members of one cluster.

Owns how each call of the port becomes etcd's: the fence as compares, listings in pages of one
revision. Every write is a transaction of its own; the only writes without the fence are the calls
that the port names. Which member is asked, and what is repeated, is for ``Members``.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import random
from collections.abc import AsyncGenerator, Sequence

from msgspec import structs

from controlplane.store import etcd_watch, keys
from controlplane.store.etcd_grpc import EtcdTls, GrpcMember
from controlplane.store.etcd_members import Effect, Limits, Members
from controlplane.store.etcd_rpc import (
    NO_SPACE,
    TXN_OPS_MAX,
    Compare,
    DeleteOp,
    MemberRpc,
    Op,
    PutOp,
    Ranged,
    RangeOp,
    Target,
    Txn,
    TxnDone,
    prefix_end,
)
from controlplane.store.port import (
    Campaign,
    Committed,
    Fence,
    KeyValue,
    Listing,
    MemberStatus,
    NotCommitted,
    Put,
    WatchBatch,
    Write,
)
from shared.errors import (
    ChangeTooLarge,
    Compacted,
    NotFound,
    NovacronError,
    OutcomeUnknown,
    StoreFull,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

# A page of 2,000 records is about 3 MB and 30 ms; one answer with all of them stalls the loop.
PAGE_KEYS = 2_000
# A listing whose revision is compacted under it starts again; compactions are minutes apart.
LISTINGS_MAX = 3
# Compacting 100,000 versions took 5 s.
COMPACT_S = 15.0
# What goes through a whole database: 193 MB took up to 3.2 s, so etcd's largest advisable one, of
# 8 GiB, takes 2.3 minutes.
DEFRAGMENT_S = 180.0


def connect(endpoints: Sequence[str], tls: EtcdTls | None) -> EtcdStore:
    """Return the store of the cluster at ``host:port`` endpoints; call it in a running loop."""
    members = [GrpcMember(endpoint, tls) for endpoint in endpoints]
    return EtcdStore(members, random.Random())


class EtcdStore:
    """The port ``Store`` on etcd; safe to share between tasks of one loop."""

    def __init__(
        self,
        members: Sequence[MemberRpc],
        rng: random.Random,
        limits: Limits | None = None,
        page_keys: int = PAGE_KEYS,
    ) -> None:
        self._limits = limits or Limits()
        self._members = Members(members, self._limits, rng)
        self._rng = rng
        self._page_keys = page_keys

    async def list(
        self, prefix: str, *, revision_min: int = 0, keys_only: bool = False, changed_from: int = 0
    ) -> Listing:
        wanted = RangeOp(
            prefix,
            prefix_end(prefix),
            self._page_keys,
            keys_only=keys_only,
            mod_revision_min=changed_from,
        )
        for _ in range(LISTINGS_MAX):
            try:
                return await self._list(wanted, revision_min)
            except Compacted as error:
                problem = error
        raise StoreUnavailable(f"{prefix} changes faster than it can be listed") from problem

    async def scan(self, prefix: str) -> AsyncGenerator[Listing]:
        wanted = RangeOp(prefix, prefix_end(prefix), self._page_keys)
        async for page in self._pages(wanted, 0):
            yield page

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        wanted = RangeOp(key, revision=revision)
        answer = await self._members.call(
            lambda member, deadline_s: member.range(wanted, deadline_s), Effect.READ
        )
        return answer.items[0] if answer.items else None

    async def commit(self, fence: Fence, writes: Sequence[Write]) -> Committed | NotCommitted:
        """Raise, besides the port's errors, ChangeTooLarge; OutcomeUnknown at the first doubt.

        To repeat the same commit is safe when it writes the mark: if the first took effect, the
        fence refuses the second. What uses etcd's quota up may have been written although etcd
        refuses it (its applier writes first and asks then): it is read back, and the answer is as
        if the fence had refused it when it was.
        """
        assert len({write.key for write in writes}) == len(writes), "a commit's keys are distinct"
        if len(writes) > TXN_OPS_MAX:
            raise ChangeTooLarge(f"{len(writes)} writes are more than {TXN_OPS_MAX}")
        txn = Txn(
            compares=(
                Compare(keys.LEADER, Target.CREATE_REVISION, fence.leader_revision),
                Compare(keys.MARK, Target.MOD_REVISION, fence.mark_revision),
            ),
            success=tuple(_op(write) for write in writes),
            failure=(RangeOp(keys.LEADER), RangeOp(keys.MARK)),
        )
        try:
            done = await self._txn(txn, Effect.ONCE)
        except StoreFull:
            holds = await self._read_back(txn)
            if holds.succeeded:
                raise
            return _not_committed(holds)
        return Committed(done.header.revision) if done.succeeded else _not_committed(done)

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchBatch]:
        return etcd_watch.watch(self._members, prefix, from_revision, self._rng)

    async def campaign(self, value: bytes, lease: int) -> Campaign:
        """Raise NotFound when the lease is gone. Repeats itself: it can win only once."""
        txn = Txn(
            compares=(Compare(keys.LEADER, Target.CREATE_REVISION, 0),),
            success=(PutOp(keys.LEADER, value, lease), RangeOp(keys.LEADER)),
            failure=(RangeOp(keys.LEADER),),
        )
        done = await self._txn(txn, Effect.REPEATABLE)
        leader = _first(done.reads[0])
        assert leader is not None, "both branches read the key that exists by then"
        return Campaign(leader, done.header.revision)

    async def resign(self, leader_revision: int) -> bool:
        txn = Txn(
            compares=(Compare(keys.LEADER, Target.CREATE_REVISION, leader_revision),),
            success=(DeleteOp(keys.LEADER),),
        )
        done = await self._txn(txn, Effect.ONCE)
        return done.succeeded

    async def grant_lease(self, ttl_s: int) -> int:
        # A grant whose answer was lost leaves a lease that nobody renews.
        lease = await self._members.call(
            lambda member, deadline_s: member.lease_grant(ttl_s, deadline_s), Effect.REPEATABLE
        )
        return lease.id

    async def renew_lease(self, lease: int) -> float:
        answer = await self._members.call(
            lambda member, deadline_s: member.lease_keep_alive(lease, deadline_s),
            Effect.READ,
            linearizable=False,
        )
        return answer.ttl_s

    async def revoke_lease(self, lease: int) -> None:
        try:
            await self._members.call(
                lambda member, deadline_s: member.lease_revoke(lease, deadline_s),
                Effect.REPEATABLE,
            )
        except NotFound:
            return

    async def register_replica(self, name: str, value: bytes, lease: int) -> None:
        """Raise NotFound when the lease is gone."""
        put = PutOp(keys.replica_key(name), value, lease)
        await self._txn(Txn((), (put,)), Effect.REPEATABLE)

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        try:
            await self._members.call(
                lambda member, deadline_s: member.compact(revision, deadline_s, physical),
                Effect.REPEATABLE,
                attempt_s=DEFRAGMENT_S if physical else COMPACT_S,
            )
        except Compacted:
            return

    async def defragment(self, endpoint: str) -> None:
        (member,) = (each for each in self._members.all if each.endpoint == endpoint)
        await member.defragment(DEFRAGMENT_S)

    async def disarm(self) -> None:
        # Answers about alarms do not say of which cluster they are: members are asked one by one,
        # and to disarm twice is as good as once.
        problem: NovacronError | None = None
        for member in self._members.all:
            try:
                await self._disarm_at(member)
                return
            except NovacronError as error:
                problem = error
        raise StoreUnavailable(f"no etcd member took its alarm back: {problem}") from problem

    async def members(self) -> tuple[MemberStatus, ...]:
        statuses = await asyncio.gather(*(self._status(each) for each in self._members.all))
        alarms = await self._alarms(statuses)
        return tuple(
            structs.replace(status, alarms=alarms.get(status.member_id, ())) for status in statuses
        )

    async def close(self) -> None:
        await self._members.close()

    async def _list(self, wanted: RangeOp, revision_min: int) -> Listing:
        items: builtins.list[KeyValue] = []
        revision = count = 0
        async for page in self._pages(wanted, revision_min):
            revision, count = page.revision, page.count
            items += page.items
        return Listing(revision, tuple(items), count)

    async def _pages(self, wanted: RangeOp, revision_min: int) -> AsyncGenerator[Listing]:
        revision = count = 0
        while True:
            answer = await self._page(wanted, revision_min)
            # Of the first page: the following ones are counted from where they begin.
            revision, count = revision or answer.header.revision, count or answer.count
            yield Listing(revision, answer.items, count)
            if not answer.more:
                return
            start = answer.items[-1].key + "\0"
            wanted = structs.replace(wanted, key=start, revision=revision)

    async def _page(self, page: RangeOp, revision_min: int) -> Ranged:
        return await self._members.call(
            lambda member, deadline_s: member.range(page, deadline_s),
            Effect.READ,
            revision_min=revision_min,
        )

    async def _txn(self, txn: Txn, effect: Effect) -> TxnDone:
        return await self._members.call(
            lambda member, deadline_s: member.txn(txn, deadline_s), effect
        )

    async def _read_back(self, txn: Txn) -> TxnDone:
        """Ask whether a transaction's fence holds still. Raises OutcomeUnknown."""
        try:
            return await self._txn(structs.replace(txn, success=()), Effect.READ)
        except StoreUnavailable as error:
            raise OutcomeUnknown(f"etcd is full, and may have taken the write: {error}") from error

    async def _disarm_at(self, member: MemberRpc) -> None:
        limit_s = self._limits.total_s
        for alarm in (await member.alarms(limit_s)).alarms:
            if alarm.name == NO_SPACE:
                await member.disarm(alarm, limit_s)

    async def _alarms(self, statuses: Sequence[MemberStatus]) -> dict[str, tuple[str, ...]]:
        """Return the names of alarms by member id, as the first member that answers knows them."""
        for member, status in zip(self._members.all, statuses, strict=True):
            if not status.reachable:
                continue
            try:
                answer = await member.alarms(self._limits.attempt_s)
            except NovacronError as error:
                log.debug("%s does not tell the alarms: %s", member.endpoint, error)
                continue
            names: dict[str, tuple[str, ...]] = {}
            for alarm in answer.alarms:
                member_id = f"{alarm.member_id:x}"
                names[member_id] = (*names.get(member_id, ()), alarm.name)
            return names
        return {}

    async def _status(self, member: MemberRpc) -> MemberStatus:
        try:
            status = await member.status(self._limits.attempt_s)
            self._members.verify_cluster(member, status.header)
        except NovacronError as error:
            return MemberStatus(member.endpoint, reachable=False, problem=str(error))
        header = status.header
        return MemberStatus(
            endpoint=member.endpoint,
            reachable=True,
            member_id=f"{header.member_id:x}",
            cluster_id=f"{header.cluster_id:x}",
            version=status.version,
            is_leader=status.leader_id == header.member_id,
            db_size_bytes=status.db_size_bytes,
            db_in_use_bytes=status.db_in_use_bytes,
            revision=header.revision,
            raft_term=header.raft_term,
            problem="" if status.leader_id else "the member sees no etcd leader",
        )


def _op(write: Write) -> Op:
    if isinstance(write, Put):
        return PutOp(write.key, write.value)
    return DeleteOp(write.key)


def _not_committed(done: TxnDone) -> NotCommitted:
    leader, mark = (_first(found) for found in done.reads)
    return NotCommitted(leader, mark, done.header.revision)


def _first(items: tuple[KeyValue, ...]) -> KeyValue | None:
    return items[0] if items else None
