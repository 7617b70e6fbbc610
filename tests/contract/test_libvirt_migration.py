"""What only real libvirt can show of a migration: a QEMU that hangs, and reasons for running."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.hypervisor import MigrationEnd
from shared.errors import HypervisorError
from shared.model import ObservedPower
from shared.moves import EndState
from tests.contract.hypervisor_worlds import LibvirtWorld
from tests.contract.libvirt_process import LibvirtProcess, libvirt_pair
from tests.contract.migration_worlds import LibvirtMigrationWorld, libvirt_migration_world
from tests.contract.test_hypervisor import (
    NAME,
    definition,
    power_of,
    remove_all,
    run_guest,
    until,
    until_counts,
)
from tests.contract.test_hypervisor_migration import (
    set_out,
    set_out_to_linger,
    state_of,
    until_connected,
    until_state,
)

pytestmark = pytest.mark.libvirt

# More than the driver asks libvirt at once in any one of its ways.
QUESTIONS = 12


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LibvirtProcess, LibvirtProcess]]:
    with libvirt_pair() as processes:
        yield processes


@pytest.fixture
async def world(
    pair: tuple[LibvirtProcess, LibvirtProcess],
) -> AsyncIterator[LibvirtMigrationWorld]:
    async with libvirt_migration_world(pair) as made:
        yield made
        for each in (made.one, made.two):
            await until_connected(each.driver)
            await remove_all(each.driver)
            await each.driver.delete_console_log(NAME)


def process_of(world: LibvirtMigrationWorld) -> LibvirtProcess:
    assert isinstance(world.one, LibvirtWorld)
    return world.one.process


async def test_a_qemu_that_hangs_as_it_moves_holds_up_nobody_else(
    world: LibvirtMigrationWorld,
) -> None:
    source = world.one.driver
    move, _ = await set_out_to_linger(world)
    await run_guest(source, definition(name="vm-other"))
    process_of(world).signal_qemu(NAME, signal.SIGSTOP)
    try:
        asked = [asyncio.ensure_future(source.transfer(NAME)) for _ in range(QUESTIONS)]
        asked_too = [asyncio.ensure_future(source.migration_end(NAME)) for _ in range(QUESTIONS)]
        await asyncio.sleep(1.0)
        assert not all(each.done() for each in (*asked, *asked_too)), "some of them are held up"
        async with asyncio.timeout(5):
            assert await power_of(source, "vm-other") is ObservedPower.RUNNING
            assert await power_of(source) is ObservedPower.RUNNING
            await source.pause("vm-other", 1)
    finally:
        process_of(world).signal_qemu(NAME, signal.SIGCONT)
    await asyncio.gather(*asked, *asked_too)
    await source.abort_migration(NAME, 1)
    with pytest.raises(HypervisorError):
        await move


async def test_a_transfer_that_fails_at_the_switch_returns_by_itself_and_needs_no_hold(
    world: LibvirtMigrationWorld,
) -> None:
    """QEMU goes on where it was: what it sent can never run."""
    source, destination = world.one.driver, world.two.driver
    await run_guest(source, definition())
    await until_counts(source)
    paused = asyncio.Event()
    events: list[ObservedPower] = []

    async def look(name: str) -> None:
        info = await source.domain(name)
        events.append(ObservedPower.ABSENT if info is None else info.power)
        if info is not None and info.power is ObservedPower.PAUSED:
            paused.set()

    looks: list[asyncio.Future[None]] = []
    source.listen(lambda name: looks.append(asyncio.ensure_future(look(name))))
    move = await set_out(world)
    await paused.wait()
    world.two.crash_guest(NAME)
    with pytest.raises(HypervisorError):
        await move
    await until_state(destination, EndState.ABSENT)
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.RUNNING)
    assert not await source.hold(NAME, 1)
    await asyncio.gather(*looks)


async def test_a_guest_that_somebody_paused_as_it_moved_is_resumed_by_libvirt(
    world: LibvirtMigrationWorld,
) -> None:
    """From its own end nobody can tell this from a switch: it is held until that is known."""
    source = world.one.driver
    move, _ = await set_out_to_linger(world)
    await source.pause(NAME, 1)
    await source.abort_migration(NAME, 1)
    with pytest.raises(HypervisorError):
        await move
    assert await source.migration_end(NAME) == MigrationEnd(
        generation=1, state=EndState.RUNNING, returned=True
    )


async def test_a_source_whose_libvirtd_died_after_the_word_of_the_switch_ends_its_guest(
    world: LibvirtMigrationWorld,
) -> None:
    source, destination = world.one.driver, world.two.driver
    await run_guest(source, definition())
    await until_counts(source)
    move = await set_out(world)
    await until_state(destination, EndState.RUNNING)
    world.one.libvirtd_dies()
    with pytest.raises(HypervisorError):
        await move
    world.one.libvirtd_returns()
    await until_connected(source)

    async def is_settled() -> bool:
        return await state_of(source) in (EndState.AWAY, EndState.DOWN, EndState.ABSENT)

    await until(is_settled, "a source that does not run")
    assert await state_of(destination) is EndState.RUNNING
