"""A destination's part in a migration: what it makes ready, and what it may end again."""

from __future__ import annotations

import asyncio

import pytest

from agent.relay import RelayTarget
from shared.errors import Unavailable
from shared.model import MigrationSpec, NicSpec, ObservedPower
from shared.moves import EndState, MigrationStage
from tests.unit.agent_world import VM, virtual
from tests.unit.core_world import spec
from tests.unit.migration_pair import (
    A_WHILE_S,
    DESTINATION,
    NEW,
    OLD,
    ROOT,
    VOLUME,
    Pair,
    pair,
)

Stage = MigrationStage


# --- making ready ---------------------------------------------------------------------------------


def test_what_is_made_ready_is_used_up_first() -> None:
    """A permit for that generation, told by an older leader, must start nothing."""

    async def main() -> None:
        async with pair() as it:
            it.two.hooks.hold_before["ensure_volume"] = asyncio.Event()
            it.tell(DESTINATION, Stage.PREPARE)
            await asyncio.sleep(A_WHILE_S)
            assert it.two.fence.facts(VM).used_generation == NEW

    virtual(main())


def test_a_node_that_has_booted_since_makes_nothing_ready() -> None:
    async def main() -> None:
        async with pair() as it:
            report = await it.told(DESTINATION, Stage.PREPARE, boot_id="boot-0")
            assert not report.settled
            assert report.fault is not None
            report = await it.told(DESTINATION, Stage.TRANSFER, boot_id="boot-0")
            assert report.target is None
            assert it.fabric.relays == {}
            assert it.two.state.pools["default"] == {}

    virtual(main())


def test_a_disk_that_is_here_already_is_nobodys_to_replace() -> None:
    """It may be the running guest's own, in a pool that nobody has said to be shared."""

    async def main() -> None:
        async with pair() as it:
            it.two.state.pools["default"] = {VOLUME: 1}
            it.two.hooks.acts.clear()
            report = await it.told(DESTINATION, Stage.PREPARE)
            assert not report.settled
            assert report.fault is not None
            assert "already" in report.fault.detail
            assert it.two.hooks.acts == []
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert it.two.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_what_an_agent_made_ready_before_it_died_is_made_anew() -> None:
    async def main() -> None:
        async with pair() as it:
            it.two.hooks.hold_after["ensure_volume"] = asyncio.Event()
            it.tell(DESTINATION, Stage.PREPARE)
            await asyncio.sleep(A_WHILE_S)
            await it.two.stop_agent()
            it.two.state.pools["default"] = {VOLUME: 7}
            del it.two.hooks.hold_after["ensure_volume"]
            await it.two.start_agent()
            await it.prepare()
            assert it.two.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_a_domain_of_an_earlier_stay_makes_way_with_its_log() -> None:
    async def main() -> None:
        async with pair() as it:
            it.two.state.pools["default"] = {VOLUME: 1}
            await it.two.driver.define(it.definition(OLD))
            await it.two.driver.start(VM, OLD)
            await asyncio.sleep(A_WHILE_S)
            report = await it.told(DESTINATION, Stage.PREPARE)
            assert not report.settled, "it runs"
            assert report.fault is not None
            await it.two.driver.stop(VM, OLD)
            await it.two.driver.delete_volume("default", VOLUME)
            await it.prepare()
            assert it.two.state.domains == {}
            assert await it.two.driver.console_size(VM) == 0

    virtual(main())


@pytest.mark.parametrize("generation", [NEW, NEW + 1])
def test_a_domain_of_this_or_a_newer_generation_does_not(generation: int) -> None:
    async def main() -> None:
        async with pair() as it:
            await it.two.driver.define(it.definition(generation))
            report = await it.told(DESTINATION, Stage.PREPARE)
            assert not report.settled
            assert report.fault is not None
            assert it.two.state.domains[VM].generation == generation

    virtual(main())


def test_a_stranger_of_that_name_does_not() -> None:
    async def main() -> None:
        async with pair() as it:
            it.two.state.add_foreign(VM, "somebody-elses")
            report = await it.told(DESTINATION, Stage.PREPARE)
            assert not report.settled
            assert report.fault is not None
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert report.settled
            assert it.two.state.domains[VM].power is ObservedPower.RUNNING

    virtual(main())


def test_what_a_node_does_not_have_is_said() -> None:
    async def main() -> None:
        async with pair() as it:
            it.spec = spec(disks=(ROOT,), nics=(NicSpec(network="wan"),))
            report = await it.told(DESTINATION, Stage.PREPARE)
            assert not report.settled
            assert report.fault is not None
            assert "wan" in report.fault.detail
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert report.settled
            assert it.two.state.pools["default"] == {}

    virtual(main())


