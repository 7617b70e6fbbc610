"""What may be wrong with simulated etcd, seen through the product's own client."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from controlplane.store import keys
from controlplane.store.etcd_members import Limits
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.port import Fence, Put
from shared.errors import NovacronError, OutcomeUnknown, StoreFull
from tests.sim.cluster import METHODS
from tests.sim.etcd import Commit, EtcdHosts
from tests.sim.etcd_link import EtcdLink
from tests.sim.network import Network
from tests.sim.process import Process, adopt_by_context
from tests.sim.trace import Trace
from tests.sim.virtual_loop import run_virtual

KEY = f"{keys.ROOT}test"


class World:
    """Three members, and the client of one process; ``stores`` makes further ones."""

    def __init__(self) -> None:
        self.network = Network(random.Random(1), Trace(), METHODS)
        self.commits: list[Commit] = []
        self.hosts = EtcdHosts(3, random.Random(2), self.commits.append)
        self.process = Process("replica", "replica.1")
        self.store = self.new_store()
        self.fence = Fence(0, 0)

    def new_store(self) -> EtcdStore:
        links = [EtcdLink(self.network, self.process, each) for each in self.hosts.members]
        return EtcdStore(links, random.Random(3), Limits(watch_silence_s=2.0))

    async def lead(self) -> None:
        lease = await self.store.grant_lease(600)
        won = await self.store.campaign(b"me", lease)
        self.fence = Fence(won.leader.create_revision, 0)

    async def put(self, value: bytes) -> None:
        done = await self.store.commit(self.fence, (Put(KEY, value), Put(keys.MARK, value)))
        self.fence = Fence(self.fence.leader_revision, done.revision)


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await world.lead()
        await test(world)
        await world.store.close()
        await world.hosts.close()

    run_virtual(main(), adopt_by_context)


def test_a_lost_request_is_not_carried_out_and_nobody_can_tell() -> None:
    async def test(world: World) -> None:
        before = len(world.commits)
        world.hosts.lose_requests(1)
        with pytest.raises(OutcomeUnknown):
            await world.put(b"1")
        assert len(world.commits) == before
        await world.put(b"1")
        assert len(world.commits) == before + 1

    run(test)


def test_a_slow_disk_carries_out_what_its_client_has_given_up() -> None:
    async def test(world: World) -> None:
        before = len(world.commits)
        for member in world.hosts.members:
            member.slow_disk_s = (2.0, 2.0)
        with pytest.raises(OutcomeUnknown):
            await world.put(b"1")
        assert len(world.commits) == before
        await asyncio.sleep(3)
        assert len(world.commits) == before + 1

    run(test)


def test_a_member_that_is_behind_is_not_believed_by_who_knows_more() -> None:
    async def test(world: World) -> None:
        await world.put(b"old")
        for member in world.hosts.members:
            member.fall_behind()
        await world.put(b"new")
        with pytest.raises(NovacronError):
            await world.store.get(KEY)
        newcomer = world.new_store()
        found = await newcomer.get(KEY)
        assert found is not None
        assert found.value == b"old"
        await newcomer.close()

    run(test)


def test_a_silent_watch_is_found_and_taken_up_elsewhere() -> None:
    async def test(world: World) -> None:
        seen: list[bytes] = []

        async def follow() -> None:
            async for batch in world.store.watch(KEY, 1):
                seen.extend(item.value for item in batch.puts)

        following = world.process.spawn(follow(), "follow")
        await asyncio.sleep(1)
        world.hosts.members[0].watches_speak.clear()
        await world.put(b"1")
        await asyncio.sleep(1)
        assert seen == []
        await asyncio.sleep(10)
        assert seen == [b"1"]
        following.cancel()

    run(test)


def test_a_watch_that_leaves_something_out_looks_well() -> None:
    async def test(world: World) -> None:
        seen: list[bytes] = []

        async def follow() -> None:
            async for batch in world.store.watch(KEY, 1):
                seen.extend(item.value for item in batch.puts)

        following = world.process.spawn(follow(), "follow")
        await asyncio.sleep(1)
        for member in world.hosts.members:
            member.events_lost = 1.0
        await world.put(b"1")
        await asyncio.sleep(10)
        world.hosts.heal()
        await world.put(b"2")
        await asyncio.sleep(1)
        assert seen == [b"2"]
        assert world.process.missed_events
        following.cancel()

    run(test)


def test_a_full_store_takes_nothing_and_keeps_its_leases() -> None:
    async def test(world: World) -> None:
        lease = await world.store.grant_lease(5)
        world.hosts.run_full()
        for refused in (world.put(b"1"), world.store.grant_lease(5)):
            with pytest.raises(StoreFull):
                await refused
        assert await world.store.renew_lease(lease) > 0
        world.hosts.make_room()
        await world.put(b"1")

    run(test)


def test_leases_that_end_before_their_time_end_the_term() -> None:
    async def test(world: World) -> None:
        lease = await world.store.grant_lease(600)
        world.hosts.expire_leases(1)
        assert await world.store.get(keys.LEADER) is None
        assert await world.store.renew_lease(lease) > 0
        assert await world.store.renew_lease(lease) == 0

    run(test)
