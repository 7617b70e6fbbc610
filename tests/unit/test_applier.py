"""The one writer, over the real store client and a model etcd: groups, refusals, lost answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import pytest
from msgspec import Struct

from controlplane.commands.draft import Command, Draft
from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.applier import (
    GROUP_WRITES_MAX,
    WAITING_COMMANDS_MAX,
    Applier,
    TermOver,
)
from controlplane.store.informer import Informer
from controlplane.store.model_etcd import ModelEtcd
from controlplane.store.port import Fence, KeyValue, Put, Store
from shared.codec import pack, unpack
from shared.errors import (
    ChangeTooLarge,
    LeadershipLost,
    NameTaken,
    OutcomeUnknown,
    Overloaded,
    StateConflict,
    StoreFull,
    StoreUnavailable,
)
from shared.ids import IdSource
from shared.model import ApiKey, Applied, Term
from tests.contract.store_worlds import ModelCluster, World, model_world
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN, LEADER, CoreWorld

R = TypeVar("R")


class PutKeys(Struct):
    """Writes some small records, and one event; or is refused; or is too large to be sent."""

    names: tuple[str, ...]
    refused: bool = False
    filling: str = ""

    def decide(self, draft: Draft) -> int:
        for name in self.names:
            key = ApiKey(id=name, sha256=self.filling, principal="p", role="admin", created_at=BORN)
            draft.put(key)
        draft.event("key.put", "key", LEADER)
        if self.refused:
            raise StateConflict("not this one")
        return len(self.names)


class Take(Struct):
    """Writes one record, unless it is there already."""

    name: str

    def decide(self, draft: Draft) -> int:
        if draft.find(ApiKey, self.name) is not None:
            raise NameTaken(self.name)
        draft.put(ApiKey(id=self.name, sha256="", principal="p", role="admin", created_at=BORN))
        return 1


class Look(Struct):
    """Writes nothing, and tells whether a record is there."""

    name: str

    def decide(self, draft: Draft) -> bool:
        return draft.find(ApiKey, self.name) is not None


class Unwritable(Struct):
    """A command that is broken: what it writes has no bytes."""

    def decide(self, draft: Draft) -> None:
        draft.event("broken", "key", LEADER, what=object())


class Writer:
    """An applier of one term, running, with what it writes to."""

    def __init__(self, world: World, cluster: ModelCluster, fence: Fence) -> None:
        core = CoreWorld()
        self.world, self.cluster, self.fence = world, cluster, fence
        self.state = ClusterState()
        self.model: ModelEtcd = cluster.model
        self.writable = asyncio.Event()
        self.writable.set()
        self.applier = Applier(
            world.store,
            self.state,
            Term(1, fence.leader_revision),
            None,
            IdSource("abc123", core.clock, random.Random(1)),
            core.clock,
            self._until_writable,
        )
        self.running = asyncio.ensure_future(self.applier.run())

    async def _until_writable(self) -> None:
        await self.writable.wait()

    def submit(self, *names: str, **how: Any) -> asyncio.Future[int]:
        return self.ask(PutKeys(names, **how))

    def ask(self, command: Command[R]) -> asyncio.Future[R]:
        return asyncio.ensure_future(self.applier.submit(command))

    async def listed(self) -> ClusterState:
        state = ClusterState()
        await Informer(cast(Store, self.world.store), state).load(0)
        return state

    async def assert_memory_is_etcd(self) -> None:
        listed = await self.listed()
        assert listed.api_keys == self.state.api_keys
        assert listed.history == self.state.history
        assert sorted(listed.history) == list(range(1, len(listed.history) + 1))


@asynccontextmanager
async def writer() -> AsyncIterator[Writer]:
    async with model_world() as (world, cluster):
        made = Writer(world, cluster, await world.lead())
        try:
            yield made
        finally:
            made.running.cancel()
            await asyncio.gather(made.running, return_exceptions=True)


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


def test_what_waits_together_is_one_transaction() -> None:
    async def main() -> None:
        async with writer() as it:
            before = it.model.revision
            waiting = [it.submit(f"key-{number}") for number in range(20)]
            assert await asyncio.gather(*waiting) == [1] * 20
            assert it.model.revision == before + 1
            await it.assert_memory_is_etcd()

    virtual(main())


def test_changes_of_one_key_are_folded() -> None:
    async def main() -> None:
        async with writer() as it:
            await asyncio.gather(*(it.submit("key-same") for _ in range(10)))
            assert list(it.state.api_keys) == ["key-same"]
            await it.assert_memory_is_etcd()

    virtual(main())


def test_a_refused_command_leaves_the_group_and_the_numbers_dense() -> None:
    async def main() -> None:
        async with writer() as it:
            before = it.model.revision
            waiting = [it.submit(f"key-{n}", refused=n % 2 == 1) for n in range(8)]
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert [isinstance(end, StateConflict) for end in ends] == [False, True] * 4
            assert it.model.revision == before + 1
            assert sorted(it.state.api_keys) == ["key-0", "key-2", "key-4", "key-6"]
            await it.assert_memory_is_etcd()

    virtual(main())


def test_a_change_larger_than_a_group_is_refused_and_full_groups_follow_each_other() -> None:
    async def main() -> None:
        async with writer() as it:
            names = tuple(f"key-{number}" for number in range(GROUP_WRITES_MAX))
            with pytest.raises(ChangeTooLarge):
                await it.submit(*names)
            before = it.model.revision
            full = [it.submit(*names[:-1]), it.submit(*names[:-1]), it.submit("key-last")]
            assert await asyncio.gather(*full) == [GROUP_WRITES_MAX - 1] * 2 + [1]
            assert it.model.revision >= before + 2
            await it.assert_memory_is_etcd()

    virtual(main())


@pytest.mark.parametrize("culprit", ["too large", "unwritable"])
def test_one_that_cannot_be_written_does_not_take_the_others_along(culprit: str) -> None:
    async def main() -> None:
        async with writer() as it:
            good = [it.submit("key-a"), it.submit("key-b")]
            bad: Command[Any] = Unwritable()
            if culprit == "too large":
                bad = PutKeys(("key-huge",), filling="x" * 2**21)
            broken = asyncio.ensure_future(it.applier.submit(bad))
            good += [it.submit("key-c")]
            with pytest.raises(ChangeTooLarge if culprit == "too large" else TypeError):
                await broken
            assert await asyncio.gather(*good) == [1, 1, 1]
            await it.submit("key-d")
            await it.assert_memory_is_etcd()

    virtual(main())


def test_a_lost_answer_is_read_back_and_nothing_is_applied_twice() -> None:
    async def main() -> None:
        async with writer() as it:
            await it.submit("key-first")
            before = it.model.revision
            for switches in it.cluster.switches:
                switches.lose_answers_of = "txn"
            lost = it.submit("key-lost")
            await asyncio.sleep(1)
            assert it.model.revision == before + 1
            for switches in it.cluster.switches:
                switches.lose_answers_of = ""
            assert await lost == 1
            assert it.model.revision == before + 1
            assert await it.submit("key-next") == 1
            await it.assert_memory_is_etcd()

    virtual(main())


def test_what_uses_the_quota_up_is_acknowledged_when_it_was_written() -> None:
    """etcd refuses the write that fills it, and may have applied it all the same."""

    async def main() -> None:
        async with writer() as it:
            await it.submit("a")
            it.model.quota_bytes = it.model.size_bytes + 500
            assert await it.submit("b", filling="x" * 1000) == 1
            with pytest.raises(StoreFull):
                await it.submit("c")
            await it.assert_memory_is_etcd()
            assert sorted(it.state.api_keys) == ["a", "b"]
            it.model.quota_bytes = 0
            it.model.disarm()
            assert await it.submit("c") == 1
            await it.assert_memory_is_etcd()

    run_virtual(main())


def test_nothing_happened_when_no_member_could_be_reached() -> None:
    async def main() -> None:
        async with writer() as it:
            await it.submit("key-first")
            for index in range(3):
                it.cluster.kill(index)
            with pytest.raises(StoreUnavailable):
                await it.submit("key-second")
            for index in range(3):
                it.cluster.restart(index)
            await it.submit("key-third")
            assert sorted(it.state.api_keys) == ["key-first", "key-third"]
            await it.assert_memory_is_etcd()

    virtual(main())


def test_the_end_of_the_term_refuses_everything() -> None:
    async def main() -> None:
        async with writer() as it:
            await it.submit("key-first")
            await it.world.store.resign(it.fence.leader_revision)
            new = await it.world.lead()
            waiting = [it.submit("key-a"), it.submit("key-b")]
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(end, LeadershipLost) for end in ends)
            with pytest.raises(LeadershipLost):
                await it.running
            with pytest.raises(LeadershipLost):
                await it.submit("key-late")
            assert new.leader_revision > it.fence.leader_revision
            assert list((await it.listed()).api_keys) == ["key-first"]

    virtual(main())


@pytest.mark.parametrize("another", [pack(Applied(group="another", seq=1)), b"\xc1"])
def test_a_group_that_may_have_been_written_before_the_term_ended_is_unknown(
    another: bytes,
) -> None:
    async def main() -> None:
        async with writer() as it:
            before = it.model.revision
            for switches in it.cluster.switches:
                switches.lose_answers_of = "txn"
            lost = it.submit("key-lost")
            await asyncio.sleep(1)
            assert it.model.revision == before + 1
            # Somebody else wrote the mark meanwhile, and nobody can say what came before it.
            mark = await it.world.store.get(keys.MARK)
            assert mark is not None
            for switches in it.cluster.switches:
                switches.lose_answers_of = ""
            await it.world.store.commit(
                Fence(it.fence.leader_revision, mark.mod_revision),
                [Put(keys.MARK, another)],
            )
            with pytest.raises(OutcomeUnknown):
                await lost
            with pytest.raises(LeadershipLost):
                await it.running

    virtual(main())


def test_a_refusal_is_told_when_what_it_rests_on_is_committed() -> None:
    async def main() -> None:
        async with writer() as it:
            it.writable.clear()
            taker, late, reader = it.ask(Take("key")), it.ask(Take("key")), it.ask(Look("key"))
            await asyncio.sleep(1)
            assert not any(each.done() for each in (taker, late, reader))
            it.writable.set()
            with pytest.raises(NameTaken):
                await late
            assert (await taker, await reader) == (1, True)
            await it.assert_memory_is_etcd()

    virtual(main())


def test_nobody_is_refused_for_what_was_never_committed() -> None:
    async def main() -> None:
        async with writer() as it:
            await it.world.store.resign(it.fence.leader_revision)
            await it.world.lead()
            ends = await asyncio.gather(
                it.ask(Take("key")), it.ask(Take("key")), return_exceptions=True
            )
            assert [type(end) for end in ends] == [TermOver, TermOver]
            assert not (await it.listed()).api_keys

    virtual(main())


def test_what_is_refused_beside_an_unknown_outcome_has_changed_nothing() -> None:
    async def main() -> None:
        async with writer() as it:
            for index in range(3):
                it.cluster.stop(index)
            unknown, refused = it.ask(Take("key")), it.ask(Take("key"))
            await asyncio.sleep(0.2)
            it.running.cancel()
            with pytest.raises(OutcomeUnknown):
                await unknown
            with pytest.raises(LeadershipLost):
                await refused
            for index in range(3):
                it.cluster.resume(index)

    virtual(main())


def test_a_leader_that_may_lead_no_more_tells_nothing_from_memory() -> None:
    """It was suspended, and another may have written what makes this refusal wrong."""

    async def main() -> None:
        async with writer() as it:
            await it.ask(Take("key"))
            it.writable.clear()
            refused, looking = it.ask(Take("key")), it.ask(Look("key"))
            await asyncio.sleep(1)
            assert not any(each.done() for each in (refused, looking))
            it.running.cancel()
            ends = await asyncio.gather(refused, looking, return_exceptions=True)
            assert [type(end) for end in ends] == [LeadershipLost, LeadershipLost]

    virtual(main())


def test_a_suspended_leader_decides_but_does_not_write() -> None:
    async def main() -> None:
        async with writer() as it:
            before = it.model.revision
            it.writable.clear()
            waiting = it.submit("key-a")
            await asyncio.sleep(30)
            assert it.model.revision == before
            assert not it.state.api_keys
            it.writable.set()
            assert await waiting == 1

    virtual(main())


def test_a_stop_in_the_middle_of_a_commit_is_unknown_to_who_waits() -> None:
    async def main() -> None:
        async with writer() as it:
            for index in range(3):
                it.cluster.stop(index)
            waiting = it.submit("key-a")
            await asyncio.sleep(0.2)
            it.running.cancel()
            with pytest.raises(OutcomeUnknown):
                await waiting
            later = it.submit("key-b")
            await asyncio.sleep(0)
            it.applier.close(LeadershipLost("over"))
            with pytest.raises(LeadershipLost):
                await later
            for index in range(3):
                it.cluster.resume(index)

    virtual(main())


def test_a_stop_lets_the_commit_under_way_come_to_its_end() -> None:
    async def main() -> None:
        async with writer() as it:
            for index in range(3):
                it.cluster.stop(index)
            waiting = it.submit("key-a")
            await asyncio.sleep(0.1)
            it.running.cancel()
            await asyncio.sleep(0.1)
            assert not waiting.done()
            for index in range(3):
                it.cluster.resume(index)
            assert await waiting == 1
            with pytest.raises(asyncio.CancelledError):
                await it.running
            await it.assert_memory_is_etcd()

    virtual(main())


def test_who_stops_waiting_stops_nothing() -> None:
    async def main() -> None:
        async with writer() as it:
            gone, stays = it.submit("key-a"), it.submit("key-b")
            await asyncio.sleep(0)
            gone.cancel()
            assert await stays == 1
            await it.assert_memory_is_etcd()

    virtual(main())


def test_the_queue_is_bounded() -> None:
    async def main() -> None:
        async with writer() as it:
            it.writable.clear()
            first = it.submit("key-first")
            await asyncio.sleep(0.1)
            waiting = [it.submit("key-same") for _ in range(WAITING_COMMANDS_MAX)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await it.submit("key-over")
            it.writable.set()
            assert await first == 1
            assert await asyncio.gather(*waiting) == [1] * WAITING_COMMANDS_MAX

    virtual(main())


def test_the_mark_says_where_the_next_term_goes_on() -> None:
    async def main() -> None:
        async with writer() as it:
            await it.submit("key-a")
            await it.submit("key-b")
            mark = await it.world.store.get(keys.MARK)
            assert isinstance(mark, KeyValue)
            assert unpack(mark.value, Applied).seq == it.state.last_seq == 2

    virtual(main())