def test_while_libvirtd_is_away_nothing_is_said() -> None:
    async def main() -> None:
        async with pair() as it:
            it.two.state.libvirtd_dies()
            it.tell(DESTINATION, Stage.PREPARE)
            await asyncio.sleep(A_WHILE_S)
            assert it.two.reports == []
            it.two.state.libvirtd_returns()
            await asyncio.sleep(A_WHILE_S)
            assert it.report(DESTINATION).settled

    virtual(main())


# --- cleaning up ----------------------------------------------------------------------------------


async def come_in(it: Pair) -> None:
    """Have a domain here that still comes in, though nothing can come any more."""
    await it.prepare()
    it.two.state.receive(it.definition(NEW))
    assert await it.end(DESTINATION) is EndState.INCOMING


def test_what_still_comes_in_is_ended() -> None:
    async def main() -> None:
        async with pair() as it:
            await come_in(it)
            for _ in range(2):
                report = await it.told(DESTINATION, Stage.CLEAN)
                assert (report.end, report.settled) == (EndState.ABSENT, True)
            assert it.two.state.domains == {}
            assert it.two.state.pools["default"] == {}
            assert report.target is None

    virtual(main())


def test_after_it_nothing_comes_any_more() -> None:
    async def main() -> None:
        async with pair() as it:
            await it.prepare()
            assert it.target is not None
            await it.told(DESTINATION, Stage.CLEAN)
            with pytest.raises(Unavailable):
                await it.one.relays.open(
                    f"{VM}.{NEW}", RelayTarget(it.target.relay, "two"), it.target.token
                )

    virtual(main())


def test_what_was_never_made_ready_never_is_afterwards() -> None:
    async def main() -> None:
        async with pair() as it:
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert report.settled
            assert it.two.fence.facts(VM).used_generation == NEW
            report = await it.told(DESTINATION, Stage.PREPARE)
            assert not report.settled, "its relay's name is used up"
            assert report.target is None

    virtual(main())


def test_what_has_arrived_and_waits_is_ended() -> None:
    async def main() -> None:
        async with pair() as it:
            it.spec = spec(disks=(ROOT,), migration=MigrationSpec(strict=True))
            await come_in(it)
            arrival = it.two.state.domains[VM]
            arrival.arrive(it.one.state.domains[VM], paused=True)
            assert (await it.told(DESTINATION, Stage.LOOK)).end is EndState.READY
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert (report.end, report.settled) == (EndState.ABSENT, True)

    virtual(main())


@pytest.mark.parametrize("ended", [False, True])
def test_what_has_run_here_is_never_ended(ended: bool) -> None:
    async def main() -> None:
        async with pair() as it:
            await come_in(it)
            it.two.state.domains[VM].arrive(it.one.state.domains[VM], paused=False)
            if ended:
                it.two.state.guest_powers_off(VM)
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert report.end is (EndState.DOWN if ended else EndState.RUNNING)
            assert not report.settled
            assert it.two.state.domains[VM].is_active() is not ended
            assert it.two.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_what_goes_on_in_the_moment_of_its_end_is_said_to_have_run() -> None:
    """Its disks have been written to: the source must not go on with them."""

    async def main() -> None:
        async with pair() as it:
            await come_in(it)
            stop = it.two.driver.stop

            async def overtaken(name: str, generation: int) -> None:
                it.two.state.domains[VM].arrive(it.one.state.domains[VM], paused=False)
                await stop(name, generation)

            it.two.driver.stop = overtaken  # type: ignore[method-assign]
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert (report.end, report.settled) == (EndState.DOWN, False)
            assert it.two.state.domains[VM].generation == NEW
            assert it.two.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_a_newer_generation_keeps_its_disks() -> None:
    async def main() -> None:
        async with pair() as it:
            it.two.state.pools["default"] = {VOLUME: 1}
            await it.two.driver.define(it.definition(NEW + 1))
            await it.two.driver.start(VM, NEW + 1)
            report = await it.told(DESTINATION, Stage.CLEAN)
            assert not report.settled
            assert report.fault is not None
            assert it.running()["two"] == NEW + 1
            assert it.two.state.pools["default"] == {VOLUME: 1}

    virtual(main())


def test_a_relay_that_does_not_end_keeps_all_as_it_is() -> None:
    """While bytes may still come, an end that is empty proves nothing."""

    async def main() -> None:
        async with pair() as it:
            await come_in(it)
            revoke = it.two.relays.revoke

            async def stuck(name: str) -> None:
                raise Unavailable("its process does not end")

            it.two.relays.revoke = stuck  # type: ignore[method-assign]
            it.tell(DESTINATION, Stage.CLEAN)
            await asyncio.sleep(A_WHILE_S)
            assert it.report(DESTINATION).stage is Stage.PREPARE, "nothing is reported"
            assert VM in it.two.state.domains
            it.two.relays.revoke = revoke  # type: ignore[method-assign]
            await asyncio.sleep(2 * A_WHILE_S)
            assert it.report(DESTINATION).settled

    virtual(main())
