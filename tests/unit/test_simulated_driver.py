"""The simulated node's own levers: hooks, the loss of power, an agent that is replaced."""

from __future__ import annotations

import asyncio

import pytest

from agent.hypervisor import DomainDefinition
from agent.simulated_driver import (
    NoHooks,
    SimulatedDriver,
    SimulatedNodeState,
    simulated_facts,
)
from agent.simulated_guest import CONSOLE_BYTES_MAX
from shared.clock import SystemClock
from shared.errors import HypervisorError, HypervisorUnavailable
from shared.ids import domain_uuid
from shared.model import BootSpec, ObservedPower, VmSpec

NAME = "vm-1"


def definition(generation: int = 1, cmdline: str = "") -> DomainDefinition:
    return DomainDefinition(
        vm_id=NAME,
        name=NAME,
        uuid=domain_uuid(NAME),
        title="web-1",
        tenant="default",
        generation=generation,
        spec=VmSpec(
            vcpus=1,
            memory_mib=128,
            boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline=cmdline),
        ),
    )


async def running(state: SimulatedNodeState) -> SimulatedDriver:
    driver = SimulatedDriver(state, SystemClock())
    await driver.define(definition())
    await driver.start(NAME, 1)
    return driver


async def power_of(driver: SimulatedDriver) -> ObservedPower:
    info = await driver.domain(NAME)
    assert info is not None
    return info.power


@pytest.fixture
def state() -> SimulatedNodeState:
    return SimulatedNodeState(simulated_facts())


async def test_a_loss_of_power_stops_guests_and_keeps_definitions_and_volumes(
    state: SimulatedNodeState,
) -> None:
    driver = await running(state)
    await driver.ensure_volume("default", "vm-1-root.qcow2", 1)
    state.reboot()
    successor = SimulatedDriver(state, SystemClock())
    (info,) = await successor.domains()
    assert (info.generation, info.power) == (1, ObservedPower.STOPPED)
    assert await successor.volumes("default") == ("vm-1-root.qcow2",)


async def test_a_guest_ends_by_an_injected_fault(state: SimulatedNodeState) -> None:
    driver = await running(state)
    driver.guest_powers_off(NAME)
    assert await power_of(driver) is ObservedPower.SHUT_OFF
    await driver.start(NAME, 1)
    driver.guest_crashes(NAME)
    assert await power_of(driver) is ObservedPower.CRASHED


async def test_events_go_to_the_agent_that_lives(state: SimulatedNodeState) -> None:
    first = await running(state)
    old: list[str] = []
    new: list[str] = []
    first.listen(old.append)
    second = SimulatedDriver(state, SystemClock())
    second.listen(new.append)
    state.guest_crashes(NAME)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (old, new) == ([], [NAME])


async def test_a_hook_before_a_call_prevents_it_and_one_after_it_loses_the_answer(
    state: SimulatedNodeState,
) -> None:
    calls: list[tuple[str, str]] = []

    class Hooks(NoHooks):
        async def before(self, call: str, name: str) -> None:
            calls.append((call, name))
            if call == "start" and len(calls) < 4:
                raise HypervisorError("refused by the test")

        async def after(self, call: str, name: str) -> None:
            if call == "start":
                raise HypervisorUnavailable("the answer is lost")

    driver = SimulatedDriver(state, SystemClock(), Hooks())
    await driver.define(definition())
    with pytest.raises(HypervisorError, match="refused"):
        await driver.start(NAME, 1)
    assert await power_of(driver) is ObservedPower.STOPPED
    with pytest.raises(HypervisorUnavailable, match="lost"):
        await driver.start(NAME, 1)
    assert await power_of(driver) is ObservedPower.RUNNING
    assert calls[0] == ("define", NAME)


async def test_a_call_under_way_fails_when_libvirtd_dies(state: SimulatedNodeState) -> None:
    class Slow(NoHooks):
        async def before(self, call: str, name: str) -> None:
            state.libvirtd_dies()

    driver = SimulatedDriver(state, SystemClock(), Slow())
    with pytest.raises(HypervisorUnavailable):
        await driver.define(definition())
    assert state.domains == {}


async def test_a_guest_that_ran_for_a_week_costs_no_more_than_its_log(
    state: SimulatedNodeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await running(state)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", lambda: start_s + 7 * 86400.0)
        log = await driver.console_log(NAME, 0, 10 * CONSOLE_BYTES_MAX)
    assert len(log) == CONSOLE_BYTES_MAX
    assert log.endswith(b"count 3023996\n")


async def test_a_guest_that_is_paused_does_not_reach_its_end(state: SimulatedNodeState) -> None:
    driver = SimulatedDriver(state, SystemClock())
    await driver.define(definition(cmdline="quiet nova.exit=poweroff@0"))
    await driver.start(NAME, 1)
    await driver.pause(NAME, 1)
    await asyncio.sleep(1.2)
    assert await power_of(driver) is ObservedPower.PAUSED
    changes: asyncio.Queue[str] = asyncio.Queue()
    driver.listen(changes.put_nowait)
    await driver.resume(NAME, 1)
    async with asyncio.timeout(10):
        assert [await changes.get() for _ in range(2)] == [NAME, NAME]
    assert await power_of(driver) is ObservedPower.SHUT_OFF
