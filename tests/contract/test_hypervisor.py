"""The hypervisor port's contract: what libvirt does, the simulated node does too."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from agent.hypervisor import DomainDefinition, Hypervisor, volume_name
from shared.errors import (
    ArtefactMissing,
    DiskMissing,
    DomainNotFound,
    GenerationMismatch,
    HypervisorError,
    HypervisorUnavailable,
)
from shared.ids import domain_uuid
from shared.model import BootSpec, DiskSpec, NicSpec, ObservedPower, VmSpec
from tests.contract.hypervisor_worlds import (
    LibvirtWorld,
    SimulatedWorld,
    World,
    libvirt_driver,
    libvirt_settings,
)
from tests.contract.libvirt_process import LibvirtProcess, libvirt_process

NAME = "vm-abcdef00000000000000000001"
# An emulated guest on a busy machine; no test waits that long unless it fails.
WAIT_LIMIT_S = 60
LOG_BYTES = 1024 * 1024


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[LibvirtProcess]:
    with libvirt_process() as process:
        yield process


@pytest.fixture(params=["simulated", pytest.param("libvirt", marks=pytest.mark.libvirt)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "simulated":
        yield SimulatedWorld()
        return
    process: LibvirtProcess = request.getfixturevalue("libvirtd")
    async with libvirt_driver(libvirt_settings(process)) as driver:
        yield LibvirtWorld(process, driver)
        await remove_all(driver)


async def remove_all(driver: Hypervisor) -> None:
    for info in await driver.domains():
        if info.vm_id is not None:
            await driver.stop(info.name, info.generation)
            await driver.undefine(info.name, info.generation)
    for volume in await driver.volumes("default"):
        await driver.delete_volume("default", volume)


def definition(
    generation: int = 1,
    *,
    name: str = NAME,
    cmdline: str = "",
    disks: tuple[DiskSpec, ...] = (),
    nics: tuple[NicSpec, ...] = (),
    kernel: str = "tiny-kernel",
) -> DomainDefinition:
    boot = BootSpec(
        kernel=kernel, initrd="tiny-initrd", cmdline=f"console=ttyS0 quiet {cmdline}".strip()
    )
    return DomainDefinition(
        vm_id=name,
        name=name,
        uuid=domain_uuid(name),
        title="web-1",
        tenant="default",
        generation=generation,
        spec=VmSpec(vcpus=1, memory_mib=192, boot=boot, disks=disks, nics=nics),
    )


async def until(check: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_LIMIT_S):
            while True:
                if await check():
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"never seen: {what}")


async def until_power(driver: Hypervisor, power: ObservedPower, name: str = NAME) -> None:
    async def check() -> bool:
        info = await driver.domain(name)
        return info is not None and info.power is power

    await until(check, f"{name} {power}")


async def power_of(driver: Hypervisor, name: str = NAME) -> ObservedPower:
    info = await driver.domain(name)
    assert info is not None
    return info.power


async def console(driver: Hypervisor, name: str = NAME) -> str:
    return (await driver.console_log(name, 0, LOG_BYTES)).decode(errors="replace")


async def last_count(driver: Hypervisor, name: str = NAME) -> int:
    counts = re.findall(r"^count (\d+)\r?$", await console(driver, name), re.MULTILINE)
    return int(counts[-1]) if counts else 0


async def until_counts(driver: Hypervisor, beyond: int = 0, name: str = NAME) -> int:
    async def check() -> bool:
        return await last_count(driver, name) > beyond

    await until(check, f"{name} counts beyond {beyond}")
    return await last_count(driver, name)


async def run_guest(driver: Hypervisor, wanted: DomainDefinition) -> None:
    await driver.define(wanted)
    await driver.start(wanted.name, wanted.generation)


# --- defining -------------------------------------------------------------------------------------


async def test_a_defined_domain_is_stopped_and_known_by_its_metadata(world: World) -> None:
    driver = world.driver
    assert await driver.domain(NAME) is None
    await driver.define(definition(generation=7))
    info = await driver.domain(NAME)
    assert info is not None
    assert (info.name, info.uuid, info.vm_id) == (NAME, domain_uuid(NAME), NAME)
    assert (info.generation, info.power) == (7, ObservedPower.STOPPED)
    assert info in await driver.domains()


async def test_a_domain_that_stands_still_is_redefined_under_a_new_generation(
    world: World,
) -> None:
    driver = world.driver
    await run_guest(driver, definition(generation=1, cmdline="nova.exit=poweroff@0.5"))
    await until_power(driver, ObservedPower.SHUT_OFF)
    await driver.define(definition(generation=2))
    info = await driver.domain(NAME)
    assert info is not None
    assert (info.generation, info.power) == (2, ObservedPower.STOPPED), "generation 2 never ran"
    with pytest.raises(GenerationMismatch):
        await driver.start(NAME, 1)
    await driver.start(NAME, 2)
    assert await power_of(driver) is ObservedPower.RUNNING


async def test_a_running_domain_is_not_redefined(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition(generation=1))
    with pytest.raises(HypervisorError):
        await driver.define(definition(generation=2))
    info = await driver.domain(NAME)
    assert info is not None
    assert (info.generation, info.power) == (1, ObservedPower.RUNNING)


async def test_a_definition_that_the_node_cannot_meet_is_refused(world: World) -> None:
    driver = world.driver
    with pytest.raises(ArtefactMissing):
        await driver.define(definition(kernel="no-such-kernel"))
    with pytest.raises(HypervisorError, match="network 'wan'"):
        await driver.define(definition(nics=(NicSpec(network="wan"),)))
    with pytest.raises(HypervisorError, match="pool 'fast'"):
        await driver.define(definition(disks=(DiskSpec(name="root", size_gib=1, pool="fast"),)))
    assert await driver.domain(NAME) is None


async def test_undefining_forgets_the_domain_and_its_console(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition(generation=3))
    with pytest.raises(HypervisorError):
        await driver.undefine(NAME, 3)
    assert await power_of(driver) is ObservedPower.RUNNING
    await until_counts(driver)
    await driver.stop(NAME, 3)
    with pytest.raises(GenerationMismatch):
        await driver.undefine(NAME, 2)
    await driver.undefine(NAME, 3)
    assert await driver.domain(NAME) is None
    assert await console(driver) == ""
    await driver.undefine(NAME, 3)


# --- power ----------------------------------------------------------------------------------------


async def test_start_pause_resume_stop(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition())
    assert await power_of(driver) is ObservedPower.RUNNING
    with pytest.raises(HypervisorError):
        await driver.start(NAME, 1)
    await until_counts(driver)

    await driver.pause(NAME, 1)
    await driver.pause(NAME, 1)
    assert await power_of(driver) is ObservedPower.PAUSED
    # What QEMU had taken from the guest before it stood still may yet reach the log.
    await asyncio.sleep(0.5)
    standing = await last_count(driver)
    await asyncio.sleep(1.0)
    assert await last_count(driver) == standing

    await driver.resume(NAME, 1)
    await driver.resume(NAME, 1)
    assert await power_of(driver) is ObservedPower.RUNNING
    await until_counts(driver, beyond=standing)

    await driver.stop(NAME, 1)
    await driver.stop(NAME, 1)
    assert await power_of(driver) is ObservedPower.STOPPED


async def test_the_guest_obeys_its_power_button(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition())
    await until_counts(driver)
    await driver.shutdown(NAME, 1)
    await until_power(driver, ObservedPower.SHUT_OFF)


async def test_a_reboot_asked_of_the_guest_boots_it_again(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition())
    await until_counts(driver)
    await driver.reboot(NAME, 1)
    await until(lambda: _boots(driver, 2), "a second boot")
    assert await power_of(driver) is ObservedPower.RUNNING


async def test_a_reset_boots_the_guest_again_without_asking(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition())
    await until_counts(driver)
    await driver.reset(NAME, 1)
    await until(lambda: _boots(driver, 2), "a second boot")
    assert await power_of(driver) is ObservedPower.RUNNING


async def _boots(driver: Hypervisor, times: int) -> bool:
    return len(re.findall(r"^boot ", await console(driver), re.MULTILINE)) == times


async def test_how_a_guest_ended_is_told_apart(world: World) -> None:
    driver = world.driver
    for name, cmdline in (
        ("vm-off", "nova.exit=poweroff@1"),
        ("vm-panic", "nova.exit=panic@1"),
        ("vm-killed", ""),
        ("vm-stopped", ""),
    ):
        await run_guest(driver, definition(name=name, cmdline=cmdline))
    await driver.stop("vm-stopped", 1)
    world.crash_guest("vm-killed")
    await until_power(driver, ObservedPower.CRASHED, "vm-killed")
    await until_power(driver, ObservedPower.CRASHED, "vm-panic")
    await until_power(driver, ObservedPower.SHUT_OFF, "vm-off")
    await until_power(driver, ObservedPower.STOPPED, "vm-stopped")
    await driver.start("vm-killed", 1)
    assert await power_of(driver, "vm-killed") is ObservedPower.RUNNING


async def test_a_guest_that_reboots_itself_runs_on(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition(cmdline="nova.exit=reboot@0.5"))
    await until(lambda: _boots(driver, 2), "a second boot")
    assert await power_of(driver) is ObservedPower.RUNNING


async def test_acts_need_a_domain_and_its_very_generation(world: World) -> None:
    driver = world.driver
    acts = (
        driver.start,
        driver.shutdown,
        driver.stop,
        driver.pause,
        driver.resume,
        driver.reboot,
        driver.reset,
    )
    for act in acts:
        with pytest.raises(DomainNotFound):
            await act(NAME, 5)
    await run_guest(driver, definition(generation=5))
    for act in acts:
        for wrong in (4, 6):
            with pytest.raises(GenerationMismatch):
                await act(NAME, wrong)
    assert await power_of(driver) is ObservedPower.RUNNING


async def test_acts_on_a_domain_that_stands_still_are_refused(world: World) -> None:
    driver = world.driver
    await driver.define(definition())
    for act in (driver.shutdown, driver.pause, driver.resume, driver.reboot, driver.reset):
        with pytest.raises(HypervisorError):
            await act(NAME, 1)
    await driver.stop(NAME, 1)
    assert await power_of(driver) is ObservedPower.STOPPED


async def test_a_disk_that_is_missing_fails_the_start(world: World) -> None:
    driver = world.driver
    await driver.define(definition(disks=(DiskSpec(name="root", size_gib=1),)))
    with pytest.raises(HypervisorError):
        await driver.start(NAME, 1)
    assert await power_of(driver) is ObservedPower.CRASHED
    await driver.ensure_volume("default", volume_name(NAME, "root"), 1)
    await driver.start(NAME, 1)
    assert await power_of(driver) is ObservedPower.RUNNING


# --- console, volumes, strangers ------------------------------------------------------------------


async def test_the_console_log_grows_and_is_read_in_parts(world: World) -> None:
    driver = world.driver
    assert await driver.console_log(NAME, 0, 100) == b""
    await run_guest(driver, definition())
    first = await until_counts(driver)
    await until_counts(driver, beyond=first + 2)
    whole = await driver.console_log(NAME, 0, LOG_BYTES)
    assert await driver.console_log(NAME, 3, 4) == whole[3:7]
    assert len(await driver.console_log(NAME, -5, 100)) >= 5
    assert await driver.console_log(NAME, -LOG_BYTES, 7) == whole[:7]
    assert await driver.console_log(NAME, LOG_BYTES, 10) == b""


async def test_volumes(world: World) -> None:
    driver = world.driver
    await driver.ensure_volume("default", "vm-1-root.qcow2", 1)
    await driver.ensure_volume("default", "vm-1-root.qcow2", 1)
    await driver.ensure_volume("default", "vm-1-data.qcow2", 2)
    assert await driver.volumes("default") == ("vm-1-data.qcow2", "vm-1-root.qcow2")
    with pytest.raises(HypervisorError, match="has 1 GiB, not 2"):
        await driver.ensure_volume("default", "vm-1-root.qcow2", 2)
    with pytest.raises(HypervisorError, match="no storage pool"):
        await driver.ensure_volume("fast", "vm-1-root.qcow2", 1)
    await driver.delete_volume("default", "vm-1-root.qcow2")
    await driver.delete_volume("default", "vm-1-root.qcow2")
    assert await driver.volumes("default") == ("vm-1-data.qcow2",)


async def test_a_volume_that_is_not_to_be_made_is_missing_or_as_it_was(world: World) -> None:
    driver = world.driver
    with pytest.raises(DiskMissing, match="no volume"):
        await driver.ensure_volume("default", "vm-1-root.qcow2", 1, make=False)
    assert await driver.volumes("default") == ()
    await driver.ensure_volume("default", "vm-1-root.qcow2", 1)
    await driver.ensure_volume("default", "vm-1-root.qcow2", 1, make=False)
    with pytest.raises(HypervisorError, match="has 1 GiB, not 2"):
        await driver.ensure_volume("default", "vm-1-root.qcow2", 2, make=False)
    assert await driver.volumes("default") == ("vm-1-root.qcow2",)


async def test_calls_on_one_pool_may_come_at_once(world: World) -> None:
    driver = world.driver
    names = [f"vm-{number}-root.qcow2" for number in range(6)]
    await asyncio.gather(*(driver.ensure_volume("default", name, 1) for name in names))
    listed = await asyncio.gather(*(driver.volumes("default") for _ in range(4)))
    assert listed == [tuple(names)] * 4


async def test_a_foreign_domain_is_listed_and_never_touched(world: World) -> None:
    driver = world.driver
    world.add_foreign("somebodys")
    try:
        info = await driver.domain("somebodys")
        assert info is not None
        assert (info.vm_id, info.generation, info.power) == (None, 0, ObservedPower.RUNNING)
        assert info in await driver.domains()
        assert await driver.samples() == ()
        for generation in (0, 1):
            for act in (driver.stop, driver.pause, driver.reset, driver.undefine):
                with pytest.raises(GenerationMismatch):
                    await act("somebodys", generation)
        with pytest.raises(HypervisorError):
            await driver.define(definition(name="somebodys"))
        assert await power_of(driver, "somebodys") is ObservedPower.RUNNING
    finally:
        world.remove_foreign("somebodys")


# --- events, figures, facts -----------------------------------------------------------------------


async def test_listeners_hear_of_every_change(world: World) -> None:
    driver = world.driver
    heard: list[str] = []
    driver.listen(heard.append)

    async def after(name: str) -> None:
        async def check() -> bool:
            return name in heard

        await until(check, f"an event about {name}")
        await asyncio.sleep(0.2)
        heard.clear()

    await driver.define(definition())
    await after(NAME)
    await driver.start(NAME, 1)
    await after(NAME)
    await driver.pause(NAME, 1)
    await after(NAME)
    await driver.resume(NAME, 1)
    await after(NAME)
    world.crash_guest(NAME)
    await after(NAME)
    await driver.undefine(NAME, 1)
    await after(NAME)


async def test_samples_tell_what_running_guests_use(world: World) -> None:
    driver = world.driver
    disk = DiskSpec(name="root", size_gib=1)
    await driver.ensure_volume("default", volume_name(NAME, "root"), 1)
    await run_guest(driver, definition(disks=(disk,), nics=(NicSpec(network="lan"),)))
    await driver.define(definition(name="vm-still"))
    await until_counts(driver)
    (sample,) = await driver.samples()
    assert sample.object == NAME
    assert sample.cpu_s_total > 0
    assert sample.memory_bytes > 0
    assert sample.disk_read_bytes_total > 0
    assert sample.disk_read_requests_total > 0

    async def has_grown() -> bool:
        (later,) = await driver.samples()
        sends = later.network_transmit_bytes_total > 0
        return sends and later.cpu_s_total > sample.cpu_s_total and later.at > sample.at

    await until(has_grown, "CPU time that grows and a guest that sends")


async def test_facts_say_what_can_be_run_here(world: World) -> None:
    facts = await world.driver.facts()
    assert facts.cpus >= 1
    assert facts.memory_mib >= 192
    assert facts.artefacts == ("tiny-initrd", "tiny-kernel")
    assert facts.networks == ("lan",), "a network without its bridge is not offered"
    assert [(p.name, p.shared) for p in facts.pools] == [("default", False), ("shared", True)]
    assert all(pool.capacity_gib >= pool.free_gib > 0 for pool in facts.pools)
    assert "pc-q35-7.2" in facts.machine_types
    assert "q35" not in facts.machine_types
    assert "qemu64" in facts.cpu.models
    assert facts.virtualization == "qemu"
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts.libvirt_version)
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts.qemu_version)
    assert sum(cell.memory_mib for cell in facts.numa) > 0


# --- what dies and comes back ---------------------------------------------------------------------


async def test_a_guest_survives_libvirtd_and_the_driver_finds_it_again(world: World) -> None:
    driver = world.driver
    heard: list[str] = []
    await run_guest(driver, definition())
    count = await until_counts(driver)
    driver.listen(heard.append)
    world.libvirtd_dies()

    async def unavailable() -> bool:
        try:
            await driver.domains()
        except HypervisorUnavailable:
            return True
        return False

    await until(unavailable, "HypervisorUnavailable")
    for call in (driver.facts(), driver.stop(NAME, 1), driver.volumes("default"), driver.samples()):
        with pytest.raises(HypervisorUnavailable):
            await call
    heard.clear()
    world.libvirtd_returns()

    async def heard_all() -> bool:
        return "" in heard

    await until(heard_all, "the word that events were lost")
    assert await power_of(driver) is ObservedPower.RUNNING
    await until_counts(driver, beyond=count)
    assert (await driver.samples())[0].object == NAME
    await driver.stop(NAME, 1)
    assert await power_of(driver) is ObservedPower.STOPPED


async def test_how_a_guest_ended_is_still_known_after_libvirtd_restarted(world: World) -> None:
    driver = world.driver
    await run_guest(driver, definition(name="vm-off", cmdline="nova.exit=poweroff@0.5"))
    await run_guest(driver, definition(name="vm-killed"))
    world.crash_guest("vm-killed")
    await until_power(driver, ObservedPower.SHUT_OFF, "vm-off")
    await until_power(driver, ObservedPower.CRASHED, "vm-killed")
    await _restart_libvirtd(world)
    assert await power_of(driver, "vm-off") is ObservedPower.SHUT_OFF
    assert await power_of(driver, "vm-killed") is ObservedPower.CRASHED
    await driver.define(definition(generation=2, name="vm-killed"))
    assert await power_of(driver, "vm-killed") is ObservedPower.STOPPED


async def _restart_libvirtd(world: World) -> None:
    heard: list[str] = []
    world.libvirtd_dies()
    await asyncio.sleep(0.5)
    world.driver.listen(heard.append)
    world.libvirtd_returns()

    async def heard_all() -> bool:
        return "" in heard

    await until(heard_all, "the word that events were lost")


async def test_a_new_driver_finds_what_the_last_one_left(world: World) -> None:
    await run_guest(world.driver, definition(generation=4))
    count = await until_counts(world.driver)
    async with world.new_driver() as successor:
        (info,) = await successor.domains()
        assert (info.vm_id, info.generation, info.power) == (NAME, 4, ObservedPower.RUNNING)
        await until_counts(successor, beyond=count)
        await successor.stop(NAME, 4)
        assert await power_of(successor) is ObservedPower.STOPPED
