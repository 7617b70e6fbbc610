"""The rules of the store's client, each on the model, on one real member and on three.

Rule                            Tests: here, where no file is named
------------------------------  ------------------------------------------------------------------
failover with a probe           after_a_death_the_next_member_is_probed_first;
                                unit/test_etcd_pool: a_failed_member_is_used_again_only_after_..
a stopped member                test_store: a_stopped_member_is_told_and_worked_around (not of one),
                                without_a_quorum_nothing_happened_or_nobody_knows,
                                a_watch_outlives_its_member (not of one)
compaction under a slow watcher a_slow_watcher_misses_nothing_without_a_word,
                                what_is_compacted_away_is_told_and_made_good
unknown outcome, read back by   an_unknown_outcome_is_read_back_by_its_id;
the operation's id              unit/test_applier: the end of a term in between
a member that goes backwards    a_member_that_goes_backwards_is_refused,
                                a_member_that_lost_its_data_is_refused (of one, real)
a member of another cluster     a_member_of_another_cluster_is_refused
a listing is of one revision    test_store: pages_of_a_listing_are_of_one_revision;
                                a_listing_that_is_compacted_under_it_begins_anew
list again, and compare         what_is_compacted_away_is_told_and_made_good; unit/test_informer
memory against store            what_the_watch_has_lost_is_found; unit/test_comparison
the quota's alarm               a_full_store_and_its_repair; integration/test_full_store
mTLS                            three_members_over_tls (the model has no wire);
                                test_member_rpc: tls_with_client_certificates (of one)

A cluster of one cannot fail over: there a rule holds when nothing is lost, nothing is told that is
not so, and all goes on once the member is back.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from controlplane.state import ClusterState
from controlplane.store import comparison, keys
from controlplane.store.applier import Applier
from controlplane.store.comparison import Comparison
from controlplane.store.etcd_grpc import GrpcMember
from controlplane.store.etcd_members import Limits
from controlplane.store.etcd_pool import EtcdStore, connect
from controlplane.store.etcd_rpc import MemberRpc
from controlplane.store.informer import Informer
from controlplane.store.model_etcd import ModelEtcd
from controlplane.store.model_member import ModelMember
from controlplane.store.port import (
    Committed,
    Delete,
    Fence,
    Put,
    Room,
    Store,
    WatchBatch,
    Write,
)
from controlplane.store.space import StoreSpace
from shared.clock import SystemClock
from shared.codec import pack, unpack
from shared.errors import Compacted, OutcomeUnknown, StoreFull, StoreUnavailable
from shared.ids import IdSource
from shared.model import ApiKey, Applied, Event, Record, Term
from tests.contract.certificates import certificates
from tests.contract.etcd_process import EtcdCluster
from tests.contract.store_worlds import (
    CALL_S,
    POLL_S,
    Spied,
    World,
    etcd_world,
    model_world,
)
from tests.contract.test_store import BRIEF, VMS, _commit_surely, _puts, _until
from tests.unit.core_world import BORN

QUOTA_BYTES = 2 * 2**20
# etcd measures its size every 100 ms; faster than that it is filled past its quota.
MEASURED_S = 0.15

Result = TypeVar("Result")

real_one = pytest.param("etcd_one", marks=pytest.mark.etcd)
real_three = pytest.param("etcd_three", marks=pytest.mark.etcd)


@pytest.fixture(params=["model", real_one, real_three])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "model":
        async with model_world() as (model, _):
            yield model
        return
    async with etcd_world(request.getfixturevalue(request.param)) as real:
        yield real


# Failover


async def test_after_a_death_the_next_member_is_probed_first(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(1))
    (used,) = [spy for spy in world.spies if "txn" in spy.calls]
    alone = len(world.spies) == 1
    world.broken.kill(used.index)
    try:
        for spy in world.spies:
            spy.calls.clear()
        if alone:
            with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                await world.store.commit(fence, [Put(keys.MARK, b"")])
        else:
            fence = await _commit_surely(world.store, fence)
    finally:
        world.broken.restart(used.index)
    if alone:
        used.calls.clear()
        fence = await _commit_surely(world.store, fence)

    written = [spy for spy in world.spies if "txn" in spy.calls and (alone or spy is not used)]
    assert written
    for spy in written:
        assert spy.calls[0] == "range", "a linearizable read comes before the first write"
    assert (await world.store.list(VMS)).items[-1].mod_revision == fence.mark_revision


# Watches


async def test_a_slow_watcher_misses_nothing_without_a_word(world: World) -> None:
    """What was on its way comes, in order; or the rest is said to be gone."""
    fence = await world.lead()
    first = fence.leader_revision + 1
    watching = world.store.watch(VMS, first)
    got: list[int] = []
    told = False
    async with aclosing(watching), asyncio.timeout(CALL_S):
        fence = await world.commit(fence, *_puts(1))
        assert (await _change(watching)).revision == first
        for _ in range(50):
            fence = await world.commit(fence, *_puts(1))
        # Everything up to here is compacted while nobody reads.
        await world.store.compact(fence.mark_revision)
        try:
            while len(got) < 50:
                got.append((await _change(watching)).revision)
        except Compacted as compacted:
            told = compacted.compact_revision == fence.mark_revision
    assert got == list(range(first + 1, first + 1 + len(got)))
    assert told or len(got) == 50


async def test_what_is_compacted_away_is_told_and_made_good(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A watch whose member dies, and whose next revision is gone when it comes back."""
    fence = await world.commit(await world.lead(), _key("stays"), _key("goes"))
    state = ClusterState()
    gone: list[str] = []
    informer = Informer(cast(Store, world.store), state)
    async with _following(informer):

        def note(before: Record | None, after: Record | None) -> None:
            if before is not None and after is None:
                gone.append(before.id)

        state.observe(note)
        fence = await world.commit(fence, _key("seen"))
        await _until(lambda: "seen" in state.api_keys)
        (watched,) = [spy for spy in world.spies if "watch" in spy.calls]
        watches_again, may_watch = asyncio.Event(), asyncio.Event()

        async def until_allowed(call: str) -> None:
            if call == "watch":
                watches_again.set()
                await may_watch.wait()

        for spy in world.spies:
            spy.gate = until_allowed
        world.broken.kill(watched.index)
        if len(world.spies) > 1:
            await watches_again.wait()
        world.broken.restart(watched.index)
        await watches_again.wait()
        for writes in ([Delete(_key("goes").key)], [_key("comes")], [_key("comes")]):
            fence = await _commit_in_doubt(world.store, fence, *writes)
        await _patiently(lambda: world.store.compact(fence.mark_revision))
        may_watch.set()
        await _until(lambda: sorted(state.api_keys) == ["comes", "seen", "stays"])
        assert "the watch fell behind a compaction" in caplog.text
        assert gone == ["goes"]
        assert state.revision >= fence.mark_revision
        # And it follows again.
        fence = await world.commit(fence, _key("later"))
        await _until(lambda: "later" in state.api_keys)


