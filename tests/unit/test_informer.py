"""The watch cache over a model etcd: compaction, poison, audits, terms that come and go."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from msgspec.structs import replace

from controlplane.state import ClusterState
from controlplane.store import informer as informer_module
from controlplane.store import keys
from controlplane.store.informer import Informer
from controlplane.store.port import (
    Delete,
    Put,
    Store,
)
from shared.codec import pack
from shared.model import ApiKey, Cluster
from tests.contract.store_worlds import model_world
from tests.unit.core_world import BORN
from tests.unit.informer_world import (
    A_WHILE_S,
    REPLICA,
    api_key,
    event,
    following,
    nothing,
    put,
    virtual,
)


def test_it_lists_once_and_follows() -> None:
    async def main() -> None:
        async with following() as it:
            assert list(it.state.api_keys) == ["key-a"]
            await it.commit(put("key-b"), event(2))
            await it.commit(Delete(put("key-a").key), Delete(event(1).key))
            assert await it.seen() == ["key-b"]
            assert list(it.state.history) == [2]
            assert it.state.revision == it.fence.mark_revision
            assert it.store.listings == 1

    virtual(main())


def test_after_a_compaction_it_lists_again_and_finds_what_was_deleted() -> None:
    async def main() -> None:
        async with following() as it:
            for index in range(3):
                it.cluster.kill(index)
            await asyncio.sleep(A_WHILE_S)
            for index in range(3):
                it.cluster.restart(index)
            # What was missed is gone from etcd's history before the watch comes back.
            await it.commit(Delete(put("key-a").key), put("key-b"), Delete(event(1).key))
            await it.commit(put("key-c"))
            await it.world.store.compact(it.fence.mark_revision)
            it.store.failures = 2
            assert await it.seen() == ["key-b", "key-c"]
            assert it.state.history == {}
            assert it.store.listings == 4

    virtual(main())


def test_what_memory_has_already_is_not_read_again() -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(put("key-b"), put("key-c"), event(2))
            await it.seen()
            known, whole = it.state.api_keys["key-b"], it.store.listings
            it.store.reads.clear()
            # As if the watch had lost two changes and a deletion, and brought one twice.
            it.informer._marks_seen = None
            it.state.remove(ApiKey, "key-c")
            it.state.put(known.record, 1)
            it.state.put(replace(known.record, id="key-z"), known.revision)
            it.state.remove_history(2)
            await it.informer.load(it.fence.mark_revision)
            assert sorted(it.state.api_keys) == ["key-a", "key-b", "key-c"]
            assert it.state.api_keys["key-b"] == known
            assert sorted(it.state.history) == [1, 2]
            assert it.store.listings == whole + 1
            assert it.store.reads == [event(2).key, put("key-b").key, put("key-c").key]

    virtual(main())


def test_what_is_over_is_found_beside_a_record_that_cannot_be_read() -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(Put(put("key-b").key, b"poison"))
            await it.seen()
            # As many as are listed, and one of them is not there any more.
            it.informer._marks_seen = None
            it.state.put(api_key("key-z"), 1)
            await it.informer.load(it.fence.mark_revision)
            assert sorted(it.state.api_keys) == ["key-a"]
            assert it.informer.unreadable == {put("key-b").key}

    virtual(main())


def test_a_poisoned_record_is_set_aside_and_stopsnothing() -> None:
    async def main() -> None:
        async with following() as it:
            poisoned = put("key-b").key
            await it.commit(Put(poisoned, b"\xc1"), put("key-c"))
            assert await it.seen() == ["key-a", "key-c"]
            assert it.informer.unreadable == {poisoned}
            await it.commit(put("key-b"))
            assert await it.seen() == ["key-a", "key-b", "key-c"]
            assert it.informer.unreadable == set()

    virtual(main())


def test_keys_of_a_newer_release_come_and_go() -> None:
    async def main() -> None:
        async with following() as it:
            for audited in (False, True):
                if audited:
                    it.informer.audit_only()
                foreign = [f"{keys.STATE}quotas/q-1", f"{keys.HISTORY}summary"]
                await it.commit(*(Put(key, b"?") for key in foreign))
                await it.commit(*(Delete(key) for key in foreign))
                await it.commit(put("key-b"))
                await asyncio.sleep(A_WHILE_S)
            assert sorted(it.state.api_keys) == ["key-a", "key-b"]
            assert it.informer.unreadable == set()

    virtual(main())


def test_a_listing_takes_poisoned_and_foreign_keys() -> None:
    async def main() -> None:
        async with following() as it:
            await it.commit(Put(f"{keys.HISTORY}summary", b"?"), Put(put("key-b").key, b"?"))
            state = ClusterState()
            informer = Informer(cast(Store, it.world.store), state)
            await informer.load(0)
            assert list(state.api_keys) == ["key-a"]
            assert len(informer.unreadable) == 2

    virtual(main())


def test_replicas_are_known_while_they_are_registered() -> None:
    async def main() -> None:
        async with following() as it:
            lease = await it.world.store.grant_lease(60)
            await it.world.store.register_replica("r1", pack(REPLICA), lease)
            await asyncio.sleep(A_WHILE_S)
            assert it.informer.replicas == {"r1": REPLICA}
            await it.world.store.revoke_lease(lease)
            await asyncio.sleep(A_WHILE_S)
            assert it.informer.replicas == {}

    virtual(main())


def test_memory_is_at_a_revision_that_its_leader_comes_to_as_well() -> None:
    """Who leads, and who is registered, is written past the leader and its memory."""

    async def main() -> None:
        async with following() as it:
            committed = it.fence.mark_revision
            lease = await it.world.store.grant_lease(60)
            await it.world.store.register_replica("r1", pack(REPLICA), lease)
            await asyncio.sleep(A_WHILE_S)
            assert it.informer.replicas == {"r1": REPLICA}
            assert it.state.revision == committed
            # Neither does a listing show what nobody has committed.
            state = ClusterState()
            informer = Informer(cast(Store, it.store), state)
            await informer.load(0)
            assert state.revision == committed
            await informer.load(0)
            assert state.revision == committed

    virtual(main())


def test_whoever_waits_for_the_leader_key_is_woken_when_it_comes_or_goes() -> None:
    async def main() -> None:
        async with following() as it:
            changed = it.informer.leader_key.next()
            await it.commit(put("key-b"))
            await asyncio.sleep(A_WHILE_S)
            assert not changed.done(), "another key"
            await it.world.store.resign(it.fence.leader_revision)
            await asyncio.sleep(A_WHILE_S)
            assert changed.done()
            changed = it.informer.leader_key.next()
            await it.world.lead()
            await asyncio.sleep(A_WHILE_S)
            assert changed.done()

    virtual(main())


def test_what_changes_while_it_is_read_is_not_taken_before_its_time() -> None:
    """Memory says at which revision it is: nothing in it may be newer."""

    async def main() -> None:
        async with following() as it:
            await it.commit(put("key-b"))
            state = ClusterState()
            informer = Informer(cast(Store, it.store), state)

            async def change() -> None:
                it.store.before_read = nothing
                await it.commit(put("key-a", "other"), put("key-b", "other"))

            listed = it.fence.mark_revision
            it.store.before_read = change
            await informer.load(0)
            assert state.revision == listed
            assert [kept.record.role for kept in state.api_keys.values()] == ["admin", "admin"]

    virtual(main())


def test_a_later_listing_is_never_seen_half_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first one is, by nobody who reads: the revision is 0 until it is whole."""
    monkeypatch.setattr(informer_module, "TAKEN_AT_ONCE", 1)

    async def main() -> None:
        async with following() as it:
            state = ClusterState()
            informer = Informer(cast(Store, it.store), state)
            seen: set[tuple[int, frozenset[str]]] = set()

            async def look() -> None:
                while True:
                    seen.add((state.revision, frozenset(state.api_keys)))
                    await asyncio.sleep(0)

            looking = asyncio.ensure_future(look())
            await it.commit(put("key-a"), put("key-b"))
            await informer.load(0)
            await it.commit(put("key-c"), put("key-d"))
            await informer.load(0)
            await asyncio.sleep(0)
            looking.cancel()
            shown = {at: [len(found) for when, found in seen if when == at] for at, _ in seen}
            assert len(shown.pop(0)) > 1
            assert [shown[at] for at in sorted(shown)] == [[2], [4]]

    virtual(main())


