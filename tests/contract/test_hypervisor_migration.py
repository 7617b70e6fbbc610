"""The migration half of the hypervisor's contract: simulated nodes do as libvirt does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from msgspec.structs import replace

from agent.hypervisor import (
    DomainDefinition,
    Hypervisor,
    MigrationEnd,
    Transfer,
    volume_name,
)
from shared.errors import (
    ArtefactMissing,
    DomainNotFound,
    GenerationMismatch,
    HypervisorError,
    HypervisorUnavailable,
)
from shared.model import DiskSpec, NicSpec, ObservedPower
from shared.moves import EndState
from shared.protocol import DestinationQuestion
from tests.contract.libvirt_process import LibvirtProcess, libvirt_pair
from tests.contract.migration_worlds import (
    MigrationWorld,
    SimulatedMigrationWorld,
    libvirt_migration_world,
    outgoing,
)
from tests.contract.test_hypervisor import (
    NAME,
    console,
    definition,
    last_count,
    power_of,
    remove_all,
    run_guest,
    until,
    until_counts,
)

MACHINE = "pc-q35-7.2"
GUESTS_MAX = 3
ROOT = DiskSpec(name="root", size_gib=1)
SHARED = DiskSpec(name="data", size_gib=1, pool="shared")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LibvirtProcess, LibvirtProcess]]:
    with libvirt_pair() as processes:
        yield processes


@pytest.fixture(params=["simulated", pytest.param("libvirt", marks=pytest.mark.libvirt)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[MigrationWorld]:
    if request.param == "simulated":
        yield SimulatedMigrationWorld()
        return
    async with libvirt_migration_world(request.getfixturevalue("pair")) as made:
        yield made
        for each in (made.one, made.two):
            await until_connected(each.driver)
            await remove_all(each.driver)
            await each.driver.delete_console_log(NAME)


async def until_connected(driver: Hypervisor) -> None:
    async def check() -> bool:
        try:
            await driver.domains()
        except HypervisorUnavailable:
            return False
        return True

    await until(check, "libvirt")


async def state_of(driver: Hypervisor) -> EndState:
    end = await driver.migration_end(NAME)
    return EndState.ABSENT if end is None else end.state


async def until_state(driver: Hypervisor, state: EndState) -> None:
    async def check() -> bool:
        return await state_of(driver) is state

    await until(check, f"an end that is {state.value}")


async def set_out(
    world: MigrationWorld,
    wanted: DomainDefinition | None = None,
    *,
    copied: tuple[str, ...] = (),
    paused: bool = False,
) -> asyncio.Task[None]:
    """Begin to move generation 1 to where it becomes generation 2."""
    arriving = replace(wanted or definition(), generation=2)
    order = await outgoing(world, arriving, copied=copied, paused=paused)
    return asyncio.create_task(world.one.driver.migrate(NAME, 1, order))


async def set_out_to_linger(world: MigrationWorld) -> tuple[asyncio.Task[None], Transfer]:
    """Begin a transfer that is in the middle until something happens to it."""
    await run_guest(world.one.driver, definition())
    world.linger(NAME)
    move = await set_out(world)
    seen: list[Transfer] = []

    async def is_on_its_way() -> bool:
        transfer = await world.one.driver.transfer(NAME)
        if transfer is not None and transfer.bytes_total > 0:
            seen.append(transfer)
        return bool(seen) and await state_of(world.two.driver) is EndState.INCOMING

    await until(is_on_its_way, "a transfer under way")
    return move, seen[-1]


async def set_out_to_the_switch(world: MigrationWorld) -> asyncio.Task[None]:
    """Stop the time at the switch: the guest runs over there, and here nobody knows."""
    await run_guest(world.one.driver, definition())
    await until_counts(world.one.driver)
    world.hold_replies()
    move = await set_out(world)
    await until_state(world.two.driver, EndState.RUNNING)
    assert await state_of(world.one.driver) is EndState.MOVING
    assert await power_of(world.one.driver) is ObservedPower.PAUSED
    assert not move.done()
    return move


async def is_empty(driver: Hypervisor) -> bool:
    return await driver.domain(NAME) is None and await driver.migration_end(NAME) is None


# --- moves ----------------------------------------------------------------------------------------


async def test_a_guest_moves_and_leaves_only_its_console_log(world: MigrationWorld) -> None:
    source, destination = world.one.driver, world.two.driver
    await run_guest(source, definition())
    count = await until_counts(source)
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.RUNNING)
    assert await is_empty(destination)
    assert await source.transfer(NAME) is None

    move = await set_out(world)
    seen: set[tuple[EndState, EndState]] = set()
    while not move.done():
        seen.add((await state_of(source), await state_of(destination)))
        await asyncio.sleep(0.02)
    await move
    moving, running = EndState.MOVING, EndState.RUNNING
    assert {(moving, EndState.ABSENT), (moving, EndState.INCOMING)} <= seen
    assert seen <= {
        (running, EndState.ABSENT),
        (moving, EndState.ABSENT),
        (moving, EndState.INCOMING),
        (moving, running),
        (EndState.ABSENT, running),
        (EndState.DOWN, running),
    }

    assert await is_empty(source)
    assert await destination.migration_end(NAME) == MigrationEnd(generation=2, state=running)
    assert await last_count(source) >= count
    assert "boot" not in await console(destination), "it is the same guest, not one that booted"


async def test_what_has_arrived_stays_defined_under_its_new_generation(
    world: MigrationWorld,
) -> None:
    destination = world.two.driver
    await run_guest(world.one.driver, definition())
    await until_counts(world.one.driver)
    await (await set_out(world))
    info = await destination.domain(NAME)
    assert info is not None
    assert (info.vm_id, info.generation, info.power) == (NAME, 2, ObservedPower.RUNNING)

    await destination.stop(NAME, 2)
    info = await destination.domain(NAME)
    assert info is not None
    assert (info.vm_id, info.generation, info.power) == (NAME, 2, ObservedPower.STOPPED)
    assert await destination.migration_end(NAME) == MigrationEnd(generation=2, state=EndState.DOWN)

    await destination.undefine(NAME, 2, keep_log=True)
    assert await is_empty(destination)
    await destination.undefine(NAME, 2)
    source = world.one.driver
    assert await last_count(source) > 0, "its time there is still told of"
    await source.undefine(NAME, 1)
    assert await console(source) == ""


async def test_the_source_tells_what_it_took(world: MigrationWorld) -> None:
    source = world.one.driver
    await run_guest(source, definition())
    await (await set_out(world))
    figures = await source.figures(NAME)
    assert figures is not None
    assert figures.total_ms > 0
    assert figures.transferred_bytes > 0
    assert 0 <= figures.downtime_ms < figures.total_ms
    assert await world.two.driver.figures(NAME) is None, "nothing has left that node"


async def test_disks_are_copied_or_shared(world: MigrationWorld) -> None:
    source, destination = world.one.driver, world.two.driver
    wanted = definition(disks=(ROOT, SHARED))
    root, shared = volume_name(NAME, "root"), volume_name(NAME, "data")
    await source.ensure_volume("default", root, 1)
    await source.ensure_volume("shared", shared, 1)
    await run_guest(source, wanted)
    await until_counts(source)
    await destination.ensure_volume("default", root, 1)
    await (await set_out(world, wanted, copied=("root",)))
    assert await state_of(destination) is EndState.RUNNING
    try:
        assert await destination.volumes("default") == (root,)
        assert await destination.volumes("shared") == (shared,)
        assert await source.volumes("default") == (root,), "the copy's original is not libvirt's"
        await destination.reset(NAME, 2)
        await until_counts(destination)
    finally:
        await destination.stop(NAME, 2)
        await destination.delete_volume("shared", shared)


async def test_a_disk_that_is_not_over_there_refuses_the_move(world: MigrationWorld) -> None:
    source, destination = world.one.driver, world.two.driver
    wanted = definition(disks=(ROOT,))
    await source.ensure_volume("default", volume_name(NAME, "root"), 1)
    await run_guest(source, wanted)
    with pytest.raises(HypervisorError):
        await (await set_out(world, wanted))
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.RUNNING)
    await until_state(destination, EndState.ABSENT)
    assert await destination.volumes("default") == ()


async def test_a_volume_that_another_node_has_deleted_is_not_here_either(
    world: MigrationWorld,
) -> None:
    shared = volume_name(NAME, "data")
    await world.one.driver.ensure_volume("shared", shared, 1)
    await world.two.driver.ensure_volume("shared", shared, 1)
    await world.two.driver.delete_volume("shared", shared)
    await world.one.driver.delete_volume("shared", shared)
    assert await world.one.driver.volumes("shared") == ()
    await world.two.driver.ensure_volume("shared", shared, 1)
    await world.one.driver.delete_volume("shared", shared)
    question = DestinationQuestion(
        vm_id=NAME,
        domain_uuid=definition().uuid,
        spec=definition(disks=(SHARED,)).spec,
        copied=(),
        machine=MACHINE,
        cpu_xml="",
    )
    (blocker,) = await world.two.driver.check_destination(NAME, question)
    assert blocker.code == "disk_not_shared"
    await world.two.driver.ensure_volume("shared", shared, 1)
    assert await world.one.driver.volumes("shared") == (shared,)
    await world.two.driver.delete_volume("shared", shared)


async def test_a_vm_at_rest_may_come_where_its_disks_are(world: MigrationWorld) -> None:
    shared, two = volume_name(NAME, "data"), world.two.driver
    question = DestinationQuestion(
        vm_id=NAME,
        domain_uuid=definition().uuid,
        spec=definition(disks=(SHARED,)).spec,
        copied=(),
        machine="",
        cpu_xml="",
    )
    (blocker,) = await two.check_destination(NAME, question)
    assert blocker.code == "disk_not_shared"
    await two.ensure_volume("shared", shared, 1)
    assert await two.check_destination(NAME, question) == ()
    await two.delete_volume("shared", shared)


async def test_a_paused_guest_arrives_paused(world: MigrationWorld) -> None:
    source, destination = world.one.driver, world.two.driver
    await run_guest(source, definition())
    await source.pause(NAME, 1)
    assert await state_of(source) is EndState.HELD
    await (await set_out(world, paused=True))
    assert await is_empty(source)
    assert await destination.migration_end(NAME) == MigrationEnd(generation=2, state=EndState.HELD)
    assert await power_of(destination) is ObservedPower.PAUSED
    await destination.resume(NAME, 2)
    await until_counts(destination)


async def test_a_guest_that_ends_before_it_goes_on_has_never_run(world: MigrationWorld) -> None:
    destination = world.two.driver
    await run_guest(world.one.driver, definition())
    await (await set_out(world, paused=True))
    world.two.crash_guest(NAME)
    await until_state(destination, EndState.NEVER_RAN)
    assert await power_of(destination) is ObservedPower.CRASHED
    await destination.start(NAME, 2)
    assert await state_of(destination) is EndState.RUNNING
    world.two.crash_guest(NAME)
    await until_state(destination, EndState.DOWN)


async def test_a_guest_that_ends_once_it_has_gone_on_has_run(world: MigrationWorld) -> None:
    destination = world.two.driver
    await run_guest(world.one.driver, definition())
    await (await set_out(world, paused=True))
    await destination.resume(NAME, 2)
    world.two.crash_guest(NAME)
    await until_state(destination, EndState.DOWN)


@pytest.mark.parametrize("strict", [False, True])
async def test_the_guest_itself_goes_on(world: MigrationWorld, strict: bool) -> None:
    """QEMU 7.2 loses an emulated guest's pages now and then: one of some guests is to arrive."""
    source, destination = world.one.driver, world.two.driver
    for _ in range(GUESTS_MAX):
        await run_guest(source, definition())
        count = await until_counts(source)
        await (await set_out(world, paused=strict))
        assert await is_empty(source)
        if strict:
            held = MigrationEnd(generation=2, state=EndState.HELD)
            assert await destination.migration_end(NAME) == held
            assert not await destination.hold(NAME, 2)
            await destination.resume(NAME, 2)
        assert await state_of(destination) is EndState.RUNNING
        if await counts_soon(destination, beyond=count):
            break
        await destination.stop(NAME, 2)
        await destination.undefine(NAME, 2)
    else:
        pytest.fail(f"none of {GUESTS_MAX} guests went on")