# Unknown outcomes


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_an_unknown_outcome_is_read_back_by_its_id(world: World, lost: str) -> None:
    fence = await world.lead()
    state = ClusterState()
    async with _applying(world, state, fence) as applier:
        await applier.submit(PutKey("first"))
        before = await _mark(world)
        losses = 2

        async def lose(call: str) -> None:
            nonlocal losses
            if call == "txn" and losses:
                losses -= 1
                raise OutcomeUnknown(f"the {lost} is lost")

        for spy in world.spies:
            setattr(spy, "gate" if lost == "request" else "hook", lose)
        await applier.submit(PutKey("lost"))

        assert losses == 0
        after = await _mark(world)
        # Committed once, by whichever attempt: the next transaction after the one before it.
        assert after.mod_revision == before.mod_revision + 1
        assert unpack(after.value, Applied).group != unpack(before.value, Applied).group
        found = await world.store.get(_key("lost").key)
        assert found is not None
        assert found.mod_revision == after.mod_revision == state.api_keys["lost"].revision
        await applier.submit(PutKey("next"))
    listed = await world.store.list(f"{keys.STATE}api-keys/")
    assert len(listed.items) == 3


# Members that are not what they were


async def test_a_member_that_goes_backwards_is_refused(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    fence = await world.commit(await world.lead(), *_puts(1))
    members = [Rewound(spy) for spy in world.spies]
    store = _store(members, BRIEF)
    assert (await store.list(VMS)).revision == fence.mark_revision
    # All but one; a cluster of one has no other.
    rewound = members[:-1] or members
    for member in rewound:
        member.back_by = 1

    if len(members) == 1:
        with pytest.raises(StoreUnavailable):
            await store.list(VMS)
        with pytest.raises((StoreUnavailable, OutcomeUnknown)):
            await store.commit(fence, [Put(keys.MARK, b"late")])
        assert "is behind" in caplog.text
    else:
        assert (await store.list(VMS)).revision == fence.mark_revision
        fence = await _commit_surely(store, fence)
    for member in rewound:
        member.back_by = 0
    await _commit_surely(store, fence)


@pytest.mark.etcd
async def test_a_member_that_lost_its_data_is_refused() -> None:
    """Its cluster's id is the same: it is made of the configuration."""
    with EtcdCluster() as cluster:
        async with etcd_world(cluster) as world:
            fence = await world.commit(await world.lead(), *_puts(1))
            store = world.new_store(BRIEF)
            assert (await store.list(VMS)).revision == fence.mark_revision
            cluster.kill(0)
            cluster.restart_empty(0)
            await world.rpcs[0].status(CALL_S)  # so that it is connected
            with pytest.raises(StoreUnavailable):
                await store.list(VMS)
            with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                await store.commit(fence, [Put(keys.MARK, b"late")])
            # Who does not know what was is told by what it asks for.
            with pytest.raises(StoreUnavailable):
                await world.new_store(BRIEF).list(VMS, revision_min=fence.mark_revision)


async def test_a_member_of_another_cluster_is_refused(world: World) -> None:
    foreign = ModelEtcd(cluster_id=0xBAD)
    # Ahead of ours, so that only its cluster speaks against it.
    foreign.revision = 10**12
    members = [*world.spies, ModelMember(foreign, 9)]
    store = _store(members, BRIEF)
    fence = await world.lead()
    fence = await _commit_surely(store, fence)
    told = (await store.members())[-1]
    assert (told.reachable, "cluster bad" in told.problem) == (False, True)
    for spy in world.spies:
        world.broken.stop(spy.index)
    try:
        with pytest.raises(StoreUnavailable):
            await store.list(keys.ROOT)
        with pytest.raises((StoreUnavailable, OutcomeUnknown)):
            await store.commit(fence, [Put(keys.MARK, b"strayed")])
    finally:
        for spy in world.spies:
            world.broken.resume(spy.index)
    assert (await _patiently(lambda: store.list(keys.ROOT))).revision < foreign.revision
    assert foreign.revision == 10**12, "nothing was written there"
    await foreign.close()


# Listings


async def test_a_listing_that_is_compacted_under_it_begins_anew(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(20))
    store = world.new_store(page_keys=7)
    await store.get(keys.LEADER)
    pages = 0

    async def compact_after_the_first_page(call: str) -> None:
        nonlocal pages, fence
        pages += call == "range"
        if call == "range" and pages == 1:
            fence = await world.commit(fence, Put(f"{VMS}new", b""))
            await world.store.compact(fence.mark_revision)

    for spy in world.spies:
        spy.hook = compact_after_the_first_page
    listing = await store.list(VMS)

    assert listing.revision == fence.mark_revision
    assert len(listing.items) == 21


async def test_what_the_watch_has_lost_is_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "SETTLE_S", POLL_S)
    fence = await world.commit(await world.lead(), _key("a"), _key("b"), _event(1))
    state = ClusterState()
    informer = Informer(cast(Store, world.store), state)
    async with _following(informer):
        compare = Comparison(cast(Store, world.store), state, informer).compare
        await compare()
        assert informer.mismatches == 0
        # As if the watch had never brought them.
        state.remove(ApiKey, "a")
        state.remove_history(1)
        state.put(ApiKey(id="c", sha256="", principal="p", role="r", created_at=BORN), 1)
        await compare()
        assert informer.mismatches == 3
        await _until(lambda: sorted(state.api_keys) == ["a", "b"] and list(state.history) == [1])

        # While it leads, memory is the truth, and what somebody else wrote is only told.
        informer.audit_only()
        await world.commit(fence, _key("foreign"), Delete(_key("b").key))
        await compare()
        assert informer.mismatches == 5
        assert sorted(state.api_keys) == ["a", "b"]


