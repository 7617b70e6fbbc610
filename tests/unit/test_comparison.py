"""Memory compared with etcd although the watch looked healthy: what is told, and made good."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from controlplane.store import keys
from controlplane.store.comparison import PERIOD_S, SETTLE_S, Comparison
from controlplane.store.informer import DIFFERENCES_TOLD_MAX
from controlplane.store.port import Delete, Put, Store
from controlplane.store.reading import Reading
from shared.codec import pack
from shared.model import ApiKey
from tests.unit.informer_world import (
    A_WHILE_S,
    CLUSTER,
    REPLICA,
    Following,
    api_key,
    event,
    following,
    put,
    virtual,
)


def comparison(it: Following) -> Comparison:
    return Comparison(cast(Store, it.store), it.state, it.informer)


def lose(it: Following) -> None:
    """Leave memory as it is when the watch has lost events without a word."""
    stored = it.state.api_keys["key-a"]
    it.state.remove(ApiKey, "key-new")
    it.state.put(api_key("key-a", "older"), stored.revision - 1)
    it.state.put(api_key("key-gone"), stored.revision)
    it.state.remove_history(2)
    it.state.advanced(it.state.revision)


async def before_the_loss(it: Following) -> None:
    await it.commit(put("key-new"), event(2))
    await it.commit(put("key-a", "newer"))
    await asyncio.sleep(A_WHILE_S)


def test_a_follower_finds_what_the_watch_has_lost_and_lists_again() -> None:
    async def main() -> None:
        async with following() as it:
            await before_the_loss(it)
            lose(it)
            await comparison(it).compare()
            assert it.informer.mismatches == 4
            assert await it.seen() == ["key-a", "key-new"]
            assert it.state.api_keys["key-a"].record.role == "newer"
            assert sorted(it.state.history) == [1, 2]
            await comparison(it).compare()
            assert it.informer.mismatches == 4, "it was made good"

    virtual(main())


def test_a_leader_tells_of_foreign_writes_and_keeps_its_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with following() as it:
            it.informer.audit_only()
            # As somebody with etcdctl does, without the leader.
            await it.commit(put("key-foreign"), Delete(put("key-a").key), Delete(event(1).key))
            told: list[int] = []
            it.informer._on_mismatch = told.append
            for _ in range(2):
                await comparison(it).compare()
            assert told == [3, 3]
            assert sorted(it.state.api_keys) == ["key-a"]
            await asyncio.sleep(A_WHILE_S)
            assert sorted(it.state.api_keys) == ["key-a"]
            assert it.store.listings == 5

    virtual(main())
    assert f"{put('key-foreign').key} is at" in caplog.text


def test_many_differences_are_told_as_a_number(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with following() as it:
            it.informer.audit_only()
            for start in (0, 100):
                await it.commit(*(put(f"key-{n}") for n in range(start, start + 100)))
            await comparison(it).compare()
            assert it.informer.mismatches == 200

    virtual(main())
    lines = [record for record in caplog.records if "leader's memory" in record.getMessage()]
    assert len(lines) == DIFFERENCES_TOLD_MAX + 1


def test_what_arrives_meanwhile_is_no_difference() -> None:
    async def main() -> None:
        async with following() as it:
            await before_the_loss(it)
            stored = it.state.api_keys["key-a"]
            lose(it)
            comparing = asyncio.ensure_future(comparison(it).compare())
            await asyncio.sleep(SETTLE_S / 2)
            it.state.put(stored.record, stored.revision)
            it.state.put(api_key("key-new"), stored.revision - 1)
            it.state.remove(ApiKey, "key-gone")
            # Another change of what differed: it is another difference by now.
            await it.commit(event(2))
            await comparing
            assert it.informer.mismatches == 0

    virtual(main())


def test_what_is_not_kept_or_cannot_be_is_not_compared() -> None:
    async def main() -> None:
        async with following() as it:
            lease = await it.world.store.grant_lease(3600)
            await it.world.store.register_replica("r1", pack(REPLICA), lease)
            await it.commit(
                Put(keys.CLUSTER, pack(CLUSTER)),
                Put(f"{keys.STATE}quotas/q-1", b"?"),
                Put(f"{keys.HISTORY}summary", b"?"),
                Put(put("key-poisoned").key, b"\xc1"),
            )
            await asyncio.sleep(A_WHILE_S)
            listings = it.store.listings
            await comparison(it).compare()
            assert it.informer.mismatches == 0
            assert it.store.listings == listings + 1, "one look was enough"

    virtual(main())


def test_it_is_done_once_in_a_period_whatever_fails() -> None:
    async def main() -> None:
        async with following() as it:
            running = asyncio.ensure_future(comparison(it).run())
            await asyncio.sleep(PERIOD_S - A_WHILE_S)
            assert it.store.listings == 1, "what was listed at the start is not compared at once"
            it.store.failures = 1
            await asyncio.sleep(PERIOD_S)
            assert it.store.listings == 2
            lose_one = it.state.api_keys["key-a"].record
            it.state.remove(ApiKey, lose_one.id)
            await asyncio.sleep(PERIOD_S + A_WHILE_S)
            assert it.informer.mismatches == 1
            assert await it.seen() == ["key-a"]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    virtual(main())


def test_the_cluster_s_record_is_read_once() -> None:
    """Its key holds no id, by which records are found otherwise."""

    async def main() -> None:
        async with following() as it:
            await it.commit(Put(keys.CLUSTER, pack(CLUSTER)))
            await asyncio.sleep(A_WHILE_S)
            assert (await Reading(cast(Store, it.store), it.state, set()).everything(0)).items == ()

    virtual(main())
