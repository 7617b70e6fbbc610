"""Terms over a model etcd and a virtual clock: won, suspended, taken up again, given back, lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, cast

import pytest
from msgspec.structs import replace

from controlplane.election import (
    STAND_BACK_S,
    Election,
    ElectionSettings,
    Reign,
    SteppedDown,
)
from controlplane.state import Changes
from controlplane.store import keys
from controlplane.store.port import Store
from shared.codec import pack, unpack
from shared.errors import LeadershipLost, OutcomeUnknown, ReleaseTooOld
from shared.model import LeaderKey
from tests.contract.store_worlds import ModelCluster, World, model_world
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN

SETTINGS = ElectionSettings()
# A lease, a look at the key and the jitter before the next campaign.
TAKEOVER_S = SETTINGS.lease_ttl_s + 3.0


class LoopClock:
    """Elapsed time is the loop's, plus what a machine slept."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def now(self) -> datetime:
        return BORN

    def boottime_s(self) -> float:
        return asyncio.get_running_loop().time() + self.slept_s


class Candidate:
    """A replica that stands for election and notes its terms."""

    def __init__(
        self, store: Store, name: str, incarnation: str, seed: int, settings: ElectionSettings
    ) -> None:
        self.store = store
        self.clock = LoopClock()
        self.me = LeaderKey(replica=name, incarnation=incarnation)
        self.key_changes = Changes()
        self.election = Election(
            store, self.me, settings, self.clock, random.Random(seed), self.key_changes.next
        )
        self.terms: list[int] = []
        self.reign: Reign | None = None
        self.fails_with: Exception | None = None
        self.ended = asyncio.get_running_loop().create_future()
        self.unfit = ""
        self.running = asyncio.ensure_future(self.election.run(self._lead, lambda: self.unfit))

    @property
    def leads(self) -> bool:
        return self.reign is not None

    async def _lead(self, reign: Reign) -> None:
        self.terms.append(reign.leader_revision)
        self.reign = reign
        try:
            if self.fails_with is not None:
                error, self.fails_with = self.fails_with, None
                self.unfit = str(error) if isinstance(error, ReleaseTooOld) else ""
                raise error
            await asyncio.shield(self.ended)
        finally:
            self.reign = None

    def end_with(self, error: Exception) -> None:
        """End the term under way; the next ones go on."""
        ended, self.ended = self.ended, asyncio.get_running_loop().create_future()
        ended.set_exception(error)

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


class Cluster:
    def __init__(self, world: World, model: ModelCluster) -> None:
        self.world, self.model = world, model
        self.candidates: list[Candidate] = []

    def stand(
        self, name: str, incarnation: str = "1", settings: ElectionSettings = SETTINGS
    ) -> Candidate:
        store = cast(Store, self.world.new_store())
        made = Candidate(store, name, incarnation, len(self.candidates), settings)
        self.candidates.append(made)
        return made

    async def key(self) -> LeaderKey | None:
        found = await self.world.store.get(keys.LEADER)
        return None if found is None else unpack(found.value, LeaderKey)

    def lose(self, call: str) -> None:
        for switches in self.model.switches:
            switches.lose_answers_of = call


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    async with model_world() as (world, model):
        made = Cluster(world, model)
        try:
            yield made
        finally:
            for candidate in made.candidates:
                await candidate.stop()
                await candidate.store.close()


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


async def writable(candidate: Candidate) -> bool:
    """Return whether the candidate's reign lets a write pass at once."""
    assert candidate.reign is not None
    passing = asyncio.ensure_future(candidate.reign.until_writable())
    await asyncio.sleep(0)
    passed = passing.done()
    passing.cancel()
    return passed


def test_one_leads_and_the_other_knows_who() -> None:
    async def main() -> None:
        async with cluster() as it:
            first, second = it.stand("r1"), it.stand("r2")
            await asyncio.sleep(60)
            assert [first.leads, second.leads].count(True) == 1
            leader, other = (first, second) if first.leads else (second, first)
            assert len(leader.terms) == 1
            known = other.election.leader
            assert known is not None
            assert known == leader.election.leader == replace(leader.me, since=BORN)
            assert other.election.leader_revision == leader.terms[0]
            assert await writable(leader)

    virtual(main())


def test_when_a_leader_stops_the_term_is_given_back_at_once() -> None:
    async def main() -> None:
        async with cluster() as it:
            first = it.stand("r1")
            await asyncio.sleep(3)
            await first.stop()
            assert await it.key() is None

    virtual(main())