def test_while_it_leads_the_watch_only_audits() -> None:
    async def main() -> None:
        async with following() as it:
            it.informer.audit_only()
            await it.commit(put("key-a", "other"))
            foreign_revision = it.fence.mark_revision
            it.state.advanced(foreign_revision + 1)
            await asyncio.sleep(A_WHILE_S)

            assert it.informer.mismatches == 1
            assert it.state.api_keys["key-a"].record.role == "admin"

    virtual(main())


def test_what_the_leader_committed_itself_is_no_mismatch() -> None:
    async def main() -> None:
        async with following() as it:
            it.informer.audit_only()
            await it.commit(put("key-b"))
            it.state.put(api_key("key-b"), it.fence.mark_revision)
            it.state.advanced(it.fence.mark_revision)
            await asyncio.sleep(A_WHILE_S)

            assert it.informer.mismatches == 0

    virtual(main())


def test_after_a_term_it_follows_again_even_if_the_first_listing_fails() -> None:
    """What was committed with an unknown outcome is in etcd, but not in the leader's memory."""

    async def main() -> None:
        async with following() as it:
            it.informer.audit_only()
            await it.commit(put("key-unknown"))
            await asyncio.sleep(A_WHILE_S)
            assert sorted(it.state.api_keys) == ["key-a"]
            it.store.failures = 3
            it.informer.follow_again()
            assert await it.seen() == ["key-a", "key-unknown"]

    virtual(main())