async def counts_soon(driver: Hypervisor, beyond: int) -> bool:
    for _ in range(100):
        if await last_count(driver) > beyond:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_a_move_goes_on_without_the_one_who_asked(world: MigrationWorld) -> None:
    await run_guest(world.one.driver, definition())
    move = await set_out(world)
    await until_state(world.one.driver, EndState.MOVING)
    move.cancel()
    await until_state(world.two.driver, EndState.RUNNING)

    async def has_gone() -> bool:
        return await is_empty(world.one.driver)

    await until(has_gone, "a source that is empty")


# --- transfers that do not come to their end ------------------------------------------------------


async def test_a_transfer_is_looked_at_guided_and_aborted(world: MigrationWorld) -> None:
    source, destination = world.one.driver, world.two.driver
    move, transfer = await set_out_to_linger(world)
    assert transfer.bytes_total >= 192 * 1024 * 1024
    assert 0 < transfer.bytes_remaining <= transfer.bytes_total
    assert transfer.iteration == 1
    assert await destination.transfer(NAME) is None
    await source.set_max_downtime(NAME, 1, 400)
    (blocker,) = (await source.check_source(NAME, 1)).blockers
    assert blocker.code == "job_active"
    with pytest.raises(HypervisorError):
        await (await set_out(world))
    assert not await source.hold(NAME, 1)
    assert await state_of(source) is EndState.MOVING

    await source.abort_migration(NAME, 1)
    with pytest.raises(HypervisorError):
        await move
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.RUNNING)
    assert not await source.hold(NAME, 1), "it never stood still"
    assert await source.transfer(NAME) is None
    assert await source.figures(NAME) is None
    await source.abort_migration(NAME, 1)
    await until_state(destination, EndState.ABSENT)
    assert await is_empty(destination)
    await until_counts(source)