def test_a_leader_that_is_stopped_while_it_steps_down_still_gives_the_term_back() -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            await asyncio.sleep(3)
            members = range(len(it.model.switches))
            for member in members:
                it.model.stop(member)
            leader.end_with(SteppedDown("asked to stop"))
            await asyncio.sleep(0.05)
            leader.running.cancel()
            await asyncio.sleep(0.05)
            assert not leader.running.done()
            for member in members:
                it.model.resume(member)
            await asyncio.wait({leader.running})
            assert await it.key() is None

    virtual(main())


def test_a_term_of_an_earlier_process_is_given_back_before_the_first_campaign() -> None:
    async def main() -> None:
        async with cluster() as it:
            lease = await it.world.store.grant_lease(60)
            await it.world.store.campaign(pack(LeaderKey(replica="r1", incarnation="1")), lease)
            await _newly_started(it, "r2").give_back()
            assert await it.key() is not None, "another replica's term is not ours to give back"
            await _newly_started(it, "r1").give_back()
            assert await it.key() is None

    virtual(main())


def _newly_started(it: Cluster, name: str) -> Election:
    me = LeaderKey(replica=name, incarnation="2")
    store = cast(Store, it.world.store)
    return Election(store, me, SETTINGS, LoopClock(), random.Random(1), Changes().next)


def test_who_follows_stands_as_soon_as_the_watch_shows_that_the_key_is_gone() -> None:
    seldom = replace(SETTINGS, follower_look_s=3600.0)

    async def main() -> None:
        async with cluster() as it:
            first = it.stand("r1")
            await asyncio.sleep(3)
            second = it.stand("r2", settings=seldom)
            await asyncio.sleep(3)
            await first.stop()
            await asyncio.sleep(60)
            assert not second.leads, "nothing has told it"
            second.key_changes.notify()
            await asyncio.sleep(1)
            assert second.leads

    virtual(main())


def test_a_leader_that_stepped_down_leaves_the_key_to_the_others() -> None:
    async def main() -> None:
        async with cluster() as it:
            first = it.stand("r1")
            await asyncio.sleep(3)
            second = it.stand("r2")
            first.end_with(SteppedDown("asked to"))
            await asyncio.sleep(STAND_BACK_S)
            assert second.leads
            assert first.terms[1:] == []
            await asyncio.sleep(60)
            assert first.election.leader == second.election.leader
            await second.stop()
            await asyncio.sleep(TAKEOVER_S)
            assert first.leads, "it stands again when it is needed"

    virtual(main())


def test_a_leader_that_stepped_down_leads_again_where_nobody_else_does() -> None:
    async def main() -> None:
        async with cluster() as it:
            alone = it.stand("r1")
            await asyncio.sleep(3)
            alone.end_with(SteppedDown("asked to"))
            await asyncio.sleep(0.05)
            assert await it.key() is None, "it did not wait for the lease"
            await asyncio.sleep(STAND_BACK_S / 2)
            assert not alone.leads
            await asyncio.sleep(STAND_BACK_S)
            assert alone.leads
            assert len(alone.terms) == 2

    virtual(main())


def test_writes_are_suspended_when_renewals_stop_and_go_on_in_the_same_term() -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            await asyncio.sleep(3.5)
            it.lose("lease_keep_alive")
            await asyncio.sleep(SETTINGS.suspend_after_s + 1.1)
            assert leader.leads
            assert not await writable(leader)
            it.lose("")
            await asyncio.sleep(5)
            assert await writable(leader)
            assert len(leader.terms) == 1

    virtual(main())


def test_after_a_gap_a_renewal_alone_proves_nothing() -> None:
    """The key must be read back as our own, and reading it must work."""

    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            await asyncio.sleep(3.5)
            leader.clock.slept_s += 60  # the machine slept; etcd, by its own clock, did not notice
            assert not await writable(leader)
            it.lose("range")
            await asyncio.sleep(3)
            assert leader.leads
            assert not await writable(leader)
            it.lose("")
            await asyncio.sleep(6)
            assert await writable(leader)
            assert len(leader.terms) == 1

    virtual(main())


def test_a_leader_that_was_paused_too_long_has_lost_its_term() -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            await asyncio.sleep(3)
            for index in range(3):
                it.model.stop(index)
            await asyncio.sleep(30)
            assert leader.reign is None or not await writable(leader)
            for index in range(3):
                it.model.resume(index)
            await asyncio.sleep(TAKEOVER_S)
            assert leader.leads
            assert len(leader.terms) == 2
            assert leader.terms == sorted(leader.terms)

    virtual(main())


