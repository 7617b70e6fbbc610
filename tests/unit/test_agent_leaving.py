"""What a source does with its guest once the move is over: hold it, let it go on, or leave it."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent.relay import RelayTarget
from shared.moves import EndState, MigrationStage
from shared.protocol import Intent
from tests.unit.agent_world import VM, virtual
from tests.unit.migration_pair import (
    A_WHILE_S,
    DESTINATION,
    FOR_EVER_S,
    NEW,
    OLD,
    SOURCE,
    TIMES,
    VOLUME,
    Pair,
    pair,
)

Stage = MigrationStage


# --- the guest that runs twice --------------------------------------------------------------------


async def split(it: Pair) -> None:
    """Break the relay between the switch and the word of it: libvirt lets the guest run on both."""
    await it.arrive_unheard()
    it.fabric.relays[f"{VM}.{NEW}"].end()


def test_a_guest_that_came_back_is_held_at_once_and_ended_by_its_owner() -> None:
    async def main() -> None:
        async with pair() as it:
            await split(it)
            await asyncio.sleep(0.001)
            assert await it.end(SOURCE) is EndState.HELD
            assert it.running() == {"two": NEW}
            report = await it.told(SOURCE, Stage.LOOK)
            assert (report.end, report.over) == (EndState.HELD, True)
            assert (await it.told(SOURCE, Stage.FINALIZE)).settled
            assert it.one.state.domains == {}
            assert it.running() == {"two": NEW}

    virtual(main())


def test_a_guest_that_came_back_without_an_agent_is_held_when_one_starts() -> None:
    """From what is on its disk alone, before any leader has spoken to it."""

    async def main() -> None:
        async with pair() as it:
            await it.arrive_unheard()
            await it.one.stop_agent()
            it.fabric.relays[f"{VM}.{NEW}"].end()
            await asyncio.sleep(1)
            assert it.running() == {"one": OLD, "two": NEW}
            await it.one.start_agent()
            await asyncio.sleep(0.001)
            assert it.running() == {"two": NEW}

    virtual(main())


def test_a_hold_that_failed_is_made_up_for_by_the_next_look() -> None:
    async def main() -> None:
        async with pair() as it:
            it.one.hooks.lose_answers_of = "hold"
            hold = it.one.driver.hold

            async def deaf(name: str, generation: int) -> bool:
                return False

            it.one.driver.hold = deaf  # type: ignore[method-assign]
            await split(it)
            await asyncio.sleep(0.001)
            assert it.running() == {"one": OLD, "two": NEW}
            it.one.driver.hold = hold  # type: ignore[method-assign]
            report = await it.told(SOURCE, Stage.LOOK)
            assert report.end is EndState.HELD
            assert it.running() == {"two": NEW}

    virtual(main())


def test_a_guest_that_moves_nowhere_is_never_held() -> None:
    async def main() -> None:
        async with pair() as it:
            it.one.state.domains[VM].returned = True  # of a migration that is over
            it.one.state.changed(VM)
            it.one.state.changed("")
            await asyncio.sleep(A_WHILE_S)
            assert it.running() == {"one": OLD}

    virtual(main())


# --- resuming -------------------------------------------------------------------------------------


async def held(it: Pair) -> None:
    """Have a guest held that has not moved: its destination has lost all."""
    await split(it)
    await it.until_end(SOURCE, EndState.HELD)
    await it.two.driver.stop(VM, NEW)
    await it.two.driver.undefine(VM, NEW)
    await it.told(SOURCE, Stage.LOOK)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_held_guest_goes_on_once_the_other_end_is_proven_empty(restarted: bool) -> None:
    async def main() -> None:
        async with pair() as it:
            await held(it)
            if restarted:
                await it.one.start_agent()
            for _ in range(2):
                report = await it.told(SOURCE, Stage.RESUME)
                assert report.settled
                assert it.running() == {"one": OLD}
            assert it.one.fence.departures() == {}
            assert it.fabric.relays[f"{VM}.{NEW}"].ended

    virtual(main())


def test_a_guest_that_its_user_has_paused_stays_paused() -> None:
    async def main() -> None:
        async with pair() as it:
            await held(it)
            report = await it.told(SOURCE, Stage.RESUME, intent=Intent.PAUSE)
            assert (report.settled, report.end) == (True, EndState.HELD)

    virtual(main())


def test_a_guest_that_came_back_just_now_is_not_held_again_when_it_is_to_go_on() -> None:
    async def main() -> None:
        async with pair() as it:
            await held(it)
            await it.one.driver.resume(VM, OLD)
            await asyncio.sleep(A_WHILE_S)
            it.one.state.domains[VM].returned = True
            it.one.hooks.acts.clear()
            report = await it.told(SOURCE, Stage.RESUME)
            assert (report.settled, report.end) == (True, EndState.RUNNING)
            assert it.one.hooks.acts == []
            assert it.running() == {"one": OLD}

    virtual(main())


def test_a_transfer_that_begins_late_is_ended_before_the_guest_is_given_back() -> None:
    """libvirtd, held up, begins what its agent has long given up."""

    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=FOR_EVER_S)
            await it.prepare()
            await it.told(SOURCE, Stage.ABORT)
            assert it.target is not None
            uri = await it.one.relays.open(
                f"{VM}.{NEW}", RelayTarget(it.target.relay, "two"), it.target.token
            )
            late = asyncio.ensure_future(it.one.driver.migrate(VM, OLD, await it.outgoing(uri)))
            await it.until_end(DESTINATION, EndState.INCOMING)
            it.fabric.relays[uri].travel = None  # its end is not noticed
            report = await it.told(SOURCE, Stage.RESUME)
            assert report.settled
            assert it.running() == {"one": OLD}
            assert await it.end(SOURCE) is EndState.RUNNING
            assert it.two.state.domains == {}
            settled = [each for each in it.one.reports if each.migration and each.migration.settled]
            assert all(
                each.migration is not None and each.migration.end is not EndState.MOVING
                for each in settled
            )
            await asyncio.gather(late, return_exceptions=True)

    virtual(main())


# --- leaving --------------------------------------------------------------------------------------


async def moved_but_not_forgotten(it: Pair) -> None:
    """Have the guest run on its new node, and its old domain stand still for ever."""
    await it.arrive_unheard()
    it.one.state.libvirtd_dies()
    it.one.state.libvirtd_returns()
    assert await it.end(SOURCE) is EndState.AWAY


def test_leaving_takes_the_domain_and_copied_disks_and_keeps_the_log() -> None:
    async def main() -> None:
        async with pair() as it:
            await moved_but_not_forgotten(it)
            it.one.state.pools["default"]["vm-2-root.qcow2"] = 1
            report = await it.told(SOURCE, Stage.FINALIZE)
            assert report.settled
            assert it.one.state.domains == {}
            assert it.one.state.pools["default"] == {"vm-2-root.qcow2": 1}
            assert await it.one.driver.console_size(VM) > 0
            report = await it.told(SOURCE, Stage.FINALIZE)
            assert report.settled, "told once more, by a leader that has not heard it"

    virtual(main())


def test_leaving_keeps_disks_that_are_shared() -> None:
    async def main() -> None:
        async with pair() as it:
            await moved_but_not_forgotten(it)
            report = await it.told(SOURCE, Stage.FINALIZE, copied=())
            assert report.settled
            assert it.one.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_leaving_waits_for_libvirt_to_leave_by_itself() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, confirm_s=3 * A_WHILE_S)
            await it.prepare()
            it.tell(SOURCE, Stage.TRANSFER)
            await it.until_end(DESTINATION, EndState.RUNNING)
            report = await it.told(SOURCE, Stage.FINALIZE)
            assert (report.end, report.settled) == (EndState.MOVING, False)
            await asyncio.sleep(3 * A_WHILE_S)
            assert it.report(SOURCE).settled
            assert "stop" not in it.one.hooks.acts

    virtual(main())


def test_a_leftover_of_a_node_that_was_away_is_swept_by_its_generation() -> None:
    async def main() -> None:
        async with pair() as it:
            await moved_but_not_forgotten(it)
            await it.one.start_agent()
            report = await it.told(SOURCE, Stage.FINALIZE, operation="", boot_id="", peer="")
            assert report.settled
            assert it.one.state.domains == {}
            assert await it.one.driver.console_size(VM) > 0

    virtual(main())


def test_nothing_stays_of_a_vm_that_is_deleted() -> None:
    async def main() -> None:
        async with pair() as it:
            await moved_but_not_forgotten(it)
            assert (await it.told(SOURCE, Stage.FINALIZE, purge=True)).settled
            assert await it.one.driver.console_size(VM) == 0

    virtual(main())


def test_what_is_told_in_the_moment_of_leaving_is_done_too() -> None:
    async def main() -> None:
        async with pair() as it:
            await moved_but_not_forgotten(it)
            it.one.hooks.hold_before["undefine"] = asyncio.Event()
            it.tell(SOURCE, Stage.FINALIZE)
            await asyncio.sleep(A_WHILE_S)
            it.tell(SOURCE, Stage.FINALIZE, purge=True)
            it.one.hooks.hold_before.pop("undefine").set()
            await asyncio.sleep(A_WHILE_S)
            assert it.report(SOURCE).settled
            assert await it.one.driver.console_size(VM) == 0
            assert it.one.agent.known() == ()

    virtual(main())


@pytest.mark.parametrize("operation", ["op-1", ""])
def test_leaving_never_touches_a_newer_generation(operation: str) -> None:
    async def main() -> None:
        async with pair() as it:
            await moved_but_not_forgotten(it)
            await it.one.driver.stop(VM, OLD)
            await it.one.driver.define(it.definition(3))
            await it.one.driver.start(VM, 3)
            report = await it.told(SOURCE, Stage.FINALIZE, operation=operation)
            assert not report.settled
            assert report.fault is not None
            assert it.running() == {"one": 3, "two": NEW}
            assert it.one.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_a_claim_that_is_gone_is_forgotten() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.told(SOURCE, Stage.ABORT)
            assert VM in it.one.fence.departures()
            it.revision += 1
            it.one.agent.take(it.wish(SOURCE, None))
            await asyncio.sleep(A_WHILE_S)
            assert it.one.fence.departures() == {}
            assert it.one.reports[-1].migration is None
            assert it.running() == {"one": OLD}

    virtual(main())