# Room


@pytest.mark.parametrize("kind", ["model", real_one, real_three])
async def test_a_full_store_and_its_repair(kind: str) -> None:
    async with _small_world(kind) as world:
        await _full_and_repaired(world)


async def _full_and_repaired(world: World) -> None:
    store, key = world.store, f"{VMS}big"
    lease = await store.grant_lease(600)
    fence = await _put_until_full(world, key)
    space = StoreSpace(cast(Store, store), QUOTA_BYTES, lambda *told: None)

    await space.reconcile()
    assert space.room is Room.FULL
    for refused in (
        store.grant_lease(60),
        store.commit(fence, [Put(keys.MARK, b"mark")]),
        store.register_replica("r1", b"", lease),
    ):
        with pytest.raises(StoreFull):
            await refused
    # What adds nothing goes on: reads, renewals, watches, and transactions of deletions alone.
    assert await store.renew_lease(lease) > 0
    assert await store.get(key) is not None
    watching = store.watch(VMS, fence.mark_revision + 1)
    async with aclosing(watching):
        deleted = await store.commit(fence, [Delete(key)])
        assert (await _change(watching)).deletes == (key,)
    assert isinstance(deleted, Committed)

    repaired = await space.repair()
    assert repaired.after_bytes < repaired.before_bytes
    assert repaired.skipped == ()
    assert await _room(space) == "enough"
    for member in await store.members():
        assert member.alarms == ()
        assert member.db_size_bytes < QUOTA_BYTES / 2
    fence = await world.commit(fence, *_puts(1))
    assert await store.grant_lease(60)