def test_a_key_of_a_dead_process_of_this_replica_is_resigned_at_once() -> None:
    async def main() -> None:
        async with cluster() as it:
            lease = await it.world.store.grant_lease(3600)
            dead = LeaderKey(replica="r1", incarnation="0")
            await it.world.store.campaign(pack(dead), lease)
            other = it.stand("r2")
            await asyncio.sleep(30)
            assert not other.leads, "another replica's key is left alone"

            again = it.stand("r1", "1")
            await asyncio.sleep(3)
            assert again.leads or other.leads

    virtual(main())


def test_a_term_that_ended_early_is_not_waited_for() -> None:
    """Its key lives on under the lease, and nobody holds it."""

    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            leader.fails_with = LeadershipLost("the mark is another's")
            await asyncio.sleep(3)
            assert leader.leads
            assert len(leader.terms) == 2

    virtual(main())


def test_a_campaign_whose_answer_was_lost_is_not_waited_for() -> None:
    async def main() -> None:
        async with cluster() as it:
            it.lose("txn")
            leader = it.stand("r1")
            await asyncio.sleep(2)
            assert not leader.leads
            it.lose("")
            await asyncio.sleep(4)
            assert leader.leads

    virtual(main())


def test_while_nobody_can_stand_nobody_leads_and_it_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            await asyncio.sleep(3)
            other = it.stand("r2")
            await asyncio.sleep(3)
            assert other.election.leader == leader.election.leader
            it.model.model.full = True
            await leader.stop()
            await asyncio.sleep(60)
            assert other.terms == []
            assert other.election.leader is None
            it.model.model.disarm()
            await asyncio.sleep(1)
            assert other.leads

    virtual(main())
    told = [each for each in caplog.records if "the campaign failed" in each.message]
    assert len(told) == 1


def test_an_error_of_the_store_ends_the_term_and_not_the_process() -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            leader.fails_with = OutcomeUnknown("while taking over")
            await asyncio.sleep(10)
            assert leader.leads
            assert not leader.running.done()

    virtual(main())


def test_one_that_has_retired_never_stands_and_still_knows_who_leads() -> None:
    async def main() -> None:
        async with cluster() as it:
            retired = it.stand("r1")
            retired.election.retire()
            await asyncio.sleep(60)
            new = it.stand("r2")
            await asyncio.sleep(TAKEOVER_S)
            assert new.leads
            assert retired.election.leader == new.election.leader
            await new.stop()
            await asyncio.sleep(60)
            assert retired.terms == []
            assert retired.election.leader is None
            assert await it.key() is None

    virtual(main())


def test_one_that_is_unfit_never_stands_and_still_knows_who_leads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with cluster() as it:
            old = it.stand("r1")
            old.unfit = "the cluster is too new"
            await asyncio.sleep(60)
            assert old.terms == []
            assert await it.key() is None
            new = it.stand("r2")
            await asyncio.sleep(TAKEOVER_S)
            assert new.leads
            assert old.election.leader == new.election.leader
            old.unfit = ""
            await new.stop()
            await asyncio.sleep(TAKEOVER_S)
            assert old.leads

    virtual(main())
    told = [record for record in caplog.records if "the cluster is too new" in record.message]
    assert len(told) == 1


def test_one_that_finds_itself_too_old_on_takeover_resigns_at_once() -> None:
    async def main() -> None:
        async with cluster() as it:
            old = it.stand("r1")
            old.fails_with = ReleaseTooOld("the cluster is too new")
            # The key is gone before its lease could have run out.
            await asyncio.sleep(SETTINGS.lease_ttl_s / 2)
            assert len(old.terms) == 1
            assert await it.key() is None
            await asyncio.sleep(60)
            assert len(old.terms) == 1

    virtual(main())


def test_anything_else_ends_the_process() -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            leader.fails_with = ZeroDivisionError("a bug")
            with pytest.raises(ZeroDivisionError):
                await leader.running

    virtual(main())


def test_a_vanished_key_is_noticed_after_a_gap() -> None:
    async def main() -> None:
        async with cluster() as it:
            leader = it.stand("r1")
            await asyncio.sleep(3)
            first = leader.terms[0]
            await it.world.store.resign(first)
            leader.clock.slept_s += 60
            await asyncio.sleep(TAKEOVER_S)
            assert leader.leads
            assert leader.terms[-1] > first

    virtual(main())
