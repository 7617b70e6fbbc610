"""A node's libvirtd with its guests: what survives agents, and what an agent reaches of it.

Owns the witness of guests: after every call and every event it compares which guests run with what
it saw before, and tells an observer. A call that libvirtd has taken is carried out even if the
agent that made it is dead by then. When libvirtd itself is away, guests go on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from agent.hypervisor import (
    DomainDefinition,
    DomainInfo,
    DomainListener,
    Hypervisor,
    HypervisorFacts,
    MigrationEnd,
    Outgoing,
    Transfer,
)
from agent.relay import Relays, RelayTarget
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState
from shared.errors import FieldError, HypervisorUnavailable
from shared.model import ObservedPower, Sample
from shared.moves import MigrationFigures
from shared.protocol import DestinationLayout, DestinationQuestion, SourceCheck
from tests.sim.ledger import (
    Ended,
    Erased,
    Left,
    Resumed,
    SetOut,
    SimEvent,
    Started,
    StillRuns,
)
from tests.sim.process import Process, never_mind, outside

Result = TypeVar("Result")
Observer = Callable[[SimEvent], None]

# Reading a domain takes a millisecond; starting QEMU some hundred.
QUICK_S = (0.0005, 0.005)
SLOW_S = (0.05, 0.4)
# Some calls wait for a lock, a disk, another guest; which share, the cluster's settings say.
HELD_UP_S = (1.0, 8.0)
# How often a guest is looked at that libvirt let go on.
ATTEND_S = 0.5


class Libvirtd:
    """One boot of a node: ``state`` is looked at by the witness, ``driver`` is what agents use."""

    def __init__(
        self,
        node: str,
        boot_id: str,
        state: SimulatedNodeState,
        driver: SimulatedDriver,
        rng: random.Random,
        observe: Observer,
        held_up_share: float,
    ) -> None:
        self._held_up_share = held_up_share
        self.node = node
        self.boot_id = boot_id
        self.available = True
        self._driver = driver
        self._state = state
        self._rng = rng
        self._observe = observe
        self._running: dict[str, int] = {}
        self._still: dict[str, int] = {}
        self._listeners: list[tuple[Process, DomainListener]] = []
        self._ending_by_agent: dict[str, None] = {}
        state.observe(self._domain_changed)

    def listen(self, process: Process, listener: DomainListener) -> None:
        self._listeners = [each for each in self._listeners if each[0].alive]
        self._listeners.append((process, listener))

    def go_away(self) -> None:
        """Die as a process does: calls under way have an unknown outcome, events are lost."""
        self.available = False
        self._state.libvirtd_dies()

    def come_back(self) -> None:
        if not self.available:
            self.available = True
            self.witness()
            self._state.libvirtd_returns()

    async def call(
        self, work: Callable[[Hypervisor], Awaitable[Result]], bounds: tuple[float, float]
    ) -> Result:
        """Carry a call out, a little later; raises HypervisorUnavailable before or after it."""
        self._refuse_when_away()
        held_up = self._rng.random() < self._held_up_share
        delay_s = self._rng.uniform(*(HELD_UP_S if held_up else bounds))
        await asyncio.sleep(delay_s / 2)
        self._refuse_when_away()
        try:
            result = await work(self._driver)
        finally:
            self.witness()
        await asyncio.sleep(delay_s / 2)
        self._refuse_when_away()
        return result

    async def stop(self, driver: Hypervisor, name: str, generation: int) -> None:
        """Stop a domain for an agent, and witness whose wish that was."""
        self._ending_by_agent[name] = None
        try:
            await driver.stop(name, generation)
            self.witness()
        finally:
            self._ending_by_agent.pop(name, None)

    def erased(self, vm_id: str) -> None:
        self._observe(Erased(self.node, vm_id))

    def witness(self) -> None:
        """Compare which guests run with what was seen last."""
        ours = {d.vm_id: d for d in self._state.domains.values() if d.vm_id is not None}
        running = {vm: d.generation for vm, d in ours.items() if d.executes}
        still = {
            vm: d.generation
            for vm, d in ours.items()
            if d.is_active() and not d.executes and not d.incoming
        }
        before, stood_still = self._running, self._still
        self._running, self._still = running, still
        for vm_id, generation in (*before.items(), *stood_still.items()):
            if generation in (running.get(vm_id), still.get(vm_id)):
                continue
            by_agent = vm_id in self._ending_by_agent
            self._observe(Ended(self.node, vm_id, generation, by_agent))
        for vm_id, generation in still.items():
            if stood_still.get(vm_id) != generation:
                self._observe(Left(self.node, vm_id, generation))
        for vm_id, generation in running.items():
            if before.get(vm_id) == generation:
                continue
            if stood_still.get(vm_id) == generation:
                returned = ours[vm_id].returned
                self._observe(Resumed(self.node, vm_id, generation, returned))
                if returned:
                    self._attend(ours[vm_id].name, vm_id, generation, 0.0)
            else:
                paused = ours[vm_id].power is ObservedPower.PAUSED
                self._observe(Started(self.node, self.boot_id, vm_id, generation, paused))

    def _attend(self, name: str, vm_id: str, generation: int, attended_s: float) -> None:
        """Tell for how long a returned guest runs on while somebody could hold it."""
        domain = self._state.domains.get(name)
        if domain is None or domain.generation != generation or not domain.returned:
            return
        attended = self.available and any(process.alive for process, _ in self._listeners)
        if attended and attended_s:
            self._observe(StillRuns(self.node, vm_id, generation, attended_s))
        asyncio.get_running_loop().call_later(
            ATTEND_S,
            self._attend,
            name,
            vm_id,
            generation,
            attended_s + ATTEND_S if attended else 0.0,
        )

    def _domain_changed(self, name: str) -> None:
        """Told at once of each change; agents hear of it a little later, while they live."""
        self.witness()
        for process, listener in self._listeners:
            if process.alive:
                asyncio.get_running_loop().call_soon(listener, name)

    def _refuse_when_away(self) -> None:
        if not self.available:
            raise HypervisorUnavailable(f"libvirtd of {self.node} does not answer")


class ProcessHypervisor:
    """The port ``Hypervisor`` as one agent's process has it."""

    def __init__(self, process: Process, libvirtd: Libvirtd) -> None:
        self._process = process
        self._libvirtd = libvirtd

    async def facts(self) -> HypervisorFacts:
        return await self._quick(lambda driver: driver.facts())

    async def domains(self) -> tuple[DomainInfo, ...]:
        return await self._quick(lambda driver: driver.domains())

    async def domain(self, name: str) -> DomainInfo | None:
        return await self._quick(lambda driver: driver.domain(name))

    async def define(self, definition: DomainDefinition) -> None:
        await self._quick(lambda driver: driver.define(definition))

    async def start(self, name: str, generation: int) -> None:
        await self._slow(lambda driver: driver.start(name, generation))

    async def shutdown(self, name: str, generation: int) -> None:
        await self._quick(lambda driver: driver.shutdown(name, generation))

    async def stop(self, name: str, generation: int) -> None:
        await self._slow(lambda driver: self._libvirtd.stop(driver, name, generation))

    async def pause(self, name: str, generation: int) -> None:
        await self._quick(lambda driver: driver.pause(name, generation))

    async def resume(self, name: str, generation: int) -> None:
        await self._quick(lambda driver: driver.resume(name, generation))

    async def reboot(self, name: str, generation: int) -> None:
        await self._quick(lambda driver: driver.reboot(name, generation))

    async def reset(self, name: str, generation: int) -> None:
        await self._quick(lambda driver: driver.reset(name, generation))

    async def undefine(self, name: str, generation: int, *, keep_log: bool = False) -> None:
        async def undefine(driver: Hypervisor) -> None:
            domain = await driver.domain(name)
            await driver.undefine(name, generation, keep_log=keep_log)
            if domain is not None and domain.vm_id is not None:
                self._libvirtd.erased(domain.vm_id)

        await self._quick(undefine)

    async def ensure_volume(
        self, pool: str, volume: str, size_gib: int, *, make: bool = True
    ) -> None:
        await self._slow(lambda driver: driver.ensure_volume(pool, volume, size_gib, make=make))

    async def delete_volume(self, pool: str, volume: str) -> None:
        async def delete(driver: Hypervisor) -> None:
            there = volume in await driver.volumes(pool)
            await driver.delete_volume(pool, volume)
            if there:
                self._libvirtd.erased(volume.rpartition("-")[0])

        await self._quick(delete)

    async def volumes(self, pool: str) -> tuple[str, ...]:
        return await self._quick(lambda driver: driver.volumes(pool))

    async def console_log(self, name: str, offset: int, limit_bytes: int) -> bytes:
        return await self._quick(lambda driver: driver.console_log(name, offset, limit_bytes))

    async def console_size(self, name: str) -> int:
        return await self._quick(lambda driver: driver.console_size(name))

    async def delete_console_log(self, name: str) -> None:
        await self._quick(lambda driver: driver.delete_console_log(name))

    async def samples(self) -> tuple[Sample, ...]:
        return await self._quick(lambda driver: driver.samples())

    async def migration_end(self, name: str) -> MigrationEnd | None:
        return await self._quick(lambda driver: driver.migration_end(name))

    async def check_source(self, name: str, generation: int) -> SourceCheck:
        return await self._quick(lambda driver: driver.check_source(name, generation))

    async def check_destination(
        self, name: str, question: DestinationQuestion
    ) -> tuple[FieldError, ...]:
        return await self._quick(lambda driver: driver.check_destination(name, question))

    async def layout(self, definition: DomainDefinition) -> DestinationLayout:
        return await self._quick(lambda driver: driver.layout(definition))

    async def migrate(self, name: str, generation: int, outgoing: Outgoing) -> None:
        await self._quick(lambda driver: driver.migrate(name, generation, outgoing))

    async def abort_migration(self, name: str, generation: int) -> None:
        await self._slow(lambda driver: driver.abort_migration(name, generation))

    async def transfer(self, name: str) -> Transfer | None:
        return await self._quick(lambda driver: driver.transfer(name))

    async def set_max_downtime(self, name: str, generation: int, max_downtime_ms: int) -> None:
        await self._quick(lambda d: d.set_max_downtime(name, generation, max_downtime_ms))

    async def figures(self, name: str) -> MigrationFigures | None:
        return await self._quick(lambda driver: driver.figures(name))

    async def hold(self, name: str, generation: int) -> bool:
        return await self._quick(lambda driver: driver.hold(name, generation))

    def listen(self, listener: DomainListener) -> None:
        self._libvirtd.listen(self._process, listener)

    async def _quick(self, work: Callable[[Hypervisor], Awaitable[Result]]) -> Result:
        return await self._call(work, QUICK_S)

    async def _slow(self, work: Callable[[Hypervisor], Awaitable[Result]]) -> Result:
        return await self._call(work, SLOW_S)

    async def _call(
        self, work: Callable[[Hypervisor], Awaitable[Result]], bounds: tuple[float, float]
    ) -> Result:
        self._process.check()
        call = outside(self._libvirtd.call(work, bounds), "libvirtd-call")
        call.add_done_callback(never_mind)
        await asyncio.wait({call})
        self._process.check()
        return call.result()


class RelaysOfProcess:
    """The port ``Relays`` as one agent's process has it; what it opened outlives it."""

    def __init__(self, node: str, process: Process, relays: Relays, observe: Observer) -> None:
        self._node = node
        self._process = process
        self._relays = relays
        self._observe = observe

    async def admit(self, name: str, source_node: str) -> str:
        return await self._call(self._relays.admit(name, source_node))

    async def withdraw(self, name: str) -> None:
        await self._call(self._relays.withdraw(name))

    async def revoke(self, name: str) -> None:
        await self._call(self._relays.revoke(name))

    async def open(self, name: str, target: RelayTarget, token: str) -> str:
        self._process.check()
        vm_id, _, generation = name.rpartition(".")
        self._observe(SetOut(self._node, vm_id, int(generation)))
        return await self._call(self._relays.open(name, target, token))

    async def close(self, name: str) -> None:
        await self._call(self._relays.close(name))

    async def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            self._process.check()
        except BaseException:
            work.close()
            raise
        result = await work
        self._process.check()
        return result