async def _crash(world: MigrationWorld) -> None:
    world.two.crash_guest(NAME)


async def _stop(world: MigrationWorld) -> None:
    await world.two.driver.stop(NAME, 2)


async def _break(world: MigrationWorld) -> None:
    world.break_relay()


async def _kill_here(world: MigrationWorld) -> None:
    world.one.libvirtd_dies()
    await asyncio.sleep(0.5)
    world.one.libvirtd_returns()


async def _kill_there(world: MigrationWorld) -> None:
    world.two.libvirtd_dies()
    await asyncio.sleep(0.5)
    world.two.libvirtd_returns()


@pytest.mark.parametrize("fault", [_crash, _stop, _break, _kill_here, _kill_there])
async def test_whatever_ends_a_transfer_leaves_the_guest_where_it_was(
    world: MigrationWorld, fault: Callable[[MigrationWorld], Awaitable[None]]
) -> None:
    source, destination = world.one.driver, world.two.driver
    move, _ = await set_out_to_linger(world)
    await fault(world)
    with pytest.raises(HypervisorError):
        await move
    await until_connected(source)
    await until_connected(destination)
    await until_state(destination, EndState.ABSENT)
    assert await is_empty(destination)
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.RUNNING)
    assert not await source.hold(NAME, 1)


# --- the window around the switch -----------------------------------------------------------------


