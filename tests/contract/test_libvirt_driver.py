"""What only real libvirt can show: hung processes, crashes unseen, and whether KVM works."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import libvirt
import pytest

from agent.hypervisor import Hypervisor
from agent.libvirt_probe import EMULATION, PROBE_NAME, guest_boots
from agent.libvirt_storage import ensure_pools
from shared.errors import HypervisorUnavailable
from shared.model import ObservedPower
from tests.contract.hypervisor_worlds import LibvirtWorld, libvirt_driver, libvirt_settings
from tests.contract.libvirt_process import LibvirtProcess, libvirt_process
from tests.contract.test_hypervisor import (
    NAME,
    WAIT_LIMIT_S,
    definition,
    power_of,
    remove_all,
    run_guest,
    until,
    until_counts,
    until_power,
)

pytestmark = pytest.mark.libvirt


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[LibvirtProcess]:
    with libvirt_process() as process:
        yield process


@pytest.fixture
async def world(libvirtd: LibvirtProcess) -> AsyncIterator[LibvirtWorld]:
    async with libvirt_driver(libvirt_settings(libvirtd)) as driver:
        yield LibvirtWorld(libvirtd, driver)
        await remove_all(driver)


async def connected(driver: Hypervisor) -> bool:
    try:
        await driver.domains()
    except HypervisorUnavailable:
        return False
    return True


async def test_how_guests_ended_while_libvirtd_was_away(world: LibvirtWorld) -> None:
    driver = world.driver
    await run_guest(driver, definition(name="vm-off", cmdline="nova.exit=poweroff@3"))
    await run_guest(driver, definition(name="vm-panic", cmdline="nova.exit=panic@3"))
    await run_guest(driver, definition(name="vm-killed"))
    await until_counts(driver, name="vm-off")
    await until_counts(driver, name="vm-panic")
    world.libvirtd_dies()
    world.crash_guest("vm-killed")
    await asyncio.sleep(6)
    world.libvirtd_returns()
    await until(lambda: connected(driver), "the connection")
    await until_power(driver, ObservedPower.SHUT_OFF, "vm-off")
    await until_power(driver, ObservedPower.CRASHED, "vm-panic")
    await until_power(driver, ObservedPower.CRASHED, "vm-killed")
    # libvirt leaves the QEMU of the guest that panicked standing: it must not be in the way.
    await driver.define(definition(generation=2, name="vm-panic"))
    await driver.start("vm-panic", 2)
    assert await power_of(driver, "vm-panic") is ObservedPower.RUNNING


async def test_a_qemu_that_hangs_is_left_out_of_the_samples_and_holds_up_nothing(
    world: LibvirtWorld,
) -> None:
    driver = world.driver
    await run_guest(driver, definition(name="vm-well"))
    await run_guest(driver, definition(name="vm-hung"))
    await until_counts(driver, name="vm-hung")
    world.process.signal_qemu("vm-hung", signal.SIGSTOP)
    try:
        for _ in range(2):
            assert [sample.object for sample in await driver.samples()] == ["vm-well"]
            assert await power_of(driver, "vm-hung") is ObservedPower.RUNNING
            await driver.pause("vm-well", 1)
            await driver.resume("vm-well", 1)
    finally:
        world.process.signal_qemu("vm-hung", signal.SIGCONT)

    async def both() -> bool:
        return len(await driver.samples()) == 2

    await until(both, "samples of both")


async def test_a_libvirtd_that_hangs_makes_calls_end_and_is_found_again(
    world: LibvirtWorld,
) -> None:
    driver = world.driver
    await run_guest(driver, definition())
    world.process.signal_libvirtd(signal.SIGSTOP)
    try:
        with pytest.raises(HypervisorUnavailable):
            await driver.domains()
        with pytest.raises(HypervisorUnavailable):
            await driver.stop(NAME, 1)
    finally:
        world.process.signal_libvirtd(signal.SIGCONT)
    await until(lambda: connected(driver), "the connection")
    assert await power_of(driver) is ObservedPower.RUNNING


async def test_the_probe_finds_out_how_guests_really_boot(libvirtd: LibvirtProcess) -> None:
    async with libvirt_driver(libvirt_settings(libvirtd, probe_kvm=True)) as driver:
        facts = await driver.facts()
        assert facts.virtualization in ("kvm", "qemu")
        assert PROBE_NAME not in libvirtd.virsh("list", "--all", "--name")
        await run_guest(driver, definition())
        # The proof: a guest of the kind that was found does boot.
        await until_counts(driver)
        await remove_all(driver)


def test_the_probe_sees_a_guest_that_boots(libvirtd: LibvirtProcess) -> None:
    settings = libvirt_settings(libvirtd)
    connection = libvirt.open(libvirtd.uri)
    try:
        ensure_pools(connection, settings.pool_targets())
        assert guest_boots(connection, settings, EMULATION, WAIT_LIMIT_S)
        assert PROBE_NAME not in libvirtd.virsh("list", "--all", "--name")
    finally:
        connection.close()


async def test_a_known_virtualization_is_not_probed_again(libvirtd: LibvirtProcess) -> None:
    settings = libvirt_settings(libvirtd, probe_kvm=True, known="kvm")
    async with libvirt_driver(settings) as driver:
        assert (await driver.facts()).virtualization == "kvm"


async def test_pools_are_made_once_and_started_when_they_stand_still(
    libvirtd: LibvirtProcess,
) -> None:
    settings = libvirt_settings(libvirtd)
    async with libvirt_driver(settings) as driver:
        await driver.ensure_volume("default", "vm-1-root.qcow2", 1)
    libvirtd.virsh("pool-destroy", "default")
    async with libvirt_driver(settings) as driver:
        assert await driver.volumes("default") == ("vm-1-root.qcow2",)
        await driver.delete_volume("default", "vm-1-root.qcow2")
