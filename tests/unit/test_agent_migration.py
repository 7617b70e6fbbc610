"""Both agents' parts in a migration, stage by stage: what is done, once, and what is told of it."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent.fence import Fence
from agent.relay import RelayTarget
from shared.errors import Unavailable
from shared.model import Term
from shared.moves import EndState, MigrationFigures, MigrationStage
from shared.offload import inline
from shared.protocol import Intent
from shared.units import MIB
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


def acts(it: Pair, call: str) -> int:
    return (it.one.hooks.acts + it.two.hooks.acts).count(call)


# --- a move from its beginning to its end ---------------------------------------------------------


def test_a_guest_moves_and_its_old_node_forgets_it() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            assert it.target is not None
            assert (it.target.node_name, it.target.address, it.target.relay) == ("two",) * 3
            assert it.two.state.pools["default"] == {VOLUME: 1}
            assert it.two.fence.facts(VM).used_generation == NEW

            it.tell(DESTINATION, Stage.TRANSFER)
            report = await it.told(SOURCE, Stage.TRANSFER)
            assert (report.end, report.over, report.fault) == (EndState.ABSENT, True, None)
            assert it.report(DESTINATION).end is EndState.RUNNING
            assert it.running() == {"two": NEW}

            report = await it.told(SOURCE, Stage.FINALIZE)
            assert (report.end, report.settled) == (EndState.ABSENT, True)
            assert report.figures == MigrationFigures(
                total_ms=2110, downtime_ms=100, transferred_bytes=it.spec.memory_mib * MIB
            )
            assert it.one.state.pools["default"] == {}
            assert it.one.agent.known() == ()
            assert it.one.fence.departures() == {}
            assert it.one.fence.facts(VM).revision == 0, "forgotten"
            assert (await it.one.driver.console_log(VM, 0, 5)) == b"boot "

    virtual(main())


def test_progress_is_told_from_nothing_to_all() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, prepare_s=1.2, transfer_s=4.0)
            await it.prepare()
            await it.told(SOURCE, Stage.TRANSFER)
            told = it.one.progress
            assert {each.operation for each in told} == {"op-1"}
            percents = [each.percent for each in told]
            assert percents == sorted(percents)
            assert (percents[0], told[0].eta_s) == (0.0, None), "nothing is known yet"
            assert 80.0 < percents[-1] <= 100.0
            assert told[-1].bytes_total == it.spec.memory_mib * MIB

    virtual(main())


def test_what_is_told_twice_is_done_once() -> None:
    async def main() -> None:
        async with pair() as it:
            for _ in range(2):
                await it.prepare()
            assert it.two.hooks.acts.count("ensure_volume") == 1
            it.fabric.times = replace(TIMES, transfer_s=2 * A_WHILE_S)
            for _ in range(2):
                it.tell(DESTINATION, Stage.TRANSFER)
                report = await it.told(SOURCE, Stage.TRANSFER)
                assert not report.over
            assert report.end is EndState.MOVING
            await asyncio.sleep(A_WHILE_S)
            for _ in range(2):
                report = await it.told(SOURCE, Stage.TRANSFER)
                assert (report.end, report.over) == (EndState.ABSENT, True)
            for _ in range(2):
                report = await it.told(SOURCE, Stage.FINALIZE)
                assert report.settled
            assert acts(it, "migrate") == 1
            assert it.running() == {"two": NEW}

    virtual(main())


@pytest.mark.parametrize("when_s", [0.1, 0.7, 1.25, 1.35, 3.0])
def test_agents_that_die_in_the_middle_are_followed_by_others(when_s: float) -> None:
    """In the preparation, the transfer, the switch, between the switch and its word, and after."""

    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            it.tell(SOURCE, Stage.TRANSFER)
            it.tell(DESTINATION, Stage.TRANSFER)
            await asyncio.sleep(when_s)
            begun = acts(it, "migrate")
            await it.one.start_agent()
            await it.two.start_agent()
            it.tell(DESTINATION, Stage.TRANSFER)
            report = await it.told(SOURCE, Stage.TRANSFER)
            assert report.over
            assert begun + acts(it, "migrate") == 1, "never twice"
            assert it.running() == {"two": NEW}
            assert (await it.told(SOURCE, Stage.FINALIZE)).settled
            assert it.running() == {"two": NEW}

    virtual(main())


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.TRANSFER, Stage.CLEAN])
def test_a_destination_started_anew_does_its_stage_again(stage: MigrationStage) -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            before = it.target
            await it.two.start_agent()
            report = await it.told(DESTINATION, stage)
            if stage is Stage.CLEAN:
                assert report.settled
                assert it.two.state.pools["default"] == {}
                return
            assert report.target is not None, "it has admitted the source once more"
            assert report.target != before
            it.target = report.target
            await it.told(SOURCE, Stage.TRANSFER)
            assert it.running() == {"two": NEW}

    virtual(main())


def test_a_strict_move_arrives_ready_and_stands_still() -> None:
    async def main() -> None:
        async with pair() as it:
            strict = replace(it.spec.migration, strict=True)
            it.spec = replace(it.spec, migration=strict)
            await it.prepare()
            it.tell(SOURCE, Stage.TRANSFER)
            report = await it.told(DESTINATION, Stage.TRANSFER)
            assert report.end is EndState.READY
            assert it.running() == {}

            it.revision += 1
            it.two.agent.take(it.wish(DESTINATION, None, intent=Intent.RUN))
            await asyncio.sleep(A_WHILE_S)
            assert it.running() == {"two": NEW}

    virtual(main())


# --- beginning ------------------------------------------------------------------------------------


def test_that_it_is_begun_is_durable_before_it_is() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            it.one.hooks.hold_before["migrate"] = asyncio.Event()
            await it.told(SOURCE, Stage.TRANSFER)
            departure = Fence(it.one.log, inline).facts(VM).departure
            assert departure is not None
            assert (departure.generation, departure.source_generation) == (NEW, OLD)
            assert departure.domain_name == VM
            assert not it.report(SOURCE).over, "it may still begin"

    virtual(main())


def test_what_an_agent_died_over_before_it_began_never_begins() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            it.one.hooks.hold_before["migrate"] = asyncio.Event()
            await it.told(SOURCE, Stage.TRANSFER)
            del it.one.hooks.hold_before["migrate"]
            for _ in range(2):
                await it.one.start_agent()
                report = await it.told(SOURCE, Stage.TRANSFER)
                assert (report.end, report.over) == (EndState.RUNNING, True)
                assert acts(it, "migrate") == 0

    virtual(main())


def test_nothing_begins_under_a_term_that_has_been_followed_by_another() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            depart = it.one.fence.depart

            async def overtaken(*arguments: object) -> None:
                await depart(*arguments)  # type: ignore[arg-type]
                await it.one.fence.accept_term(Term(1, 2))

            it.one.fence.depart = overtaken  # type: ignore[method-assign, assignment]
            it.tell(SOURCE, Stage.TRANSFER)
            reports = len(it.one.reports)
            await asyncio.sleep(A_WHILE_S)
            assert acts(it, "migrate") == 0
            assert len(it.one.reports) == reports, "what is refused is not reported on"

    virtual(main())


def test_an_older_revision_begins_nothing() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            older = it.wish(SOURCE, it.order(SOURCE, Stage.TRANSFER))
            await it.told(SOURCE, Stage.ABORT)
            await it.one.start_agent()
            it.one.agent.take(older)
            await asyncio.sleep(A_WHILE_S)
            assert acts(it, "migrate") == 0

    virtual(main())


def test_without_a_target_nothing_begins() -> None:
    async def main() -> None:
        async with pair() as it:
            report = await it.told(SOURCE, Stage.TRANSFER)
            assert (report.end, report.over) == (EndState.RUNNING, False)
            assert it.one.fence.departures() == {}

    virtual(main())


def test_a_relay_that_cannot_be_opened_is_the_end_of_it() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            await it.two.relays.revoke(f"{VM}.{NEW}")
            report = await it.told(SOURCE, Stage.TRANSFER)
            assert (report.end, report.over) == (EndState.RUNNING, True)
            assert report.fault is not None
            assert report.fault.code == Unavailable.code
            assert acts(it, "migrate") == 0

    virtual(main())


def test_a_newer_claim_begins_although_an_older_one_was_not_seen_to_end() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.told(SOURCE, Stage.ABORT)
            report = await it.told(DESTINATION, Stage.PREPARE, generation=3)
            it.target = report.target
            await it.told(SOURCE, Stage.TRANSFER, generation=3)
            assert it.running() == {"two": 3}

    virtual(main())


# --- aborting -------------------------------------------------------------------------------------


def test_an_aborted_transfer_leaves_the_guest_where_it_was() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=FOR_EVER_S)
            await it.prepare()
            await it.told(SOURCE, Stage.TRANSFER)
            report = await it.told(SOURCE, Stage.ABORT)
            assert (report.end, report.over) == (EndState.RUNNING, True)
            assert report.fault is not None
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert (report.end, report.settled) == (EndState.ABSENT, True)
            assert it.two.state.pools["default"] == {}
            assert it.two.state.domains == {}
            assert await it.two.driver.console_log(VM, 0, 10) == b""
            report = await it.told(SOURCE, Stage.RESUME)
            assert report.settled
            assert it.one.fence.departures() == {}
            assert it.running() == {"one": OLD}

    virtual(main())


def test_what_was_aborted_before_it_began_never_begins() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            report = await it.told(SOURCE, Stage.ABORT)
            assert (report.end, report.over) == (EndState.RUNNING, True)
            for _ in range(2):
                report = await it.told(SOURCE, Stage.TRANSFER)
                assert (report.end, report.over) == (EndState.RUNNING, True)
                await it.one.start_agent()
            assert acts(it, "migrate") == 0

    virtual(main())


def test_an_abort_while_the_relay_is_opened_comes_in_time() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            may_open = asyncio.Event()
            opening = it.one.relays.open

            async def slow(name: str, target: RelayTarget, token: str) -> str:
                await may_open.wait()
                return await opening(name, target, token)

            it.one.relays.open = slow  # type: ignore[method-assign]
            await it.told(SOURCE, Stage.TRANSFER)
            report = await it.told(SOURCE, Stage.ABORT)
            assert not report.over
            may_open.set()
            await asyncio.sleep(A_WHILE_S)
            assert it.report(SOURCE).over
            assert acts(it, "migrate") == 0
            assert it.running() == {"one": OLD}

    virtual(main())


def test_an_abort_that_is_faster_than_libvirt_still_aborts() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=FOR_EVER_S)
            await it.prepare()
            it.one.hooks.hold_before["migrate"] = asyncio.Event()
            await it.told(SOURCE, Stage.TRANSFER)
            report = await it.told(SOURCE, Stage.ABORT)
            assert not report.over
            it.one.hooks.hold_before.pop("migrate").set()
            await asyncio.sleep(A_WHILE_S)
            report = it.report(SOURCE)
            assert (report.end, report.over) == (EndState.RUNNING, True)
            assert acts(it, "migrate") == 1

    virtual(main())


def test_an_agent_started_anew_aborts_what_its_predecessor_began() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=FOR_EVER_S)
            await it.prepare()
            await it.told(SOURCE, Stage.TRANSFER)
            await it.one.start_agent()
            report = await it.told(SOURCE, Stage.ABORT)
            assert (report.end, report.over) == (EndState.RUNNING, True)

    virtual(main())


# --- libvirt that is held up, or dies -------------------------------------------------------------


def test_a_transfer_whose_answer_is_lost_is_followed_on() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=2 * A_WHILE_S)
            await it.prepare()
            it.one.hooks.lose_answers_of = "migrate"
            report = await it.told(SOURCE, Stage.TRANSFER)
            assert (report.end, report.over) == (EndState.MOVING, False)
            await asyncio.sleep(2 * A_WHILE_S)
            report = it.report(SOURCE)
            assert (report.end, report.over) == (EndState.ABSENT, True)
            assert acts(it, "migrate") == 1
            assert it.running() == {"two": NEW}
            assert it.one.progress[-1].percent > 50, "somebody has looked at it"

    virtual(main())


def test_while_libvirtd_is_away_nothing_is_said_to_be_over() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=FOR_EVER_S)
            await it.prepare()
            await it.told(SOURCE, Stage.TRANSFER)
            it.one.reports.clear()
            it.one.state.libvirtd_dies()
            await asyncio.sleep(2 * A_WHILE_S)
            assert it.one.reports == []
            it.one.state.libvirtd_returns()
            await asyncio.sleep(2 * A_WHILE_S)
            report = it.report(SOURCE)
            assert (report.end, report.over) == (EndState.RUNNING, True)

    virtual(main())


def test_a_source_that_heard_nothing_of_the_switch_stays_paused_until_it_is_told() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.arrive_unheard()
            it.one.state.libvirtd_dies()
            await asyncio.sleep(1)
            it.one.state.libvirtd_returns()
            await asyncio.sleep(2 * A_WHILE_S)
            report = it.report(SOURCE)
            assert (report.end, report.over) == (EndState.AWAY, True)
            report = await it.told(SOURCE, Stage.FINALIZE)
            assert (report.end, report.settled) == (EndState.ABSENT, True)
            assert it.running() == {"two": NEW}
            assert it.one.state.domains == {}

    virtual(main())


# --- limits ---------------------------------------------------------------------------------------


def test_a_transfer_that_takes_too_long_is_ended() -> None:
    async def main() -> None:
        async with pair() as it:
            it.fabric.times = replace(TIMES, transfer_s=100_000.0)
            await it.prepare()
            await it.told(SOURCE, Stage.TRANSFER, timeout_s=60.0)
            await asyncio.sleep(60 - 2 * A_WHILE_S)
            assert await it.end(SOURCE) is EndState.MOVING
            await asyncio.sleep(2 * A_WHILE_S)
            report = it.report(SOURCE)
            assert (report.end, report.over) == (EndState.RUNNING, True)
            assert report.fault is not None
            assert report.fault.code == "migration_timed_out"
            assert it.one.hooks.acts.count("set_max_downtime") == 1

    virtual(main())


def test_what_the_guide_hears_from_libvirt_does_not_end_the_transfer() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            it.one.hooks.lose_answers_of = "set_max_downtime"
            report = await it.told(SOURCE, Stage.TRANSFER)
            assert (report.over, report.fault) == (True, None)
            assert it.running() == {"two": NEW}

    virtual(main())


def test_other_stages_only_look() -> None:
    async def main() -> None:
        async with pair() as it:
            for role, stage in (
                (SOURCE, Stage.PREPARE),
                (SOURCE, Stage.LOOK),
                (SOURCE, Stage.CLEAN),
                (DESTINATION, Stage.ABORT),
                (DESTINATION, Stage.LOOK),
                (DESTINATION, Stage.RESUME),
                (DESTINATION, Stage.FINALIZE),
                (DESTINATION, Stage.UNKNOWN),
            ):
                report = await it.told(role, stage)
                assert (report.settled, report.over, report.target) == (False, False, None)
                expected = EndState.RUNNING if role is SOURCE else EndState.ABSENT
                assert report.end is expected
            assert it.one.hooks.acts == it.two.hooks.acts == []

    virtual(main())


def test_a_guest_that_once_came_back_is_held_only_if_it_has_set_out_since() -> None:
    """libvirt's word for it stays until the guest is paused again, whoever had moved it."""

    async def main() -> None:
        async with pair() as it:
            it.one.state.domains[VM].go_away()
            it.one.state.domains[VM].come_back()
            for stage in (Stage.PREPARE, Stage.TRANSFER):
                assert (await it.told(SOURCE, stage)).end is EndState.RUNNING
            assert it.running() == {"one": OLD}

    virtual(main())
