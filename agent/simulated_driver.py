"""The hypervisor port in memory, on the loop's clock: for simulation, demo and tests.

``SimulatedNodeState`` is the node: it outlives the driver, as guests outlive an agent, and has the
levers that a test pulls (a guest that ends, a libvirtd that dies, a node that loses power). The
driver adds the port and the hooks that delay or break its calls. Passes the same contract tests as
the libvirt driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from agent.hypervisor import (
    DomainDefinition,
    DomainInfo,
    DomainListener,
    HypervisorFacts,
    volume_name,
)
from agent.simulated_guest import SimulatedDomain
from shared.clock import Clock
from shared.errors import (
    ArtefactMissing,
    DomainNotFound,
    GenerationMismatch,
    HypervisorError,
    HypervisorUnavailable,
)
from shared.model import CpuFacts, NumaCell, ObservedPower, PoolFacts, Sample

T = TypeVar("T")


class SimulatedHooks(Protocol):
    """What happens around every call: waiting is latency, raising is a fault.

    ``call`` is the port's method, ``name`` the domain or volume, or empty. An error from ``after``
    stands for an answer that was lost: the act has been carried out.
    """

    async def before(self, call: str, name: str) -> None: ...

    async def after(self, call: str, name: str) -> None: ...


class NoHooks:
    """Calls take no time and never fail."""

    async def before(self, call: str, name: str) -> None:
        return None

    async def after(self, call: str, name: str) -> None:
        return None


def simulated_facts(
    *,
    cpus: int = 4,
    memory_mib: int = 8192,
    networks: tuple[str, ...] = ("lan",),
    artefacts: tuple[str, ...] = ("tiny-initrd", "tiny-kernel"),
    pools: tuple[str, ...] = ("default",),
    shared_pools: tuple[str, ...] = (),
    pool_gib: float = 1024.0,
) -> HypervisorFacts:
    """Return the facts of a plain node; every simulated node has the same CPU."""
    return HypervisorFacts(
        cpus=cpus,
        memory_mib=memory_mib,
        cpu=CpuFacts(model="qemu64", cores=cpus, models=("qemu64",)),
        numa=(NumaCell(id=0, memory_mib=memory_mib, cpus=tuple(range(cpus))),),
        pools=tuple(
            PoolFacts(
                name=name, capacity_gib=pool_gib, free_gib=pool_gib, shared=name in shared_pools
            )
            for name in sorted(pools)
        ),
        networks=tuple(sorted(networks)),
        artefacts=tuple(sorted(artefacts)),
        machine_types=("pc-q35-7.2",),
        virtualization="qemu",
        libvirt_version="9.0.0",
        qemu_version="7.2.0",
    )


class SimulatedNodeState:
    """A node's domains, guests and volumes; lives on when an agent dies."""

    def __init__(self, facts: HypervisorFacts) -> None:
        self.facts = facts
        self.domains: dict[str, SimulatedDomain] = {}
        self.pools: dict[str, dict[str, int]] = {pool.name: {} for pool in facts.pools}
        self.libvirtd_runs = True
        self._observer: Callable[[str], None] = _nobody

    def observe(self, observer: Callable[[str], None]) -> None:
        """Send changes to ``observer`` from now on; a node has one agent."""
        self._observer = observer

    def guest_powers_off(self, name: str) -> None:
        self._running(name).end(ObservedPower.SHUT_OFF)

    def guest_crashes(self, name: str) -> None:
        self._running(name).end(ObservedPower.CRASHED)

    def reboot(self) -> None:
        """Lose power and come back: nothing runs, definitions and volumes are still there."""
        for domain in self.domains.values():
            if domain.is_active():
                domain.end(ObservedPower.STOPPED, tell=False)
            # The reason for which a domain ended is libvirtd's memory, not its disk's.
            domain.power = ObservedPower.STOPPED
        self.libvirtd_runs = True

    def libvirtd_dies(self) -> None:
        """Refuse every call; guests go on."""
        self.libvirtd_runs = False

    def libvirtd_returns(self) -> None:
        self.libvirtd_runs = True
        self.changed("")

    def add_foreign(self, name: str, uuid: str) -> None:
        """Add a domain that somebody else has defined and started."""
        domain = SimulatedDomain(name, uuid, None, 0, None, self.changed)
        self.domains[name] = domain
        domain.start()

    def changed(self, name: str) -> None:
        if self.libvirtd_runs:
            self._observer(name)

    def _running(self, name: str) -> SimulatedDomain:
        domain = self.domains[name]
        assert domain.is_active(), "only a running guest ends by itself"
        return domain


