"""Restoring into etcd: all or nothing that anybody would lead, wherever it is cut off."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import pytest
from msgspec.structs import replace

from controlplane.backup.format import Header
from controlplane.backup.into_etcd import RESTORING, Present, look, refusals, write
from controlplane.backup.restoration import Restoration, make_restoration
from controlplane.store import keys
from controlplane.store.history import History
from controlplane.store.port import Committed, Fence, NotCommitted, Put, Store, Write
from shared.codec import pack
from shared.errors import LeadershipLost, OutcomeUnknown, StoreError, StoreUnavailable
from shared.ids import IdSource
from shared.model import Cluster, LeaderKey, Replica
from shared.offload import inline
from tests.sim.virtual_loop import run_virtual
from tests.unit.backed_up import CLUSTER, Live, live, read, taken
from tests.unit.core_world import BORN, CELL, CoreWorld, HandClock

EPOCH = 1_800_000_000
VMS = 150


class Cut(Exception):
    """The restore's process is killed."""


class Failing:
    """A store that breaks, or loses answers, at the commits that a test names."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.commits = 0
        self.cut_before: int | None = None
        self.lose_answers_of: set[int] = set()
        self.refuse: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, fence: Fence, writes: Sequence[Write]) -> Committed | NotCommitted:
        self.commits += 1
        if self.commits == self.cut_before:
            raise Cut
        if self.commits in self.refuse:
            raise StoreUnavailable("no member answers")
        outcome = await self._store.commit(fence, writes)
        if self.commits in self.lose_answers_of:
            raise OutcomeUnknown("the answer was lost")
        return outcome


async def backup_of(it: Live, core: CoreWorld) -> tuple[Header, dict[str, bytes]]:
    await it.lead(core)
    summary, found, _ = read(await taken(it, History(None, inline)))
    return summary.header, found


def a_world() -> CoreWorld:
    core = CoreWorld()
    for number in range(VMS):
        core.create(f"web-{number}")
    return core


def restoration_of(header: Header, found: dict[str, bytes], epoch: int = EPOCH) -> Restoration:
    ids = IdSource(CELL, HandClock(), random.Random(3))
    return make_restoration(header, list(found.items()), epoch, BORN, ids)


def expected(restoration: Restoration) -> dict[str, bytes]:
    return {
        **{put.key: put.value for put in restoration.puts},
        keys.CLUSTER: pack(restoration.cluster),
        keys.MARK: pack(restoration.mark),
    }


async def a_replica_leads(it: Live) -> bool:
    """Whether a replica that campaigns wins, as one of any release would; give it back then."""
    lease = await it.store.grant_lease(60)
    campaign = await it.store.campaign(b"replica", lease)
    won = campaign.leader.lease == lease
    if won:
        await it.store.resign(campaign.leader.create_revision)
    return won


async def test_an_empty_etcd_holds_the_backup_afterwards() -> None:
    async with live() as it:
        header, found = await backup_of(it, a_world())
    async with live() as it:
        restoration = restoration_of(header, found)
        await write(it.store, restoration, "i1")
        assert await it.found() == expected(restoration)
        assert await a_replica_leads(it)


async def test_what_was_there_is_gone_afterwards() -> None:
    async with live() as it:
        header, found = await backup_of(it, a_world())
        stray = Put(f"{keys.STATE}vms/vm-other", b"x")
        mark = await it.store.get(keys.MARK)
        assert mark is not None
        fence = await it.world.lead()
        await it.store.commit(Fence(fence.leader_revision, mark.mod_revision), [stray])
        await it.store.resign(fence.leader_revision)
        restoration = restoration_of(header, found)
        await write(it.store, restoration, "i1")
        assert await it.found() == expected(restoration)


def test_wherever_it_is_cut_off_nobody_leads_and_it_can_be_run_again() -> None:
    async def main() -> None:
        async with live() as it:
            header, found = await backup_of(it, a_world())
            restoration = restoration_of(header, found)
            whole = Failing(it.store)
            await write(cast(Store, whole), restoration, "i0")
            assert whole.commits > 6
            for cut in range(1, whole.commits + 1):
                await write(it.store, restoration, f"before-{cut}")
                failing = Failing(it.store)
                failing.cut_before = cut
                with pytest.raises(Cut):
                    await write(cast(Store, failing), restoration, f"cut-{cut}")
                present = await look(it.store)
                assert (present.leader, present.cut_off) == (RESTORING, True)
                assert not await a_replica_leads(it)
                assert not list(refusals(header, present, CLUSTER, BORN, replace=False))
            again = restoration_of(header, found, EPOCH + 1)
            await write(it.store, again, "again")
            assert await it.found() == expected(again)
            assert await a_replica_leads(it)

    run_virtual(main())


def test_answers_that_are_lost_change_nothing() -> None:
    async def main() -> None:
        async with live() as it:
            header, found = await backup_of(it, a_world())
            restoration = restoration_of(header, found)
            failing = Failing(it.store)
            failing.lose_answers_of = set(range(1, 1000, 2))
            failing.refuse = set(range(1, 1000, 3))
            await write(cast(Store, failing), restoration, "i1")
            assert await it.found() == expected(restoration)
            assert await a_replica_leads(it)

    run_virtual(main())


def test_a_replica_that_leads_before_the_last_answer_is_no_failure() -> None:
    async def main() -> None:
        async with live() as it:
            header, found = await backup_of(it, CoreWorld())
            restoration = restoration_of(header, found)

            class Overtaken(Failing):
                async def commit(
                    self, fence: Fence, writes: Sequence[Write]
                ) -> Committed | NotCommitted:
                    outcome = await super().commit(fence, writes)
                    last = any(each.key == keys.LEADER for each in writes)
                    if last and isinstance(outcome, Committed):
                        leader = await it.world.lead()
                        mark = await it.store.get(keys.MARK)
                        assert mark is not None
                        own = Fence(leader.leader_revision, mark.mod_revision)
                        await it.store.commit(own, [Put(keys.MARK, b"a replica's")])
                        raise OutcomeUnknown("the answer was lost")
                    return outcome

            await write(cast(Store, Overtaken(it.store)), restoration, "i1")
            assert (await it.found())[keys.CLUSTER] == pack(restoration.cluster)

    run_virtual(main())


def test_of_two_restores_only_the_later_one_goes_on() -> None:
    async def main() -> None:
        async with live() as it:
            header, found = await backup_of(it, a_world())
            first, second = restoration_of(header, found), restoration_of(header, found, EPOCH + 1)

            class Meanwhile(Failing):
                async def commit(
                    self, fence: Fence, writes: Sequence[Write]
                ) -> Committed | NotCommitted:
                    outcome = await super().commit(fence, writes)
                    if self.commits == 3:
                        half = Failing(it.store)
                        half.cut_before = 4
                        with pytest.raises(Cut):
                            await write(cast(Store, half), second, "second")
                    return outcome

            with pytest.raises(LeadershipLost, match="another restore"):
                await write(cast(Store, Meanwhile(it.store)), first, "first")
            assert not await a_replica_leads(it)
            await write(it.store, second, "third")
            assert await it.found() == expected(second)

    run_virtual(main())


async def test_nothing_is_written_while_a_replica_leads() -> None:
    async with live() as it:
        header, found = await backup_of(it, CoreWorld())
        before = await it.found()
        await it.world.lead()
        with pytest.raises(LeadershipLost, match="replica leads"):
            await write(it.store, restoration_of(header, found), "i1")
        after = await it.found()
        del after[keys.LEADER]
        assert after == before


async def test_an_etcd_that_holds_something_else_than_was_written_is_not_let_go() -> None:
    async with live() as it:
        header, found = await backup_of(it, CoreWorld())

        class Forgetful(Failing):
            async def list(self, prefix: str, **given: Any) -> Any:
                listing = await it.store.list(prefix, **given)
                nodes = f"{keys.STATE}nodes/"
                kept = tuple(item for item in listing.items if not item.key.startswith(nodes))
                return replace(listing, items=kept)

        with pytest.raises(StoreError):
            await write(cast(Store, Forgetful(it.store)), restoration_of(header, found), "i1")
        assert not await a_replica_leads(it)


def test_an_etcd_that_never_answers_is_given_up() -> None:
    async def main() -> None:
        async with live() as it:
            header, found = await backup_of(it, CoreWorld())
            failing = Failing(it.store)
            failing.refuse = set(range(2, 1000))
            with pytest.raises(StoreUnavailable):
                await write(cast(Store, failing), restoration_of(header, found), "i1")

    run_virtual(main())


# --- what stands against it -----------------------------------------------------------------------

HEADER = Header(
    cluster=CLUSTER.id,
    cell=CELL,
    epoch=1,
    revision=5,
    schema_level=2,
    release="0.2.0",
    made_at=BORN,
)


def against(header: Header | None = HEADER, present: Present | None = None, **given: Any) -> Any:
    asked: dict[str, Any] = {"replace": False, "now": BORN, "own": CLUSTER} | given
    found = refusals(
        header,
        present or Present(),
        asked["own"],
        asked["now"],
        replace=asked["replace"],
    )
    return [fault.code for fault in found]


def test_nothing_stands_against_an_empty_etcd() -> None:
    assert against() == []


def test_everything_that_stands_against_it_is_told_at_once() -> None:
    present = Present(leader="r1", replicas=("r1", "r2"), cluster=CLUSTER, keys=7)
    other: Cluster = replace(CLUSTER, id="cluster-2", cell="zzz999")
    found = against(
        replace(HEADER, schema_level=3),
        present,
        own=other,
        now=BORN - timedelta(seconds=1),
    )
    assert found == ["other_cell", "too_new", "behind", "leads", "runs", "runs", "not_empty"]
    assert against(None, present) == ["leads", "runs", "runs", "not_empty"]


def test_a_cluster_that_is_there_is_replaced_only_when_asked_for() -> None:
    present = Present(cluster=CLUSTER, keys=7)
    assert against(present=present) == ["not_empty"]
    assert against(present=present, replace=True) == []
    assert against(present=Present(keys=1)) == ["not_empty"]


def test_the_same_cell_of_another_cluster_is_another() -> None:
    assert against(own=replace(CLUSTER, id="cluster-2")) == ["other_cell"]


async def test_what_is_there_is_seen() -> None:
    async with live() as it:
        assert await look(it.store) == Present()
        await it.lead(CoreWorld())
        lease = await it.store.grant_lease(60)
        leader = LeaderKey(replica="r1", incarnation="i1")
        await it.store.campaign(pack(leader), lease)
        registration = Replica(
            name="r1",
            incarnation="i1",
            url="",
            agent_address="",
            version="0.2.0",
            started_at=BORN,
        )
        await it.store.register_replica("r1", pack(registration), lease)
        present = await look(it.store)
        assert (present.leader, present.replicas, present.cut_off) == ("r1", ("r1",), False)
        assert present.cluster == CLUSTER
        found: dict[str, bytes] = await it.found()
        assert present.keys == len(found) - 2


async def test_a_leader_key_that_does_not_decode_is_somebodys() -> None:
    async with live() as it:
        await it.world.lead()
        present = await look(it.store)
        assert (present.leader, present.cut_off) == ("?", False)
