"""What every implementation of the port ``Store`` keeps: on model etcd and on real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import pytest
from msgspec.structs import replace

from controlplane.store import keys
from controlplane.store.etcd_members import Limits
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.etcd_rpc import TXN_OPS_MAX
from controlplane.store.port import (
    Committed,
    Delete,
    Fence,
    NotCommitted,
    Put,
    WatchBatch,
    Write,
)
from shared.errors import (
    ChangeTooLarge,
    Compacted,
    NotFound,
    OutcomeUnknown,
    StoreUnavailable,
)
from tests.contract.etcd_process import EtcdCluster
from tests.contract.store_worlds import CALL_S, POLL_S, World, etcd_world, model_world

VMS = f"{keys.STATE}vms/"
BRIEF = Limits(attempt_s=0.3, total_s=0.8)

real_one = pytest.param("etcd_one", marks=pytest.mark.etcd)
real_three = pytest.param("etcd_three", marks=pytest.mark.etcd)


@pytest.fixture(params=["model", real_one, real_three])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async for made in _world(request):
        yield made


@pytest.fixture(params=["model", real_three])
async def three(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async for made in _world(request):
        yield made


async def _world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "model":
        async with model_world() as (model, _):
            yield model
        return
    cluster: EtcdCluster = request.getfixturevalue(request.param)
    async with etcd_world(cluster) as real:
        yield real


# Reading


async def test_nothing_is_there_at_first(world: World) -> None:
    assert (await world.store.list(keys.ROOT)).items == ()
    assert await world.store.get(keys.LEADER) is None


async def test_a_listing_is_sorted_and_of_one_prefix(world: World) -> None:
    fence = await world.lead()
    fence = await world.commit(fence, *_puts(3), Put(f"{keys.STATE}vmsx", b"other"))

    listing = await world.store.list(VMS)

    assert [(item.key, item.value) for item in listing.items] == [
        (put.key, put.value) for put in _puts(3)
    ]
    assert listing.revision == fence.mark_revision
    assert {item.mod_revision for item in listing.items} == {fence.mark_revision}


async def test_a_listing_of_keys_has_revisions_and_no_values(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(3))
    fence = await world.commit(fence, _puts(1)[0])
    whole, bare = await world.store.list(VMS), await world.store.list(VMS, keys_only=True)
    assert [replace(item, value=b"") for item in whole.items] == list(bare.items)
    assert bare.items[0].mod_revision == fence.mark_revision
    assert bare.items[1].mod_revision < fence.mark_revision
    assert all(item.value for item in whole.items)


async def test_a_listing_of_what_has_changed_counts_the_rest(world: World) -> None:
    first = await world.commit(await world.lead(), *_puts(5))
    second = await world.commit(first, _puts(2)[1], Delete(_puts(3)[2].key))
    for changed_from, listed in (
        (first.mark_revision, 4),
        (first.mark_revision + 1, 1),
        (second.mark_revision, 1),
        (second.mark_revision + 1, 0),
    ):
        found = await world.store.list(VMS, changed_from=changed_from)
        assert (len(found.items), found.count) == (listed, 4), changed_from
    found = await world.store.list(VMS, keys_only=True, changed_from=second.mark_revision)
    assert [item.key for item in found.items] == [_puts(2)[1].key]
    assert (await world.store.list(VMS)).count == 4


async def test_pages_of_what_has_changed_are_counted_once(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(60))
    since = fence.mark_revision + 1
    await world.commit(fence, *_puts(60)[::2])
    found = await world.new_store(page_keys=7).list(VMS, changed_from=since)
    assert (len(found.items), found.count) == (30, 60)


async def test_the_writes_of_a_key_are_counted_from_its_creation_on(world: World) -> None:
    put = _puts(1)[0]
    fence = await world.commit(await world.lead(), put)
    first = fence.mark_revision
    for write, version in ((put, 2), (put, 3), (Delete(put.key), 0), (put, 1)):
        fence = await world.commit(fence, write)
        found = await world.store.get(put.key)
        assert (0 if found is None else found.version) == version
    mark = await world.store.get(keys.MARK)
    assert mark is not None
    assert mark.version == 5
    seen: list[int] = []
    async with aclosing(world.store.watch(keys.MARK, first)) as batches:
        async for batch in batches:
            seen += [item.version for item in batch.puts]
            if len(seen) == 5:
                break
    assert seen == [1, 2, 3, 4, 5]


async def test_a_key_is_read_as_it_was_at_a_revision(world: World) -> None:
    put = _puts(1)[0]
    first = await world.commit(await world.lead(), put)
    second = await world.commit(first, Put(put.key, b"newer"))
    for fence, value in ((first, put.value), (second, b"newer")):
        found = await world.store.get(put.key, revision=fence.mark_revision)
        assert found is not None
        assert (found.value, found.mod_revision) == (value, fence.mark_revision)
    await world.store.compact(second.mark_revision)
    with pytest.raises(Compacted):
        await world.store.get(put.key, revision=first.mark_revision)


async def test_pages_of_a_listing_are_of_one_revision(world: World) -> None:
    fence = await world.lead()
    fence = await world.commit(fence, *_puts(20))
    other_store = world.new_store(page_keys=7)
    pages = 0

    async def write_between_pages(call: str) -> None:
        nonlocal pages, fence
        pages += call == "range"
        if call == "range" and pages in (2, 3):
            fence = await world.commit(fence, Delete(_puts(20)[19].key), Put(f"{VMS}new", b""))

    await other_store.get(keys.LEADER)  # so that the probe is over
    for spy in world.spies:
        spy.hook = write_between_pages
    pages = 1
    listing = await other_store.list(VMS)

    assert [item.key for item in listing.items] == [put.key for put in _puts(20)]
    assert pages == 4
    assert {item.mod_revision for item in listing.items} == {listing.revision}
    assert fence.mark_revision > listing.revision


async def test_a_scan_yields_the_pages_of_one_revision(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(20))
    store = world.new_store(page_keys=7)
    pages = []
    async with aclosing(store.scan(VMS)) as scan:
        async for page in scan:
            pages.append(page)
            fence = await world.commit(fence, Delete(_puts(20)[19].key), Put(f"{VMS}new", b""))

    assert [len(page.items) for page in pages] == [7, 7, 6]
    found = [item.key for page in pages for item in page.items]
    assert found == [put.key for put in _puts(20)]
    assert {page.revision for page in pages} == {pages[0].revision}


async def test_a_scan_of_nothing_tells_the_revision(world: World) -> None:
    revision = (await world.commit(await world.lead())).mark_revision
    async with aclosing(world.store.scan(VMS)) as scan:
        pages = [page async for page in scan]

    assert [page.items for page in pages] == [()]
    assert pages[0].revision >= revision


async def test_a_scan_that_is_compacted_under_its_reader_says_so(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(20))
    store = world.new_store(page_keys=7)
    async with aclosing(store.scan(VMS)) as scan:
        await anext(scan)
        fence = await world.commit(fence, Put(f"{VMS}new", b""))
        await world.store.compact(fence.mark_revision)
        with pytest.raises(Compacted):
            await anext(scan)


async def test_a_listing_older_than_asked_for_is_refused(world: World) -> None:
    fence = await world.commit(await world.lead())
    store = world.new_store(limits=BRIEF)

    newest = await store.list(keys.ROOT, revision_min=fence.mark_revision)
    assert newest.revision >= fence.mark_revision
    with pytest.raises(StoreUnavailable):
        await store.list(keys.ROOT, revision_min=newest.revision + 1_000)


# Election and leases


async def test_a_leader_key_without_a_lease_stays_until_it_is_resigned(world: World) -> None:
    held = await world.store.campaign(b"a restore", 0)
    lease = await world.store.grant_lease(60)
    refused = await world.store.campaign(b"a replica", lease)
    assert (held.leader.lease, refused.leader) == (0, held.leader)
    fence = await world.commit(Fence(held.leader.create_revision, 0), *_puts(1))
    await world.store.revoke_lease(lease)
    assert await world.store.get(keys.LEADER) == held.leader
    assert await world.store.resign(fence.leader_revision)
    assert await world.store.get(keys.LEADER) is None


async def test_one_campaign_wins_and_the_other_sees_it(world: World) -> None:
    first, second = await world.store.grant_lease(60), await world.store.grant_lease(60)

    won = await world.store.campaign(b"one", first)
    lost = await world.store.campaign(b"two", second)

    assert won.leader.value == lost.leader.value == b"one"
    assert won.leader.lease == lost.leader.lease == first
    assert won.leader.create_revision == lost.leader.create_revision == won.revision
    assert await world.store.get(keys.LEADER) == won.leader


async def test_terms_grow_and_resigning_ends_only_ones_own(world: World) -> None:
    first = (await world.lead()).leader_revision

    assert not await world.store.resign(first - 1)
    assert await world.store.resign(first)
    assert not await world.store.resign(first)
    second = (await world.lead()).leader_revision

    assert second > first
    assert not await world.store.resign(first)


async def test_an_expired_lease_takes_its_keys_along(world: World) -> None:
    lease = await world.store.grant_lease(2)
    campaign = await world.store.campaign(b"leader", lease)
    await world.store.register_replica("r1", b"at home", lease)

    watching = world.store.watch(keys.ROOT, campaign.revision + 2)
    (batch,) = await _changes(watching, 1)

    assert sorted(batch.deletes) == [keys.LEADER, keys.replica_key("r1")]
    assert batch.puts == ()
    assert (await world.store.list(keys.ROOT)).items == ()
    assert await world.store.renew_lease(lease) <= 0


async def test_a_renewed_lease_lives(world: World) -> None:
    lease = await world.store.grant_lease(2)
    await world.store.campaign(b"leader", lease)

    for _ in range(6):
        await asyncio.sleep(0.5)
        assert await world.store.renew_lease(lease) > 0

    assert await world.store.get(keys.LEADER) is not None


async def test_a_revoked_lease_is_gone(world: World) -> None:
    lease = await world.store.grant_lease(60)
    await world.store.register_replica("r1", b"", lease)

    await world.store.revoke_lease(lease)
    await world.store.revoke_lease(lease)

    assert await world.store.get(keys.replica_key("r1")) is None
    assert await world.store.renew_lease(lease) <= 0
    with pytest.raises(NotFound):
        await world.store.campaign(b"leader", lease)
    with pytest.raises(NotFound):
        await world.store.register_replica("r1", b"", lease)
    assert (await world.store.list(keys.ROOT)).items == ()


async def test_a_replica_registers_under_its_lease(world: World) -> None:
    lease = await world.store.grant_lease(60)

    await world.store.register_replica("r1", b"one", lease)
    await world.store.register_replica("r1", b"two", lease)

    (item,) = (await world.store.list(keys.REPLICAS)).items
    assert (item.key, item.value, item.lease) == (keys.replica_key("r1"), b"two", lease)


# Commits


async def test_a_commit_is_one_revision(world: World) -> None:
    fence = await world.lead()

    first = await world.store.commit(fence, [Put(keys.MARK, b"1"), *_puts(3)])
    assert isinstance(first, Committed)
    fence = Fence(fence.leader_revision, first.revision)
    second = await world.store.commit(
        fence, [Put(keys.MARK, b"2"), Delete(_puts(3)[0].key), Put(_puts(3)[1].key, b"changed")]
    )

    assert second == Committed(first.revision + 1)
    items = (await world.store.list(VMS)).items
    assert [item.value for item in items] == [b"changed", b"value 2"]
    assert [item.create_revision for item in items] == [first.revision] * 2
    assert [item.mod_revision for item in items] == [first.revision + 1, first.revision]


async def test_the_fence_of_another_leader_refuses(world: World) -> None:
    old = await world.commit(await world.lead(), *_puts(1))
    await world.store.resign(old.leader_revision)
    new = await world.lead()
    before = await world.store.list(keys.ROOT)

    refused = await world.store.commit(old, [Put(keys.MARK, b"late"), Put(f"{VMS}late", b"")])

    assert isinstance(refused, NotCommitted)
    assert refused.leader is not None
    assert refused.leader.create_revision == new.leader_revision
    assert refused.mark is not None
    assert refused.mark.mod_revision == old.mark_revision
    assert refused.revision == before.revision
    assert await world.store.list(keys.ROOT) == before


async def test_without_a_leader_nothing_is_committed(world: World) -> None:
    fence = await world.lead()
    await world.store.resign(fence.leader_revision)

    refused = await world.store.commit(fence, [Put(keys.MARK, b"late")])

    assert isinstance(refused, NotCommitted)
    assert refused.leader is None
    assert refused.mark is None
    assert await world.store.get(keys.MARK) is None


async def test_an_old_mark_refuses_the_same_commit_twice(world: World) -> None:
    fence = await world.lead()
    writes = [Put(keys.MARK, b"1"), *_puts(1)]

    done = await world.store.commit(fence, writes)
    again = await world.store.commit(fence, writes)

    assert isinstance(done, Committed)
    assert isinstance(again, NotCommitted)
    assert again.mark is not None
    assert again.mark.mod_revision == done.revision


async def test_a_commit_has_a_limit(world: World) -> None:
    fence = await world.lead()

    fence = await world.commit(fence, *_puts(TXN_OPS_MAX - 1))
    with pytest.raises(ChangeTooLarge):
        await world.commit(fence, *_puts(TXN_OPS_MAX))
    with pytest.raises(ChangeTooLarge):
        await world.commit(fence, Put(f"{VMS}huge", bytes(3 * 2**19)))

    listing = await world.store.list(VMS)
    assert len(listing.items) == TXN_OPS_MAX - 1
    assert listing.revision == fence.mark_revision


# Watching


async def test_a_watch_tells_past_and_present(world: World) -> None:
    fence = await world.lead()
    start = await world.commit(fence, *_puts(2))
    watching = world.store.watch(VMS, start.mark_revision)
    async with aclosing(watching):
        past = await _next_change(watching)
        fence = await world.commit(start, Put(f"{keys.STATE}elsewhere", b""))
        fence = await world.commit(fence, Delete(_puts(2)[0].key), Put(_puts(2)[1].key, b"new"))
        live = await _next_change(watching)

    assert past.revision == start.mark_revision
    assert [(put.key, put.value) for put in past.puts] == [(put.key, put.value) for put in _puts(2)]
    assert live.revision == fence.mark_revision
    assert live.deletes == (_puts(2)[0].key,)
    assert [(put.value, put.mod_revision) for put in live.puts] == [(b"new", fence.mark_revision)]


async def test_every_revision_is_a_batch_of_its_own(world: World) -> None:
    fence = await world.lead()
    first = fence.leader_revision + 1
    for number in range(30):
        key = f"{VMS}same"
        write: Write = Delete(key) if number % 3 == 2 else Put(key, b"%d" % number)
        fence = await world.commit(fence, write)

    batches = await _changes(world.store.watch(VMS, first), 30)

    assert [batch.revision for batch in batches] == list(range(first, first + 30))
    assert [len(batch.puts) for batch in batches] == [1, 1, 0] * 10
    assert [len(batch.deletes) for batch in batches] == [0, 0, 1] * 10


async def test_a_long_history_arrives_whole(world: World) -> None:
    """More than etcd puts into one message, so that it comes in fragments."""
    fence = await world.lead()
    first = fence.leader_revision + 1
    for number in range(4):
        halves = [Put(f"{VMS}{half}", b"%d" % number * 2**19) for half in ("a", "b")]
        fence = await world.commit(fence, *halves)

    batches = await _changes(world.store.watch(VMS, first), 4)

    assert [batch.revision for batch in batches] == list(range(first, first + 4))
    values = [[put.value for put in batch.puts] for batch in batches]
    assert values == [[b"%d" % number * 2**19] * 2 for number in range(4)]


async def test_a_quiet_watch_shows_that_it_lives(world: World) -> None:
    fence = await world.commit(await world.lead(), *_puts(1))
    watching = world.store.watch(VMS, fence.mark_revision)
    async with aclosing(watching), asyncio.timeout(CALL_S):
        await anext(watching)
        # A change elsewhere: progress must not claim that the prefix is complete up to it.
        await world.commit(fence)
        assert await anext(watching) == WatchBatch(fence.mark_revision, (), ())
        assert await anext(watching) == WatchBatch(fence.mark_revision, (), ())


async def test_a_compacted_start_is_told(world: World) -> None:
    fence = start = await world.commit(await world.lead(), *_puts(1))
    for _ in range(5):
        fence = await world.commit(fence, *_puts(1))

    await world.store.compact(fence.mark_revision)
    await world.store.compact(fence.mark_revision)

    with pytest.raises(Compacted) as caught:
        await _changes(world.store.watch(VMS, start.mark_revision), 1)
    assert caught.value.compact_revision == fence.mark_revision
    assert len((await world.store.list(VMS)).items) == 1
    fence = await world.commit(fence, *_puts(1))
    (batch,) = await _changes(world.store.watch(VMS, fence.mark_revision), 1)
    assert batch.revision == fence.mark_revision


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_watch_outlives_its_member(three: World, how: str) -> None:
    fence = await three.lead()
    first = fence.leader_revision + 1
    watching = three.store.watch(VMS, first)
    batches: list[WatchBatch] = []

    async def collect() -> None:
        async with aclosing(watching):
            async for batch in watching:
                batches.extend([batch] if batch.puts else [])

    task = asyncio.create_task(collect())
    for _ in range(10):
        fence = await three.commit(fence, *_puts(1))
    await _until(lambda: len(batches) == 10)
    (watched,) = [spy.index for spy in three.spies if "watch" in spy.calls]
    getattr(three.broken, how)(watched)
    try:
        for _ in range(20):
            fence = await _commit_surely(three.store, fence)
        await _until(lambda: batches[-1].revision == fence.mark_revision)
    finally:
        if how == "stop":
            three.broken.resume(watched)
        else:
            three.broken.restart(watched)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert [batch.revision for batch in batches] == list(range(first, first + 30))
    assert sum("watch" in spy.calls for spy in three.spies) > 1


# Members


async def test_members_tell_their_state(world: World) -> None:
    fence = await world.commit(await world.lead())

    members = await world.store.members()

    assert [member.endpoint for member in members] == [rpc.endpoint for rpc in world.rpcs]
    assert all(member.reachable and not member.problem for member in members)
    assert sum(member.is_leader for member in members) == 1
    assert len({member.cluster_id for member in members}) == 1
    assert len({member.member_id for member in members}) == len(members)
    assert max(member.revision for member in members) == fence.mark_revision
    assert all(member.db_size_bytes > 0 and member.version for member in members)
    assert all(member.alarms == () for member in members)


async def test_a_stopped_member_is_told_and_worked_around(three: World) -> None:
    fence = await three.commit(await three.lead())
    three.broken.stop(0)
    try:
        members = await three.store.members()
        fence = await _commit_surely(three.store, fence)
        listing = await three.store.list(keys.ROOT, revision_min=fence.mark_revision)
    finally:
        three.broken.resume(0)

    assert [member.reachable for member in members] == [False, True, True]
    assert members[0].problem
    assert listing.revision >= fence.mark_revision


async def test_without_a_quorum_nothing_happened_or_nobody_knows(world: World) -> None:
    fence = await world.commit(await world.lead())
    store = world.new_store(limits=BRIEF)
    for index in range(len(world.spies)):
        world.broken.stop(index)
    try:
        with pytest.raises(StoreUnavailable):
            await store.list(keys.ROOT)
        with pytest.raises((StoreUnavailable, OutcomeUnknown)):
            await store.commit(fence, [Put(keys.MARK, b"")])
        assert not any(member.reachable for member in await store.members())
    finally:
        for index in range(len(world.spies)):
            world.broken.resume(index)
    await _commit_surely(world.store, fence)


def _puts(count: int) -> list[Put]:
    return [Put(f"{VMS}{number:04d}", f"value {number}".encode()) for number in range(count)]


async def _next_change(watching: AsyncIterator[WatchBatch]) -> WatchBatch:
    async with asyncio.timeout(CALL_S):
        while True:
            batch = await anext(watching)
            if batch.puts or batch.deletes:
                return batch


async def _changes(watching: AsyncGenerator[WatchBatch], count: int) -> list[WatchBatch]:
    """Return the next batches that hold changes, and close the watch."""
    async with aclosing(watching):
        return [await _next_change(watching) for _ in range(count)]


async def _commit_surely(store: EtcdStore, fence: Fence) -> Fence:
    """Commit one change, repeating it after unknown outcomes as the port says."""
    writes = [Put(keys.MARK, b"mark"), *_puts(1)]
    async with asyncio.timeout(CALL_S):
        while True:
            try:
                done = await store.commit(fence, writes)
            except (OutcomeUnknown, StoreUnavailable):
                continue
            if isinstance(done, Committed):
                return Fence(fence.leader_revision, done.revision)
            assert done.mark is not None, "a commit that was refused had taken effect before"
            assert done.mark.mod_revision > fence.mark_revision
            return Fence(fence.leader_revision, done.mark.mod_revision)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(CALL_S):
        while True:
            if holds():
                return
            await asyncio.sleep(POLL_S)
