"""What a node tells of all its domains, and what must have ended before it does."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent.reconciler import SURVEY_LIMIT_S
from shared.errors import HypervisorUnavailable
from shared.model import ObservedPower, Term
from shared.moves import EndState, MigrationStage
from shared.protocol import Intent, Sighting
from tests.unit.agent_world import VM, Node, node, virtual
from tests.unit.core_world import desired
from tests.unit.migration_pair import (
    A_WHILE_S,
    DESTINATION,
    FOR_EVER_S,
    NEW,
    OLD,
    SOURCE,
    TIMES,
    Pair,
    pair,
)

LATER = Term(9, 1)


async def survey(of: Node) -> list[Sighting]:
    """Have a node accept a later epoch, and return what it tells then."""
    await of.fence.accept_term(LATER)
    told = await of.agent.survey()
    assert (told.boot_id, told.epoch) == ("boot-1", LATER.epoch)
    return list(told.domains)


def seen(generation: int, end: EndState, **changes: object) -> Sighting:
    power = ObservedPower.RUNNING if end is EndState.RUNNING else ObservedPower.PAUSED
    return replace(Sighting(vm_id=VM, generation=generation, end=end, power=power), **changes)


def test_a_survey_tells_what_runs_and_what_rests() -> None:
    async def main() -> None:
        async with node() as it:
            assert await survey(it) == []
            await it.wants(term=LATER)
            assert await survey(it) == [seen(1, EndState.RUNNING)]
            await it.wants(term=LATER, intent=Intent.STOP, revision=11)
            rests = seen(1, EndState.DOWN, power=ObservedPower.STOPPED)
            assert await survey(it) == [rests]

    virtual(main())


def test_what_an_earlier_epoch_wanted_is_not_done_any_more() -> None:
    async def main() -> None:
        async with node() as it:
            it.hooks.hold_before["define"] = asyncio.Event()
            it.agent.take(desired())
            await asyncio.sleep(1)
            await it.fence.accept_term(LATER)
            told = asyncio.ensure_future(it.agent.survey())
            await asyncio.sleep(1)
            assert not told.done(), "its worker is still at libvirt"
            it.hooks.hold_before.pop("define").set()
            (rests,) = (await told).domains
            assert (rests.generation, rests.end) == (1, EndState.DOWN)
            await asyncio.sleep(100)
            assert "start" not in it.hooks.acts
            assert it.agent.known() == ()

    virtual(main())


def test_a_node_whose_libvirt_hangs_tells_nothing() -> None:
    async def main() -> None:
        async with node() as it:
            it.hooks.hold_before["start"] = asyncio.Event()
            it.agent.take(desired())
            await asyncio.sleep(1)
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(HypervisorUnavailable):
                await survey(it)
            assert asyncio.get_running_loop().time() == began_s + SURVEY_LIMIT_S

    virtual(main())


def test_what_the_present_epoch_wants_goes_on_meanwhile() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants(term=LATER)
            await survey(it)
            assert [known.power for known in it.agent.known()] == [ObservedPower.RUNNING]

    virtual(main())


async def on_its_way(it: Pair) -> None:
    it.fabric.times = replace(TIMES, transfer_s=FOR_EVER_S)
    await it.prepare()
    it.tell(SOURCE, MigrationStage.TRANSFER)
    await it.until_end(DESTINATION, EndState.INCOMING)


def test_both_ends_of_a_move_say_that_it_is_under_way() -> None:
    async def main() -> None:
        async with pair() as it:
            await on_its_way(it)
            (leaves,) = await survey(it.one)
            (comes,) = await survey(it.two)
            assert (leaves.generation, leaves.end) == (OLD, EndState.MOVING)
            assert (comes.generation, comes.end) == (NEW, EndState.INCOMING)
            assert leaves.departing
            assert not comes.departing

    virtual(main())


def test_a_move_that_libvirt_has_not_been_told_of_yet_is_under_way() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            it.one.hooks.hold_before["migrate"] = asyncio.Event()
            it.tell(SOURCE, MigrationStage.TRANSFER)
            await asyncio.sleep(A_WHILE_S)
            assert await it.end(SOURCE) is EndState.RUNNING
            (leaves,) = await survey(it.one)
            assert leaves.end is EndState.MOVING
            it.one.hooks.hold_before.pop("migrate").set()
            await asyncio.sleep(TIMES.prepare_s + TIMES.transfer_s + A_WHILE_S)
            assert await survey(it.one) == []
            (arrived,) = await survey(it.two)
            assert (arrived.generation, arrived.end) == (NEW, EndState.RUNNING)

    virtual(main())


def test_a_guest_that_came_back_from_a_move_is_held_and_said_to_be_departing() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.arrive_unheard()
            it.fabric.relays[f"{VM}.{NEW}"].end()
            await asyncio.sleep(1)
            assert await survey(it.one) == [seen(OLD, EndState.HELD, departing=True)]
            assert await survey(it.two) == [seen(NEW, EndState.RUNNING)]
            # What an earlier epoch ordered is forgotten, and the guest is held all the same.
            await asyncio.sleep(100)
            assert it.running() == {"two": NEW}

    virtual(main())