@pytest.mark.parametrize("fault", [_break, _kill_there])
async def test_a_guest_that_libvirt_lets_run_on_both_nodes_can_be_held(
    world: MigrationWorld, fault: Callable[[MigrationWorld], Awaitable[None]]
) -> None:
    source, destination = world.one.driver, world.two.driver
    move = await set_out_to_the_switch(world)
    await fault(world)
    with pytest.raises(HypervisorError):
        await move
    await until_connected(destination)
    assert await state_of(destination) is EndState.RUNNING
    assert await source.migration_end(NAME) == MigrationEnd(
        generation=1, state=EndState.RUNNING, returned=True
    )
    with pytest.raises(GenerationMismatch):
        await source.hold(NAME, 2)
    assert await source.hold(NAME, 1)
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.HELD)
    assert await power_of(source) is ObservedPower.PAUSED
    assert not await source.hold(NAME, 1)

    await source.resume(NAME, 1)
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.RUNNING)
    assert not await source.hold(NAME, 1), "somebody has decided that it runs"


async def test_a_source_that_never_hears_of_the_switch_stays_away(world: MigrationWorld) -> None:
    source, destination = world.one.driver, world.two.driver
    move = await set_out_to_the_switch(world)
    world.one.libvirtd_dies()
    with pytest.raises(HypervisorError):
        await move
    world.one.libvirtd_returns()
    await until_connected(source)
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.AWAY)
    assert await destination.migration_end(NAME) == MigrationEnd(
        generation=2, state=EndState.RUNNING
    )
    assert not await source.hold(NAME, 1)
    await source.stop(NAME, 1)
    await source.undefine(NAME, 1, keep_log=True)
    assert await is_empty(source)
    assert await state_of(destination) is EndState.RUNNING


# --- checks ---------------------------------------------------------------------------------------


