"""EtcdStore over members that fail: what is repeated, what is told, which member is used next."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from controlplane.store import keys
from controlplane.store.etcd_members import Limits
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.etcd_rpc import PutOp, Txn, WatchAnswer, WatchStart, prefix_end
from controlplane.store.model_etcd import ModelEtcd
from controlplane.store.model_member import ModelMember
from controlplane.store.port import Committed, NotCommitted, Put, WatchBatch
from shared.errors import Compacted, OutcomeUnknown, StoreUnavailable
from tests.contract.store_worlds import CALL_S, ModelCluster, Switches, World, model_world

VM = f"{keys.STATE}vms/one"
BRIEF = Limits(attempt_s=0.1, total_s=0.4)


@pytest.fixture
async def world_and_cluster() -> AsyncIterator[tuple[World, ModelCluster]]:
    async with model_world() as made:
        yield made


Made = tuple[World, ModelCluster]


async def test_a_lost_answer_is_an_unknown_outcome(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.lead()
    writes = [Put(keys.MARK, b"1"), Put(VM, b"")]
    _switch_all(cluster, "txn")

    with pytest.raises(OutcomeUnknown):
        await world.store.commit(fence, writes)
    _switch_all(cluster, "")

    again = await world.store.commit(fence, writes)
    assert isinstance(again, NotCommitted)
    assert again.mark is not None
    assert again.mark.mod_revision == cluster.model.revision
    assert sum(spy.calls.count("txn") for spy in world.spies) == 3


async def test_a_request_may_be_executed_after_its_deadline(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.lead()
    revision = cluster.model.revision
    await _stop_the_one_in_use(world, cluster)

    with pytest.raises(OutcomeUnknown):
        await world.store.commit(fence, [Put(keys.MARK, b"1")])
    assert cluster.model.revision == revision
    done = await world.store.commit(fence, [Put(keys.MARK, b"2")])
    for index in range(3):
        cluster.resume(index)
    await asyncio.sleep(0.05)

    assert isinstance(done, Committed)
    mark = await world.store.get(keys.MARK)
    assert mark is not None
    assert mark.value == b"2"
    assert cluster.model.revision == done.revision


async def test_a_member_that_is_down_costs_nothing(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.lead()
    for index in (0, 1):
        for switches in cluster.switches:
            switches.down = False
        cluster.kill(index)
        fence = await world.commit(fence, Put(VM, b""))


async def test_a_failed_member_is_used_again_only_after_a_probe(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    await world.store.get(VM)
    cluster.kill(0)
    await world.store.get(VM)
    cluster.restart(0)
    calls = len(world.spies[0].calls)
    for _ in range(5):
        await world.store.get(VM)
    assert len(world.spies[0].calls) == calls

    cluster.kill(1)
    cluster.kill(2)
    await world.store.get(VM)
    # The probe, and the read that follows it.
    assert len(world.spies[0].calls) == calls + 2


async def test_with_all_members_down_nothing_happened(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.lead()
    store = world.new_store(BRIEF)
    for index in range(3):
        cluster.kill(index)
    with pytest.raises(StoreUnavailable):
        await store.commit(fence, [Put(keys.MARK, b"")])
    with pytest.raises(StoreUnavailable):
        await store.get(VM)
    for index in range(3):
        cluster.restart(index)
    assert isinstance(await store.commit(fence, [Put(keys.MARK, b"")]), Committed)


async def test_a_campaign_whose_answer_was_lost_is_repeated(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    lease = await world.store.grant_lease(60)
    cluster.switches[0].lose_answers_of = "txn"

    won = await world.store.campaign(b"me", lease)

    assert won.leader.lease == lease
    assert won.leader.create_revision == won.leader.mod_revision == won.revision


async def test_a_repeated_write_stays_unknown_when_no_answer_comes(
    world_and_cluster: Made,
) -> None:
    world, cluster = world_and_cluster
    store = world.new_store(BRIEF)
    lease = await store.grant_lease(60)
    _switch_all(cluster, "txn")
    with pytest.raises(OutcomeUnknown):
        await store.register_replica("r1", b"", lease)
    assert await store.get(keys.replica_key("r1")) is not None


async def test_a_stale_member_is_not_believed(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.commit(await world.lead(), Put(VM, b"old"))
    fence = await world.commit(fence, Put(VM, b"new"))
    cluster.switches[0].stale_by = 1

    item = await world.store.get(VM)
    assert item is not None
    assert item.value == b"new"
    # A store that knows nothing yet must be told how new is new enough.
    fresh = world.new_store()
    listing = await fresh.list(keys.STATE, revision_min=fence.mark_revision)
    assert [item.value for item in listing.items] == [b"new"]


async def test_a_member_of_another_cluster_is_refused() -> None:
    ours, foreign = ModelEtcd(), ModelEtcd(cluster_id=99)
    switches = Switches()
    store = EtcdStore(
        [ModelMember(ours, 1, switches), ModelMember(foreign, 1)], random.Random(0), BRIEF
    )
    await store.get(VM)
    switches.down = True

    with pytest.raises(StoreUnavailable, match="no etcd member"):
        await store.get(VM)
    members = await store.members()
    assert [member.reachable for member in members] == [False, False]
    assert "cluster" in members[1].problem
    await store.close()


async def test_a_watch_that_breaks_often_misses_nothing(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.lead()
    first = fence.leader_revision + 1
    batches: list[WatchBatch] = []

    async def collect() -> None:
        async with aclosing(world.store.watch(keys.STATE, first)) as watching:
            async for batch in watching:
                batches.extend([batch] if batch.puts else [])
                if len(batches) == 30:
                    return

    task = asyncio.create_task(collect())
    async with asyncio.timeout(CALL_S):
        for number in range(30):
            cluster.restart((number - 1) % 3)
            cluster.kill(number % 3)
            fence = await world.commit(fence, Put(VM, b"%d" % number))
        cluster.restart(2)
        await task

    assert [batch.revision for batch in batches] == list(range(first, first + 30))
    assert [batch.puts[0].value for batch in batches] == [b"%d" % number for number in range(30)]


async def test_a_watch_that_cannot_go_on_says_so(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    fence = await world.commit(await world.lead(), Put(VM, b""))
    async with aclosing(world.store.watch(keys.STATE, fence.mark_revision)) as watching:
        await anext(watching)
        for index in range(3):
            cluster.kill(index)
        for revision in range(3):
            cluster.model.txn(Txn((), (PutOp(VM, b"%d" % revision),)))
        cluster.model.compact(cluster.model.revision)
        for index in range(3):
            cluster.restart(index)
        cluster.switches[0].down = True
        with pytest.raises(Compacted):
            await _read_on(watching)


async def test_the_model_answers_progress_before_events(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    await world.commit(await world.lead(), Put(VM, b""))
    stream = await world.rpcs[0].watch(WatchStart(VM, prefix_end(VM), 1), CALL_S)
    await stream.send_progress_request()

    answers: list[WatchAnswer] = [await stream.receive() for _ in range(3)]
    await stream.close()

    assert [answer.created for answer in answers] == [True, False, False]
    assert answers[1].header.revision == cluster.model.revision
    assert [len(answer.events) for answer in answers] == [0, 0, 1]


async def test_a_new_leader_of_etcd_refreshes_leases(world_and_cluster: Made) -> None:
    world, cluster = world_and_cluster
    lease = await world.store.grant_lease(2)
    term = (await world.store.members())[0].raft_term

    await asyncio.sleep(1.5)
    cluster.model.change_leader(2)
    await asyncio.sleep(1.0)

    assert await world.store.renew_lease(lease) > 0
    members = await world.store.members()
    assert [member.is_leader for member in members] == [False, True, False]
    assert members[0].raft_term == term + 1


async def _read_on(watching: AsyncIterator[WatchBatch]) -> None:
    async with asyncio.timeout(CALL_S):
        async for _ in watching:
            pass


def _switch_all(cluster: ModelCluster, lose_answers_of: str) -> None:
    for switches in cluster.switches:
        switches.lose_answers_of = lose_answers_of


async def _stop_the_one_in_use(world: World, cluster: ModelCluster) -> None:
    before = [len(spy.calls) for spy in world.spies]
    await world.store.get(VM)
    (used,) = [
        spy.index for spy, count in zip(world.spies, before, strict=True) if len(spy.calls) > count
    ]
    cluster.stop(used)
