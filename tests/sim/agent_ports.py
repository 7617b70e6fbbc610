"""The ports of one agent's process: what it reaches of its node, for as long as it lives.

Every call is checked before and after it, so that a dead process has no effect; what it has asked
of libvirtd goes on without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from agent.append_log import AppendLog
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
from shared.errors import FieldError
from shared.model import Sample
from shared.moves import MigrationFigures
from shared.protocol import DestinationLayout, DestinationQuestion, SourceCheck
from tests.sim.ledger import Pausing, Restarting, SetOut
from tests.sim.libvirtd import Libvirtd, Observer
from tests.sim.process import Process, never_mind, outside

Result = TypeVar("Result")

# Reading a domain takes a millisecond; starting QEMU some hundred.
QUICK_S = (0.0005, 0.005)
SLOW_S = (0.05, 0.4)


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
        await self._act(lambda driver: driver.define(definition))

    async def start(self, name: str, generation: int) -> None:
        await self._slow_act(lambda driver: driver.start(name, generation))

    async def shutdown(self, name: str, generation: int) -> None:
        await self._command(lambda driver: driver.shutdown(name, generation))

    async def stop(self, name: str, generation: int) -> None:
        await self._slow_command(lambda driver: self._libvirtd.stop(driver, name, generation))

    async def pause(self, name: str, generation: int) -> None:
        self._tell(Pausing, name, generation)
        await self._command(lambda driver: driver.pause(name, generation))

    async def resume(self, name: str, generation: int) -> None:
        await self._command(lambda driver: driver.resume(name, generation))

    async def reboot(self, name: str, generation: int) -> None:
        self._tell(Restarting, name, generation)
        await self._command(lambda driver: driver.reboot(name, generation))

    async def reset(self, name: str, generation: int) -> None:
        self._tell(Restarting, name, generation)
        await self._command(lambda driver: driver.reset(name, generation))

    async def undefine(self, name: str, generation: int, *, keep_log: bool = False) -> None:
        async def undefine(driver: Hypervisor) -> None:
            domain = await driver.domain(name)
            await driver.undefine(name, generation, keep_log=keep_log)
            if domain is not None and domain.vm_id is not None:
                self._libvirtd.erased(domain.vm_id)

        await self._act(undefine)

    async def ensure_volume(
        self, pool: str, volume: str, size_gib: int, *, make: bool = True
    ) -> None:
        await self._slow_act(lambda driver: driver.ensure_volume(pool, volume, size_gib, make=make))

    async def delete_volume(self, pool: str, volume: str) -> None:
        async def delete(driver: Hypervisor) -> None:
            there = volume in await driver.volumes(pool)
            await driver.delete_volume(pool, volume)
            if there:
                self._libvirtd.erased_volume(pool, volume)

        await self._act(delete)

    async def volumes(self, pool: str) -> tuple[str, ...]:
        return await self._quick(lambda driver: driver.volumes(pool))

    async def console_log(self, name: str, offset: int, limit_bytes: int) -> bytes:
        return await self._quick(lambda driver: driver.console_log(name, offset, limit_bytes))

    async def console_size(self, name: str) -> int:
        return await self._quick(lambda driver: driver.console_size(name))

    async def delete_console_log(self, name: str) -> None:
        await self._act(lambda driver: driver.delete_console_log(name))

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
        await self._act(lambda driver: driver.migrate(name, generation, outgoing))

    async def abort_migration(self, name: str, generation: int) -> None:
        await self._slow_command(lambda driver: driver.abort_migration(name, generation))

    async def transfer(self, name: str) -> Transfer | None:
        return await self._quick(lambda driver: driver.transfer(name))

    async def set_max_downtime(self, name: str, generation: int, max_downtime_ms: int) -> None:
        await self._act(lambda d: d.set_max_downtime(name, generation, max_downtime_ms))

    async def figures(self, name: str) -> MigrationFigures | None:
        return await self._quick(lambda driver: driver.figures(name))

    async def hold(self, name: str, generation: int) -> bool:
        return await self._quick(lambda driver: driver.hold(name, generation))

    def listen(self, listener: DomainListener) -> None:
        self._libvirtd.listen(self._process, listener)

    def _tell(self, kind: type[Restarting] | type[Pausing], name: str, generation: int) -> None:
        self._process.check()
        self._libvirtd.told(kind, name, generation)

    async def _quick(self, work: Callable[[Hypervisor], Awaitable[Result]]) -> Result:
        return await self._call(self._libvirtd.call(work, QUICK_S))

    async def _act(self, work: Callable[[Hypervisor], Awaitable[None]]) -> None:
        await self._call(self._libvirtd.act(work, QUICK_S))

    async def _command(self, work: Callable[[Hypervisor], Awaitable[None]]) -> None:
        await self._call(self._libvirtd.act(work, QUICK_S, by_guest=True))

    async def _slow_command(self, work: Callable[[Hypervisor], Awaitable[None]]) -> None:
        await self._call(self._libvirtd.act(work, SLOW_S, by_guest=True))

    async def _slow_act(self, work: Callable[[Hypervisor], Awaitable[None]]) -> None:
        await self._call(self._libvirtd.act(work, SLOW_S))

    async def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            self._process.check()
        except BaseException:
            work.close()
            raise
        call = outside(work, "libvirtd-call")
        call.add_done_callback(never_mind)
        try:
            return await self._libvirtd.answer(call)
        finally:
            self._process.check()


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
        call = outside(work, "relay-call")
        call.add_done_callback(never_mind)
        await asyncio.wait({call})
        self._process.check()
        return call.result()


class LogOfProcess:
    """The node's fence log as one agent's process has it open; ``delay_s`` is its disk's."""

    def __init__(self, log: AppendLog, process: Process, delay_s: Callable[[], float]) -> None:
        self._log = log
        self._process = process
        self._delay_s = delay_s

    def read(self) -> list[bytes]:
        return self._log.read()

    def append(self, record: bytes) -> None:
        self._process.check()
        self._log.append(record)
        self._process.check()

    def rewrite(self, records: Sequence[bytes]) -> None:
        self._process.check()
        self._log.rewrite(records)

    async def offload(self, work: Callable[[], Result]) -> Result:
        """Run a write. On a slow disk it may be there before its process learns of it."""
        self._process.check()
        delay_s = self._delay_s()
        if delay_s > 0:
            await asyncio.sleep(delay_s / 2)
        result = work()
        if delay_s > 0:
            await asyncio.sleep(delay_s / 2)
            self._process.check()
        return result
