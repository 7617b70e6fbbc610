"""A libvirtd that hangs, lies about what it did, or tells nobody; looks are always true."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from agent.hypervisor import DomainDefinition
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState, simulated_facts
from shared.clock import SystemClock
from shared.errors import HypervisorError, HypervisorUnavailable
from shared.model import BootSpec, ObservedPower, VmSpec
from tests.sim.agent_ports import ProcessHypervisor
from tests.sim.ledger import SimEvent
from tests.sim.libvirtd import EARLY_ANSWER_S, SILENCE_LIMIT_S, Libvirtd
from tests.sim.process import Process, adopt_by_context
from tests.sim.virtual_loop import run_virtual

VM = DomainDefinition(
    vm_id="vm-1",
    name="vm-1",
    uuid="00000000-0000-0000-0000-000000000001",
    title="web-1",
    tenant="default",
    generation=1,
    spec=VmSpec(vcpus=1, memory_mib=512, boot=BootSpec(kernel="tiny-kernel")),
)


class World:
    def __init__(self) -> None:
        state = SimulatedNodeState(simulated_facts())
        self.events: list[SimEvent] = []
        self.libvirtd = Libvirtd(
            "node",
            "boot",
            state,
            SimulatedDriver(state, SystemClock()),
            random.Random(1),
            self.events.append,
            0.0,
        )
        self.process = Process("node", "node.1")
        self.port = ProcessHypervisor(self.process, self.libvirtd)

    async def power(self) -> ObservedPower:
        domain = await self.port.domain("vm-1")
        assert domain is not None
        return domain.power


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await world.port.define(VM)
        await test(world)

    run_virtual(main(), adopt_by_context)


def test_a_libvirtd_that_hangs_is_given_up_and_does_what_it_was_asked_later() -> None:
    async def test(world: World) -> None:
        world.libvirtd.hang()
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(HypervisorUnavailable):
            await world.port.start("vm-1", 1)
        assert asyncio.get_running_loop().time() - began_s >= SILENCE_LIMIT_S
        world.libvirtd.go_on()
        await asyncio.sleep(1)
        assert await world.power() is ObservedPower.RUNNING

    run(test)


def test_a_short_hang_only_takes_time() -> None:
    async def test(world: World) -> None:
        world.libvirtd.hang()
        asyncio.get_running_loop().call_later(SILENCE_LIMIT_S / 2, world.libvirtd.go_on)
        await world.port.start("vm-1", 1)
        assert await world.power() is ObservedPower.RUNNING

    run(test)


def test_an_act_that_is_said_to_have_failed_has_been_carried_out() -> None:
    async def test(world: World) -> None:
        world.libvirtd.acts_said_to_fail = 1
        with pytest.raises(HypervisorError):
            await world.port.start("vm-1", 1)
        assert await world.power() is ObservedPower.RUNNING
        await world.port.stop("vm-1", 1)
        assert await world.power() is ObservedPower.STOPPED

    run(test)


def test_an_act_that_is_said_to_be_done_is_carried_out_later() -> None:
    async def test(world: World) -> None:
        await world.port.start("vm-1", 1)
        world.libvirtd.acts_said_to_be_done = 1
        await world.port.stop("vm-1", 1)
        assert await world.power() is ObservedPower.RUNNING
        await asyncio.sleep(EARLY_ANSWER_S[1] + 1)
        assert await world.power() is ObservedPower.STOPPED

    run(test)


def test_lost_events_stay_lost() -> None:
    async def test(world: World) -> None:
        told: list[str] = []
        world.port.listen(told.append)
        world.libvirtd.lose_events()
        await world.port.start("vm-1", 1)
        world.libvirtd.tell_events()
        await asyncio.sleep(1)
        assert told == []
        await world.port.stop("vm-1", 1)
        await asyncio.sleep(1)
        assert set(told) == {"vm-1"}

    run(test)