# TLS


@pytest.mark.etcd
async def test_three_members_over_tls(tmp_path: Path) -> None:
    ours = certificates(tmp_path / "ours")
    with EtcdCluster(3, tls_dir=tmp_path / "ours") as cluster:
        store = connect(cluster.endpoints, ours)
        stranger = _store([GrpcMember(each, None) for each in cluster.endpoints], BRIEF)
        try:
            lease = await store.grant_lease(60)
            campaign = await store.campaign(b"leader", lease)
            fence = Fence(campaign.leader.create_revision, 0)
            for index in range(3):
                fence = await _commit_surely(store, fence)
                cluster.kill(index)
                fence = await _commit_surely(store, fence)
                cluster.restart(index)

            async def all_are_there() -> None:
                if not all(member.reachable for member in await store.members()):
                    raise StoreUnavailable("one is not connected yet")

            await _patiently(all_are_there)
            with pytest.raises(StoreUnavailable):
                await stranger.list(keys.ROOT)
        finally:
            await store.close()
            await stranger.close()


class PutKey:
    """A command that writes one record."""

    def __init__(self, name: str) -> None:
        self._name = name

    def decide(self, draft: Draft) -> None:
        draft.put(unpack(_key(self._name).value, ApiKey))
        draft.event("key.put", self._name, Author("test"))


