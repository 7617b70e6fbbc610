"""What a new leader reads: what changed since memory was whole, and everything when in doubt."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
from msgspec import structs

from controlplane.state import ClusterState
from controlplane.store import keys, reading
from controlplane.store.informer import RETRY_S, Informer
from controlplane.store.port import Delete, Put, Store, Write
from shared.codec import pack
from shared.model import ApiKey, IdempotencyRecord
from tests.unit.core_world import BORN
from tests.unit.informer_world import (
    A_WHILE_S,
    CLUSTER,
    Following,
    api_key,
    event,
    following,
    put,
    virtual,
)


def request(name: str) -> Put:
    record = IdempotencyRecord(
        id=name, principal="p", fingerprint="f", result="vm-1", created_at=BORN
    )
    return Put(keys.record_key(record), pack(record))


def kept(state: ClusterState, informer: Informer) -> dict[str, Any]:
    """Return all that memory has, with revisions."""
    records = {each: state.get(*each) for each in state.record_ids()}
    return {
        "records": records,
        "history": dict(state.history),
        "replicas": dict(informer.replicas),
        "unreadable": set(informer.unreadable),
    }


async def assert_whole(it: Following) -> None:
    state = ClusterState()
    fresh = Informer(cast(Store, it.world.store), state)
    await fresh.load(0)
    assert kept(it.state, it.informer) == kept(state, fresh)


def doubt(it: Following) -> None:
    """Have it not know any more whether it has seen every commit."""
    it.informer._marks_seen = None
    it.store.listed.clear()
    it.store.reads.clear()


async def take_over(it: Following) -> bool:
    """Load as a new leader does; return whether it did without listing everything."""
    before = it.store.listings
    it.informer.audit_only()
    await it.informer.load(it.fence.mark_revision)
    listed_all = it.store.listings > before
    await assert_whole(it)
    return not listed_all


def test_a_memory_that_has_seen_every_commit_is_proven_by_their_number() -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(put("key-b"), event(2), request("r-1"))
            await it.commit(Delete(put("key-a").key), Delete(event(1).key), put("key-c"))
            await asyncio.sleep(A_WHILE_S)
            it.store.listed.clear()
            it.store.reads.clear()
            assert await take_over(it)
            assert (it.store.listed, it.store.reads) == ([keys.REPLICAS], [keys.MARK])

    virtual(main())


def test_otherwise_a_healthy_memory_is_proven_by_what_has_changed() -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(put("key-b"), event(2), request("r-1"))
            await it.commit(Delete(put("key-a").key), Delete(event(1).key), put("key-c"))
            await asyncio.sleep(A_WHILE_S)
            doubt(it)
            assert await take_over(it)
            assert it.store.reads == [keys.MARK]

    virtual(main())


def forget_record(it: Following) -> None:
    it.state.remove(ApiKey, "key-b")


def forget_change(it: Following) -> None:
    it.state.put(api_key("key-a"), it.state.api_keys["key-a"].revision - 1)


def forget_history(it: Following) -> None:
    it.state.remove_history(2)


def forget_request(it: Following) -> None:
    it.state.remove(IdempotencyRecord, "r-1")


@pytest.mark.parametrize("lose", [forget_record, forget_change, forget_history, forget_request])
def test_what_the_watch_has_not_brought_is_read_alone(lose: Callable[[Following], None]) -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(put("key-b"), put("key-a", "newer"), event(2), request("r-1"))
            await asyncio.sleep(A_WHILE_S)
            lose(it)
            doubt(it)
            assert await take_over(it)
            assert len(it.store.reads) == 1 + len([keys.MARK])

    virtual(main())


def test_much_that_was_missed_is_listed_with_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_SINGLY_MAX", 3)

    async def main() -> None:
        async with following() as it:
            it.informer.audit_only()
            await it.commit(*(put(f"key-{n}") for n in range(4)), event(2))
            doubt(it)
            assert await take_over(it)
            assert it.store.listed == [*keys.COMMITTED, keys.REPLICAS, *keys.COMMITTED]
            assert it.store.reads == [keys.MARK]

    virtual(main())


@pytest.mark.parametrize(
    "gone", [put("key-a"), event(1), request("r-0"), Put(f"{keys.STATE}quotas/q-1", b"?")]
)
def test_a_deletion_that_was_missed_makes_it_list_everything(gone: Put) -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(request("r-0"), Put(f"{keys.STATE}quotas/q-1", b"?"))
            await asyncio.sleep(A_WHILE_S)
            it.informer.audit_only()
            # As many come as go.
            await it.commit(Delete(gone.key), put("key-new"), event(2))
            assert not await take_over(it)

    virtual(main())


def test_a_memory_of_before_a_restore_is_proven_by_nothing() -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(Put(keys.CLUSTER, pack(CLUSTER)))
            await asyncio.sleep(A_WHILE_S)
            it.informer.audit_only()
            await it.commit(Put(keys.CLUSTER, pack(structs.replace(CLUSTER, epoch=2))))
            # The watch that began again has brought it nothing of that.
            assert not await take_over(it)

    virtual(main())


def test_a_commit_that_the_watch_has_left_out_is_noticed_with_the_next() -> None:
    async def main() -> None:
        async with following() as it:
            it.store.loses = lambda: True
            await it.commit(put("key-b"), Delete(put("key-a").key))
            await asyncio.sleep(A_WHILE_S)
            assert sorted(it.state.api_keys) == ["key-a"]
            it.store.loses = lambda: False
            await it.commit(put("key-c"))
            await asyncio.sleep(A_WHILE_S)
            assert sorted(it.state.api_keys) == ["key-b", "key-c"]
            assert it.informer.mismatches == 1

    virtual(main())


def test_a_takeover_that_comes_before_the_listing_finds_what_was_left_out() -> None:
    async def main() -> None:
        async with following() as it:
            it.store.loses = lambda: True
            await it.commit(put("key-b"))
            await asyncio.sleep(A_WHILE_S)
            it.store.loses = lambda: False
            it.store.failures = 1
            await it.commit(put("key-c"))
            await asyncio.sleep(RETRY_S / 2)
            assert sorted(it.state.api_keys) == ["key-a"], "it waits to list again"
            await take_over(it)
            assert sorted(it.state.api_keys) == ["key-a", "key-b", "key-c"]

    virtual(main())


def test_a_commit_that_was_left_out_last_is_found_at_the_takeover() -> None:
    async def main() -> None:
        async with following() as it:
            it.store.loses = lambda: True
            await it.commit(put("key-b"))
            await asyncio.sleep(A_WHILE_S)
            assert await take_over(it)
            assert sorted(it.state.api_keys) == ["key-a", "key-b"]

    virtual(main())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_watch_loses_memory_is_whole_after_a_takeover(seed: int) -> None:
    """Random changes, of which the watch leaves some out without a word."""
    ways: Counter[str] = Counter()

    async def main() -> None:
        rng = random.Random(seed)
        async with following() as it:
            it.store.loses = lambda: rng.random() < 0.2
            for _ in range(12):
                for _ in range(rng.randrange(4)):
                    await it.commit(*random_writes(rng))
                await asyncio.sleep(1)
                if rng.random() < 0.3:
                    doubt(it)
                it.store.listed.clear()
                ways["all" if not await take_over(it) else str(len(it.store.listed))] += 1
                it.informer._auditing = False

    virtual(main())
    assert len(ways) > 1, "neither always the cheapest way nor always the dearest"


def random_writes(rng: random.Random) -> list[Write]:
    """Return puts and deletions of a few keys, some of them of another release."""
    writes: dict[str, Write] = {}
    for _ in range(rng.randrange(1, 5)):
        n = rng.randrange(6)
        key = rng.choice((put(f"key-{n}"), event(n + 1), request(f"r-{n}")))
        if rng.random() < 0.1:
            key = Put(f"{keys.STATE}quotas/q-{n}", b"?")
        writes[key.key] = Delete(key.key) if rng.random() < 0.4 else key
    return list(writes.values())