class SimulatedDriver:
    """Implements ``agent.hypervisor.Hypervisor`` for one agent's life."""

    def __init__(
        self, state: SimulatedNodeState, clock: Clock, hooks: SimulatedHooks | None = None
    ) -> None:
        self._state = state
        self._clock = clock
        self._hooks: SimulatedHooks = NoHooks() if hooks is None else hooks
        self._listeners: list[DomainListener] = []
        state.observe(self._notify)

    async def run(self) -> None:
        """Run until cancelled, as the libvirt driver does; there is nothing to keep up."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Hear no more of the node; its guests go on."""
        self._listeners.clear()

    async def wait_connected(self) -> None:
        return None

    async def facts(self) -> HypervisorFacts:
        return await self._call("facts", "", self._facts)

    async def domains(self) -> tuple[DomainInfo, ...]:
        return await self._call("domains", "", self._domains)

    async def domain(self, name: str) -> DomainInfo | None:
        def find() -> DomainInfo | None:
            found = self._state.domains.get(name)
            return None if found is None else found.info()

        return await self._call("domain", name, find)

    async def define(self, definition: DomainDefinition) -> None:
        await self._call("define", definition.name, lambda: self._define(definition))

    async def start(self, name: str, generation: int) -> None:
        await self._act("start", name, generation, self._start)

    async def shutdown(self, name: str, generation: int) -> None:
        await self._act("shutdown", name, generation, lambda d: _press(d, "poweroff"))

    async def stop(self, name: str, generation: int) -> None:
        await self._act("stop", name, generation, _stop)

    async def pause(self, name: str, generation: int) -> None:
        await self._act("pause", name, generation, lambda d: _active(d).pause())

    async def resume(self, name: str, generation: int) -> None:
        await self._act("resume", name, generation, lambda d: _active(d).resume())

    async def reboot(self, name: str, generation: int) -> None:
        await self._act("reboot", name, generation, lambda d: _press(d, "reboot"))

    async def reset(self, name: str, generation: int) -> None:
        await self._act("reset", name, generation, lambda d: _active(d).reset())

    async def undefine(self, name: str, generation: int) -> None:
        await self._call("undefine", name, lambda: self._undefine(name, generation))

    async def ensure_volume(self, pool: str, volume: str, size_gib: int) -> None:
        def ensure() -> None:
            existing = self._pool(pool).setdefault(volume, size_gib)
            if existing != size_gib:
                raise HypervisorError(
                    f"volume {volume!r} in pool {pool!r} has {existing} GiB, not {size_gib}"
                )

        await self._call("ensure_volume", volume, ensure)

    async def delete_volume(self, pool: str, volume: str) -> None:
        def delete() -> None:
            self._pool(pool).pop(volume, None)

        await self._call("delete_volume", volume, delete)

    async def volumes(self, pool: str) -> tuple[str, ...]:
        return await self._call("volumes", "", lambda: tuple(sorted(self._pool(pool))))

    async def console_log(self, name: str, offset: int, limit_bytes: int) -> bytes:
        def read() -> bytes:
            domain = self._state.domains.get(name)
            if domain is None:
                return b""
            domain.catch_up()
            log = domain.console
            start = max(0, len(log) + offset) if offset < 0 else offset
            return log[start : start + limit_bytes]

        return await self._call("console_log", name, read)

    async def samples(self) -> tuple[Sample, ...]:
        at = self._clock.now().timestamp()

        def take() -> tuple[Sample, ...]:
            ours = (d for d in self._state.domains.values() if d.vm_id and d.is_active())
            return tuple(sorted((d.sample(at) for d in ours), key=lambda sample: sample.object))

        return await self._call("samples", "", take)

    def listen(self, listener: DomainListener) -> None:
        self._listeners.append(listener)

    def guest_powers_off(self, name: str) -> None:
        """Have a running guest power itself off."""
        self._state.guest_powers_off(name)

    def guest_crashes(self, name: str) -> None:
        """Have a running guest crash."""
        self._state.guest_crashes(name)

    def _notify(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.call_soon(listener, name)

    async def _call(self, call: str, name: str, work: Callable[[], T]) -> T:
        self._check_libvirtd()
        await self._hooks.before(call, name)
        # It may have died while the call was on its way.
        self._check_libvirtd()
        result = work()
        await self._hooks.after(call, name)
        return result

    async def _act(
        self, call: str, name: str, generation: int, act: Callable[[SimulatedDomain], None]
    ) -> None:
        def checked() -> None:
            domain = self._state.domains.get(name)
            if domain is None:
                raise DomainNotFound(f"this node has no domain {name!r}")
            _check_generation(domain, generation)
            act(domain)

        await self._call(call, name, checked)

    def _check_libvirtd(self) -> None:
        if not self._state.libvirtd_runs:
            raise HypervisorUnavailable("libvirtd is out of reach")

    def _facts(self) -> HypervisorFacts:
        facts = self._state.facts
        pools = tuple(
            msgspec.structs.replace(
                pool,
                free_gib=pool.capacity_gib - sum(self._state.pools[pool.name].values()),
            )
            for pool in facts.pools
        )
        return msgspec.structs.replace(facts, pools=pools)

    def _domains(self) -> tuple[DomainInfo, ...]:
        return tuple(domain.info() for _, domain in sorted(self._state.domains.items()))

    def _define(self, definition: DomainDefinition) -> None:
        state, spec = self._state, definition.spec
        for artefact in (spec.boot.kernel, spec.boot.initrd):
            if artefact is not None and artefact not in state.facts.artefacts:
                raise ArtefactMissing(f"this node has no artefact {artefact!r}")
        for disk in spec.disks:
            self._pool(disk.pool)
        for nic in spec.nics:
            if nic.network not in state.facts.networks:
                raise HypervisorError(f"this node has no bridge for network {nic.network!r}")
        console = b""
        existing = state.domains.get(definition.name)
        if existing is not None:
            _check_redefinable(existing)
            console = existing.console
        defined = SimulatedDomain(
            definition.name,
            definition.uuid,
            definition.vm_id,
            definition.generation,
            spec,
            state.changed,
        )
        defined.console = console
        state.domains[definition.name] = defined
        state.changed(definition.name)

    def _start(self, domain: SimulatedDomain) -> None:
        if domain.is_active():
            raise HypervisorError(f"domain {domain.name!r} runs already")
        assert domain.spec is not None, "its generation was checked, so it is ours"
        for disk in domain.spec.disks:
            volume = volume_name(domain.vm_id or "", disk.name)
            if volume not in self._pool(disk.pool):
                domain.end(ObservedPower.CRASHED)
                raise HypervisorError(f"volume {volume!r} is not there")
        domain.start()

    def _undefine(self, name: str, generation: int) -> None:
        domain = self._state.domains.get(name)
        if domain is None:
            return
        _check_generation(domain, generation)
        if domain.is_active():
            raise HypervisorError(f"domain {name!r} runs and cannot be undefined")
        del self._state.domains[name]
        self._state.changed(name)

    def _pool(self, name: str) -> dict[str, int]:
        if name not in self._state.pools:
            raise HypervisorError(f"this node has no storage pool {name!r}")
        return self._state.pools[name]


def _nobody(name: str) -> None:
    return None


def _check_generation(domain: SimulatedDomain, generation: int) -> None:
    if domain.vm_id is None:
        raise GenerationMismatch(f"domain {domain.name!r} is not one of ours")
    if domain.generation != generation:
        raise GenerationMismatch(
            f"domain {domain.name!r} has generation {domain.generation}, not {generation}"
        )


def _check_redefinable(domain: SimulatedDomain) -> None:
    if domain.vm_id is None:
        raise HypervisorError(f"domain {domain.name!r} is not one of ours")
    if domain.is_active():
        raise HypervisorError(f"domain {domain.name!r} runs and cannot be defined anew")


def _active(domain: SimulatedDomain) -> SimulatedDomain:
    if not domain.is_active():
        raise HypervisorError(f"domain {domain.name!r} does not run")
    return domain


def _press(domain: SimulatedDomain, outcome: str) -> None:
    _active(domain).press_power_button(outcome)


def _stop(domain: SimulatedDomain) -> None:
    if domain.is_active():
        domain.end(ObservedPower.STOPPED)