class Rewound:
    """A member whose answers are of an older revision than they should be, when it is switched."""

    def __init__(self, spy: Spied) -> None:
        self._spy = spy
        self.back_by = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._spy, name)
        if name not in ("range", "txn"):
            return method

        async def call(*arguments: Any) -> Any:
            answer = await method(*arguments)
            header = answer.header
            return replace(answer, header=replace(header, revision=header.revision - self.back_by))

        return call


def _store(members: list[Any], limits: Limits) -> EtcdStore:
    return EtcdStore(cast("list[MemberRpc]", members), random.Random(7), limits)


def _key(name: str) -> Put:
    record = ApiKey(id=name, sha256="", principal="p", role="r", created_at=BORN)
    return Put(keys.record_key(record), pack(record))


def _event(seq: int) -> Put:
    entry = Event(seq=seq, id=f"event-{seq}", kind="k", object="o", at=BORN, by="b")
    return Put(keys.history_key(seq), pack(entry))


async def _mark(world: World) -> Any:
    found = await world.store.get(keys.MARK)
    assert found is not None
    return found


async def _change(watching: AsyncIterator[WatchBatch]) -> WatchBatch:
    async with asyncio.timeout(CALL_S):
        while True:
            batch = await anext(watching)
            if batch.puts or batch.deletes:
                return batch


async def _commit_in_doubt(store: EtcdStore, fence: Fence, *writes: Write) -> Fence:
    """Commit over what a member's death does to it."""
    async with asyncio.timeout(CALL_S):
        while True:
            with suppress(OutcomeUnknown, StoreUnavailable):
                done = await store.commit(fence, [Put(keys.MARK, b"mark"), *writes])
                if isinstance(done, Committed):
                    return Fence(fence.leader_revision, done.revision)
                assert done.mark is not None
                return Fence(fence.leader_revision, done.mark.mod_revision)


async def _patiently(call: Callable[[], Awaitable[Result]]) -> Result:
    """Return what a call returns once members answer."""
    async with asyncio.timeout(CALL_S):
        while True:
            try:
                return await call()
            except (OutcomeUnknown, StoreUnavailable):
                await asyncio.sleep(POLL_S)


async def _room(space: StoreSpace) -> str:
    await space.reconcile()
    return space.room.value


@asynccontextmanager
async def _small_world(kind: str) -> AsyncIterator[World]:
    """Yield a world with a small quota, of its own."""
    if kind == "model":
        async with model_world(QUOTA_BYTES) as (world, _):
            yield world
        return
    members = 1 if kind == "etcd_one" else 3
    with EtcdCluster(members, options=(f"--quota-backend-bytes={QUOTA_BYTES}",)) as cluster:
        async with etcd_world(cluster) as real:
            yield real


async def _put_until_full(world: World, key: str) -> Fence:
    fence = await world.lead()
    async with asyncio.timeout(CALL_S):
        while True:
            writes = [Put(keys.MARK, b"mark"), Put(key, bytes(2**18))]
            try:
                done = await world.store.commit(fence, writes)
            except StoreFull:
                return fence
            # The one that uses the quota up may be written, and is told as if it had not been.
            if isinstance(done, Committed):
                fence = Fence(fence.leader_revision, done.revision)
            else:
                assert done.mark is not None
                fence = Fence(fence.leader_revision, done.mark.mod_revision)
            await asyncio.sleep(MEASURED_S)


@asynccontextmanager
async def _following(informer: Informer) -> AsyncIterator[None]:
    ready = asyncio.Event()
    running = asyncio.ensure_future(informer.run(ready.set))
    try:
        await ready.wait()
        yield
        assert not running.done(), "nothing stops following"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def _applying(world: World, state: ClusterState, fence: Fence) -> AsyncIterator[Applier]:
    async def at_once() -> None: ...

    applier = Applier(
        cast(Store, world.store),
        state,
        Term(1, fence.leader_revision),
        None,
        IdSource("abc123", SystemClock(), random.Random(1)),
        SystemClock(),
        at_once,
    )
    running = asyncio.ensure_future(applier.run())
    try:
        yield applier
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
