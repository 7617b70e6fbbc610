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
    MigrationEnd,
    Outgoing,
    Transfer,
    volume_name,
)
from agent.simulated_fabric import SimulatedFabric, Travel
from agent.simulated_guest import ConsoleLog, SimulatedDomain
from shared.clock import Clock
from shared.errors import (
    ArtefactMissing,
    DiskMissing,
    DomainNotFound,
    FieldError,
    GenerationMismatch,
    HypervisorError,
    HypervisorUnavailable,
)
from shared.model import CpuFacts, NumaCell, ObservedPower, PoolFacts, Sample, VmSpec
from shared.moves import MigrationFigures
from shared.protocol import DestinationLayout, DestinationQuestion, SourceCheck

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
    """A node's domains, guests and volumes; lives on when an agent dies.

    Nodes of one ``fabric`` can move guests between each other, and share the pools that say so.
    """

    def __init__(
        self, facts: HypervisorFacts, fabric: SimulatedFabric | None = None, address: str = ""
    ) -> None:
        self.facts = facts
        self.fabric = fabric or SimulatedFabric()
        self.address = address
        self.fabric.nodes[address] = self
        self.domains: dict[str, SimulatedDomain] = {}
        self.pools: dict[str, dict[str, int]] = {
            pool.name: self.fabric.shared_pool(pool.name) if pool.shared else {}
            for pool in facts.pools
        }
        self.consoles: dict[str, ConsoleLog] = {}
        self.figures: dict[str, MigrationFigures] = {}
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
        self._end_travels()
        for domain in list(self.domains.values()):
            if domain.incoming:
                del self.domains[domain.name]
                continue
            if domain.is_active():
                domain.end(ObservedPower.STOPPED, tell=False)
            # The reason for which a domain ended is libvirtd's memory, not its disk's.
            domain.power = ObservedPower.STOPPED
        self.libvirtd_runs = True

    def libvirtd_dies(self) -> None:
        """Refuse every call; guests go on."""
        self.libvirtd_runs = False
        self._end_travels()

    def libvirtd_returns(self) -> None:
        self.libvirtd_runs = True
        self.changed("")

    def console(self, name: str) -> bytes:
        """Return a domain's console log: of the one that is here, or what an earlier one left."""
        domain, log = self.domains.get(name), self.consoles.get(name)
        if domain is not None:
            domain.catch_up()
        return b"" if log is None else log.text

    def make(self, definition: DomainDefinition) -> SimulatedDomain:
        """Make a domain that is not there yet; it writes on its name's console log."""
        return SimulatedDomain(
            definition.name,
            definition.uuid,
            definition.vm_id,
            definition.generation,
            definition.spec,
            self.consoles.setdefault(definition.name, ConsoleLog()),
            self.changed,
        )

    def receive(self, definition: DomainDefinition) -> SimulatedDomain:
        """Make the domain that a migration fills."""
        domain = self.make(definition)
        domain.incoming = domain.never_ran = True
        domain.power = ObservedPower.PAUSED
        self.domains[domain.name] = domain
        self.changed(domain.name)
        return domain

    def forget(self, domain: SimulatedDomain) -> None:
        """Drop a domain that libvirt itself ends and undefines."""
        if self.domains.get(domain.name) is domain:
            if domain.is_active():
                domain.end(ObservedPower.STOPPED, tell=False)
            del self.domains[domain.name]
            self.changed(domain.name)

    def _end_travels(self) -> None:
        for domain in list(self.domains.values()):
            if domain.travel is None:
                continue
            if domain.incoming or domain.arrived:
                domain.travel.destination_libvirtd_died()
            else:
                domain.travel.source_libvirtd_died()

    def add_foreign(self, name: str, uuid: str) -> None:
        """Add a domain that somebody else has defined and started."""
        domain = SimulatedDomain(name, uuid, None, 0, None, ConsoleLog(), self.changed)
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
        self._notify("")
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

    async def undefine(self, name: str, generation: int, *, keep_log: bool = False) -> None:
        def undefine() -> None:
            self._undefine(name, generation)
            if not keep_log:
                self._state.consoles.pop(name, None)

        await self._call("undefine", name, undefine)

    async def ensure_volume(
        self, pool: str, volume: str, size_gib: int, *, make: bool = True
    ) -> None:
        def ensure() -> None:
            volumes = self._pool(pool)
            if volume not in volumes and not make:
                raise DiskMissing(f"pool {pool!r} has no volume {volume!r} here")
            existing = volumes.setdefault(volume, size_gib)
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
            log = self._state.console(name)
            start = max(0, len(log) + offset) if offset < 0 else offset
            return log[start : start + limit_bytes]

        return await self._call("console_log", name, read)

    async def console_size(self, name: str) -> int:
        return await self._call("console_size", name, lambda: len(self._state.console(name)))

    async def delete_console_log(self, name: str) -> None:
        def delete() -> None:
            self._state.consoles.pop(name, None)

        await self._call("delete_console_log", name, delete)

    async def samples(self) -> tuple[Sample, ...]:
        at = self._clock.now().timestamp()

        def take() -> tuple[Sample, ...]:
            ours = (d for d in self._state.domains.values() if d.vm_id and d.is_active())
            return tuple(sorted((d.sample(at) for d in ours), key=lambda sample: sample.object))

        return await self._call("samples", "", take)

    async def migration_end(self, name: str) -> MigrationEnd | None:
        def look() -> MigrationEnd | None:
            domain = self._state.domains.get(name)
            if domain is None or domain.vm_id is None:
                return None
            return MigrationEnd(
                generation=domain.generation, state=domain.end_state(), returned=domain.returned
            )

        return await self._call("migration_end", name, look)

    async def check_source(self, name: str, generation: int) -> SourceCheck:
        def check() -> SourceCheck:
            domain = self._state.domains[name]
            blockers = []
            if not domain.is_active():
                blockers.append(FieldError("", "not_running", "its domain does not run"))
            elif domain.travel is not None:
                blockers.append(FieldError("", "job_active", "libvirt is at work on its domain"))
            return SourceCheck(blockers=tuple(blockers), machine=self._state.facts.machine_types[0])

        return await self._act_on("check_source", name, generation, check)

    async def check_destination(
        self, name: str, question: DestinationQuestion
    ) -> tuple[FieldError, ...]:
        def check() -> tuple[FieldError, ...]:
            state, blockers = self._state, []
            if question.machine and question.machine not in state.facts.machine_types:
                blockers.append(FieldError("", "machine_type", f"no {question.machine!r} here"))
            here = state.domains.get(name)
            if here is not None and (here.is_active() or here.vm_id is None):
                blockers.append(FieldError("", "name_taken", f"a domain {name!r} is here already"))
            for other in state.domains.values():
                if other.uuid == question.domain_uuid and other.name != name:
                    blockers.append(FieldError("", "uuid_taken", f"{other.name!r} has its UUID"))
            blockers += check_volumes(state.pools, question)
            return tuple(blockers)

        return await self._call("check_destination", name, check)

    async def layout(self, definition: DomainDefinition) -> DestinationLayout:
        def lay_out() -> DestinationLayout:
            self._check_parts(definition.spec)
            spec = definition.spec
            return DestinationLayout(
                kernel_path=spec.boot.kernel,
                initrd_path=spec.boot.initrd,
                disk_paths=tuple(volume for _, volume in definition.volumes()),
                bridges=tuple(nic.network for nic in spec.nics),
                console_log_path=definition.name,
            )

        return await self._call("layout", definition.name, lay_out)

    async def migrate(self, name: str, generation: int, outgoing: Outgoing) -> None:
        def begin() -> Travel:
            state, domain = self._state, self._state.domains[name]
            if not domain.is_active() or domain.travel is not None:
                raise HypervisorError(f"domain {name!r} cannot be moved now")
            state.figures.pop(name, None)
            relay = state.fabric.relay(outgoing.uri, state.address)
            return Travel(state.fabric, state, domain, relay, outgoing)

        travel = await self._act_on("migrate", name, generation, begin)
        # What libvirt has begun goes on without the one who asked.
        await asyncio.shield(travel.done)

    async def abort_migration(self, name: str, generation: int) -> None:
        def abort(domain: SimulatedDomain) -> None:
            if domain.travel is not None:
                domain.travel.abort("the migration was cancelled")

        await self._act("abort_migration", name, generation, abort)

    async def transfer(self, name: str) -> Transfer | None:
        def read() -> Transfer | None:
            domain = self._state.domains.get(name)
            if domain is None or domain.travel is None or domain.incoming or domain.arrived:
                return None
            return domain.travel.transfer()

        return await self._call("transfer", name, read)

    async def set_max_downtime(self, name: str, generation: int, max_downtime_ms: int) -> None:
        await self._act("set_max_downtime", name, generation, lambda domain: None)

    async def figures(self, name: str) -> MigrationFigures | None:
        return await self._call("figures", name, lambda: self._state.figures.get(name))

    async def hold(self, name: str, generation: int) -> bool:
        def look() -> bool:
            domain = self._state.domains.get(name)
            if domain is None or not domain.returned:
                return False
            _check_generation(domain, generation)
            domain.hold()
            return True

        return await self._call("hold", name, look)

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
        await self._act_on(call, name, generation, lambda: act(self._state.domains[name]))

    async def _act_on(self, call: str, name: str, generation: int, act: Callable[[], T]) -> T:
        def checked() -> T:
            domain = self._state.domains.get(name)
            if domain is None:
                raise DomainNotFound(f"this node has no domain {name!r}")
            _check_generation(domain, generation)
            return act()

        return await self._call(call, name, checked)

    def _check_libvirtd(self) -> None:
        if not self._state.libvirtd_runs:
            raise HypervisorUnavailable("libvirtd is out of reach")

    def _facts(self) -> HypervisorFacts:
        facts = self._state.facts
        pools = tuple(
            msgspec.structs.replace(
                pool,
                free_gib=pool.capacity_gib - sum(self._state.pools[pool.name].values()),
                shared=pool.shared,
            )
            for pool in facts.pools
        )
        return msgspec.structs.replace(facts, pools=pools)

    def _domains(self) -> tuple[DomainInfo, ...]:
        return tuple(domain.info() for _, domain in sorted(self._state.domains.items()))

    def _define(self, definition: DomainDefinition) -> None:
        state, spec = self._state, definition.spec
        self._check_parts(spec)
        existing = state.domains.get(definition.name)
        if existing is not None:
            _check_redefinable(existing)
        state.domains[definition.name] = state.make(definition)
        state.changed(definition.name)

    def _check_parts(self, spec: VmSpec) -> None:
        """Raise ArtefactMissing or HypervisorError for what this node does not have."""
        state = self._state
        for artefact in (spec.boot.kernel, spec.boot.initrd):
            if artefact is not None and artefact not in state.facts.artefacts:
                raise ArtefactMissing(f"this node has no artefact {artefact!r}")
        for disk in spec.disks:
            self._pool(disk.pool)
        for nic in spec.nics:
            if nic.network not in state.facts.networks:
                raise HypervisorError(f"this node has no bridge for network {nic.network!r}")

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


def check_volumes(
    pools: dict[str, dict[str, int]], question: DestinationQuestion
) -> list[FieldError]:
    """Return why a VM's disks keep it from coming to a node."""
    blockers = []
    for disk in question.spec.disks:
        volume = volume_name(question.vm_id, disk.name)
        if disk.pool not in pools:
            blockers.append(FieldError("", "missing_pool", f"no storage pool {disk.pool!r} here"))
        elif disk.name not in question.copied and volume not in pools[disk.pool]:
            blockers.append(FieldError("", "disk_not_shared", f"no volume {volume!r} here"))
        elif disk.name in question.copied and volume in pools[disk.pool]:
            blockers.append(FieldError("", "volume_exists", f"a volume {volume!r} is here already"))
    return blockers