def test_a_listing_that_comes_late_never_takes_the_leaders_memory_back() -> None:
    async def main() -> None:
        async with following() as it:
            it.store.answers_pass.clear()
            it.informer.follow_again()
            await asyncio.sleep(A_WHILE_S)  # the listing has been read, and is on its way
            it.informer.audit_only()
            await it.commit(put("key-a", "newer"))
            it.state.put(api_key("key-a", "newer"), it.fence.mark_revision)
            it.state.advanced(it.fence.mark_revision)
            it.store.answers_pass.set()
            await asyncio.sleep(A_WHILE_S)

            assert it.state.api_keys["key-a"].record.role == "newer"
            assert it.state.api_keys["key-a"].revision == it.fence.mark_revision

    virtual(main())


def test_memory_of_before_a_restore_is_read_again_although_its_revisions_are_the_same() -> None:
    """A replica that was cut off, and not stopped, meets an etcd that has counted up to it."""

    async def main() -> None:
        state = ClusterState()
        for epoch, role in ((1, "before"), (1_800_000_000, "restored")):
            async with model_world() as (world, _):
                cluster = Cluster(id="cluster-1", cell="abc123", epoch=epoch, created_at=BORN)
                fence = await world.commit(
                    await world.lead(), Put(keys.CLUSTER, pack(cluster)), put("key-a", role)
                )
                if epoch == 1:
                    await world.commit(fence, put("key-b"))
                else:
                    await world.commit(fence, put("key-c"))
                await Informer(world.store, state).load(0)
        assert state.api_keys["key-a"].record.role == "restored"
        assert sorted(state.api_keys) == ["key-a", "key-c"]
        known = state.cluster()
        assert known is not None
        assert known.epoch == 1_800_000_000

    virtual(main())


def test_a_listing_that_was_due_when_a_term_began_is_not_made_in_it() -> None:
    async def main() -> None:
        async with following() as it:
            it.informer.follow_again()
            it.informer.audit_only()
            listings = it.store.listings
            await asyncio.sleep(A_WHILE_S)

            assert it.store.listings == listings

    virtual(main())