async def test_every_act_needs_the_very_generation(world: MigrationWorld) -> None:
    source = world.one.driver
    order = await outgoing(world, definition(generation=2))
    acts: tuple[Callable[[int], Awaitable[object]], ...] = (
        lambda generation: source.check_source(NAME, generation),
        lambda generation: source.migrate(NAME, generation, order),
        lambda generation: source.abort_migration(NAME, generation),
        lambda generation: source.set_max_downtime(NAME, generation, 300),
    )
    for act in acts:
        with pytest.raises(DomainNotFound):
            await act(5)
    assert not await source.hold(NAME, 5)
    await run_guest(source, definition(generation=5))
    for act in acts:
        for wrong in (4, 6):
            with pytest.raises(GenerationMismatch):
                await act(wrong)
    assert await source.migration_end(NAME) == MigrationEnd(generation=5, state=EndState.RUNNING)


async def test_a_source_says_what_it_moves_and_what_stands_against_it(
    world: MigrationWorld,
) -> None:
    source = world.one.driver
    await source.define(definition())
    (blocker,) = (await source.check_source(NAME, 1)).blockers
    assert blocker.code == "not_running"
    with pytest.raises(HypervisorError):
        await (await set_out(world))
    assert await source.migration_end(NAME) == MigrationEnd(generation=1, state=EndState.DOWN)
    await source.start(NAME, 1)
    check = await source.check_source(NAME, 1)
    assert (check.blockers, check.machine) == ((), MACHINE)
    await source.pause(NAME, 1)
    assert (await source.check_source(NAME, 1)).blockers == ()


async def test_a_destination_names_all_that_stands_against_it(world: MigrationWorld) -> None:
    destination = world.two.driver
    other = "0f0f0f0f-1111-4222-8333-555555555555"

    async def codes(wanted: DomainDefinition, *, machine: str = MACHINE) -> list[str]:
        question = DestinationQuestion(
            vm_id=NAME,
            domain_uuid=wanted.uuid,
            spec=wanted.spec,
            copied=("root",),
            machine=machine,
            cpu_xml="",
        )
        blockers = await destination.check_destination(wanted.name, question)
        return sorted(blocker.code for blocker in blockers)

    assert await codes(definition(disks=(ROOT,))) == []
    assert await codes(definition(), machine="pc-q35-99.0") == ["machine_type"]
    assert await codes(definition(disks=(SHARED,))) == ["disk_not_shared"]
    nowhere = DiskSpec(name="root", size_gib=1, pool="fast")
    assert await codes(definition(disks=(nowhere, SHARED))) == ["disk_not_shared", "missing_pool"]
    await destination.ensure_volume("default", volume_name(NAME, "root"), 1)
    assert await codes(definition(disks=(ROOT,))) == ["volume_exists"]
    await destination.delete_volume("default", volume_name(NAME, "root"))

    await destination.define(definition(generation=1))
    assert await codes(definition()) == [], "a stopped one of ours makes way"
    await destination.start(NAME, 1)
    assert await codes(definition()) == ["name_taken"]
    world.two.add_foreign("somebodys")
    try:
        theirs = replace(definition(name="somebodys"), uuid=other)
        assert await codes(theirs) == ["name_taken"]
        info = await destination.domain("somebodys")
        assert info is not None
        assert await codes(replace(definition(name="vm-new"), uuid=info.uuid)) == ["uuid_taken"]
    finally:
        world.two.remove_foreign("somebodys")


async def test_a_name_that_is_taken_over_there_refuses_the_move(world: MigrationWorld) -> None:
    source = world.one.driver
    await run_guest(source, definition())
    world.two.add_foreign(NAME)
    try:
        with pytest.raises(HypervisorError):
            await (await set_out(world))
        assert await state_of(source) is EndState.RUNNING
        assert await world.two.driver.migration_end(NAME) is None, "a stranger is no end"
    finally:
        world.two.remove_foreign(NAME)


async def test_a_layout_says_where_a_node_keeps_things(world: MigrationWorld) -> None:
    wanted = definition(disks=(ROOT, SHARED), nics=(NicSpec(network="lan"),))
    here = await world.one.driver.layout(wanted)
    there = await world.two.driver.layout(wanted)
    assert len(here.disk_paths) == len(there.disk_paths) == 2
    assert here.disk_paths[1] == there.disk_paths[1], "a shared pool has one path"
    assert len(here.bridges) == 1
    assert NAME in here.console_log_path
    with pytest.raises(ArtefactMissing):
        await world.two.driver.layout(definition(kernel="no-such-kernel"))
    with pytest.raises(HypervisorError):
        await world.two.driver.layout(definition(nics=(NicSpec(network="wan"),)))
