"""The hypervisor port over libvirt.

Owns the order of things: which connection a call uses, which calls on a pool are kept apart, what
is remembered of domains. It never opens a VM's file, never sets autostart, and never acts on a
domain whose metadata does not carry exactly the generation it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt
from msgspec.structs import replace

from agent import libvirt_domains
from agent import libvirt_migration as migration
from agent import libvirt_storage as storage
from agent.domain_xml import DomainLayout, build_domain_xml
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
from agent.libvirt_connection import LibvirtLink
from agent.libvirt_facts import existing_networks, read_facts
from agent.libvirt_incoming import IncomingDomains
from agent.libvirt_probe import EMULATION, PROBE_NAME, probe_virtualization
from agent.libvirt_samples import read_samples
from agent.libvirt_settings import LibvirtSettings
from shared.clock import Clock
from shared.errors import ArtefactMissing, FieldError, HypervisorError, HypervisorUnavailable
from shared.model import ObservedPower, Sample
from shared.moves import MigrationFigures
from shared.protocol import DestinationLayout, DestinationQuestion, SourceCheck

T = TypeVar("T")

# 200 domains take one second; a call that takes longer is held by a QEMU that hangs.
SAMPLES_TIMEOUT_S = 2.0
# The first call may be held by a newly hung QEMU; from then on libvirt leaves that one out.
SAMPLES_ATTEMPTS = 2
# Figures are asked for right after a migration, and a node moves two guests out at a time.
FIGURES_KEPT_MAX = 64
# libvirt tells them on another connection than the one that answers the call: milliseconds before
# or after it. Of a migration that failed it tells none, and its end is waited for.
FIGURES_WAIT_S = 0.25


class LibvirtDriver:
    """Implements ``agent.hypervisor.Hypervisor``; ``run`` must run for any call to succeed."""

    def __init__(self, settings: LibvirtSettings, clock: Clock, rng: random.Random) -> None:
        self._settings = settings
        self._clock = clock
        self._listeners: list[DomainListener] = []
        self._virtualization = settings.known_virtualization
        self._probing = asyncio.Lock()
        self._pool_locks = {name: asyncio.Lock() for name in settings.pool_targets()}
        self._other_pools_lock = asyncio.Lock()
        self._last_seen: dict[str, DomainInfo] = {}
        self._figures: dict[str, MigrationFigures] = {}
        self._figures_came = asyncio.Event()
        self._incoming = IncomingDomains()
        self._link = LibvirtLink(
            settings.uri,
            rng,
            functools.partial(storage.ensure_pools, targets=settings.pool_targets()),
            self._events_lost,
            self._domain_changed,
            self._job_completed,
        )

    async def run(self) -> None:
        """Keep the connection to libvirtd until cancelled or closed; guests are left alone."""
        await self._link.run()

    async def close(self) -> None:
        """End the connection, and ``run``; does nothing the second time."""
        await self._link.close()

    async def wait_connected(self) -> None:
        """Return once libvirtd can be asked."""
        await self._link.wait_connected()

    async def facts(self) -> HypervisorFacts:
        """Return what the node has; the first call may take 10 s, to probe KVM."""
        virtualization = await self._find_virtualization()
        read = functools.partial(read_facts, settings=self._settings, virtualization=virtualization)
        return await self._link.read(read)

    async def domains(self) -> tuple[DomainInfo, ...]:
        found = await self._link.read(libvirt_domains.list_domains)
        known = [self._recall(info) for info in found if info and info.name != PROBE_NAME]
        self._last_seen = {info.name: info for info in known}
        return tuple(self._settled(info) for info in known)

    async def domain(self, name: str) -> DomainInfo | None:
        def read(connection: libvirt.virConnect) -> DomainInfo | None:
            domain = libvirt_domains.find_domain(connection, name)
            return None if domain is None else libvirt_domains.describe(domain)

        info = await self._link.read(read)
        if info is None:
            self._last_seen.pop(name, None)
            return None
        self._last_seen[name] = self._recall(info)
        return self._settled(self._last_seen[name])

    async def define(self, definition: DomainDefinition) -> None:
        virtualization = await self._find_virtualization()

        def define(connection: libvirt.virConnect) -> None:
            layout = self._layout(connection, definition, virtualization)
            libvirt_domains.define(
                connection, definition.name, build_domain_xml(definition, layout)
            )

        await self._link.act(define)
        self._last_seen.pop(definition.name, None)

    async def start(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.start)

    async def shutdown(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.shutdown)

    async def stop(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.stop)

    async def pause(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.pause)

    async def resume(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.resume)

    async def reboot(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.reboot)

    async def reset(self, name: str, generation: int) -> None:
        await self._act(name, generation, libvirt_domains.reset)

    async def undefine(self, name: str, generation: int, *, keep_log: bool = False) -> None:
        await self._link.act(
            functools.partial(libvirt_domains.undefine, name=name, generation=generation)
        )
        if keep_log:
            return
        # Also when there was no domain: an earlier call may have ended between the two.
        await self.delete_console_log(name)

    async def ensure_volume(
        self, pool: str, volume: str, size_gib: int, *, make: bool = True
    ) -> None:
        await self._store(
            pool,
            lambda connection: storage.ensure_volume(connection, pool, volume, size_gib, make=make),
        )

    async def delete_volume(self, pool: str, volume: str) -> None:
        await self._store(pool, lambda connection: storage.delete_volume(connection, pool, volume))

    async def volumes(self, pool: str) -> tuple[str, ...]:
        return await self._store(pool, functools.partial(storage.list_volumes, pool=pool))

    async def console_log(self, name: str, offset: int, limit_bytes: int) -> bytes:
        pool = self._settings.console_pool
        return await self._store(
            pool,
            lambda connection: storage.read_console_log(
                connection, pool, name, offset, limit_bytes
            ),
        )

    async def console_size(self, name: str) -> int:
        pool = self._settings.console_pool
        return await self._store(
            pool, lambda connection: storage.console_size(connection, pool, name)
        )

    async def delete_console_log(self, name: str) -> None:
        await self.delete_volume(self._settings.console_pool, storage.console_log_name(name))

    async def samples(self) -> tuple[Sample, ...]:
        at = self._clock.now().timestamp()
        read = functools.partial(read_samples, at=at)
        for _ in range(SAMPLES_ATTEMPTS - 1):
            try:
                return await self._link.statistics(read, SAMPLES_TIMEOUT_S)
            except HypervisorUnavailable:
                continue
        return await self._link.statistics(read, SAMPLES_TIMEOUT_S)

    async def migration_end(self, name: str) -> MigrationEnd | None:
        end = await self._link.read_job(functools.partial(migration.migration_end, name=name))
        if end is None:
            self._incoming.gone(name)
            return None
        return replace(end, state=self._incoming.judged(name, end.state))

    async def check_source(self, name: str, generation: int) -> SourceCheck:
        return await self._link.read_job(
            functools.partial(migration.check_source, name=name, generation=generation)
        )

    async def check_destination(
        self, name: str, question: DestinationQuestion
    ) -> tuple[FieldError, ...]:
        facts = await self.facts()

        def check(connection: libvirt.virConnect) -> tuple[FieldError, ...]:
            found = migration.check_destination(connection, name, question, facts)
            pools = storage.check_arrival(connection, question)
            return (*found, *pools)

        return await self._link.read(check)

    async def layout(self, definition: DomainDefinition) -> DestinationLayout:
        def read(connection: libvirt.virConnect) -> DestinationLayout:
            layout = self._layout(connection, definition, EMULATION)
            return DestinationLayout(
                kernel_path=layout.kernel_path,
                initrd_path=layout.initrd_path,
                disk_paths=layout.disk_paths,
                bridges=layout.bridges,
                console_log_path=layout.console_log_path,
            )

        return await self._link.read(read)

    async def migrate(self, name: str, generation: int, outgoing: Outgoing) -> None:
        self._figures.pop(name, None)
        await self._link.run_long(
            functools.partial(
                migration.migrate, name=name, generation=generation, outgoing=outgoing
            )
        )

    async def abort_migration(self, name: str, generation: int) -> None:
        await self._link.act(functools.partial(migration.abort, name=name, generation=generation))

    async def transfer(self, name: str) -> Transfer | None:
        return await self._link.read_job(functools.partial(migration.transfer, name=name))

    async def set_max_downtime(self, name: str, generation: int, max_downtime_ms: int) -> None:
        await self._link.act(
            functools.partial(
                migration.set_max_downtime,
                name=name,
                generation=generation,
                max_downtime_ms=max_downtime_ms,
            )
        )

    async def figures(self, name: str) -> MigrationFigures | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIGURES_WAIT_S):
                while name not in self._figures:
                    self._figures_came.clear()
                    await self._figures_came.wait()
        return self._figures.get(name)

    async def hold(self, name: str, generation: int) -> bool:
        return await self._link.act(
            functools.partial(migration.hold, name=name, generation=generation)
        )

    def listen(self, listener: DomainListener) -> None:
        self._listeners.append(listener)

    def _events_lost(self) -> None:
        self._incoming.forget()
        self._notify("")

    def _domain_changed(self, name: str, event: int, detail: int) -> None:
        if name != PROBE_NAME:
            self._incoming.told(name, event, detail)
            self._notify(name)

    def _notify(self, name: str) -> None:
        for listener in self._listeners:
            listener(name)

    def _job_completed(self, name: str, figures: dict[str, Any]) -> None:
        if not migration.has_left(figures):
            return
        self._figures.pop(name, None)
        self._figures[name] = migration.figures_of(figures)
        while len(self._figures) > FIGURES_KEPT_MAX:
            self._figures.pop(next(iter(self._figures)))
        self._figures_came.set()

    async def _act(self, name: str, generation: int, act: libvirt_domains.DomainAct) -> None:
        await self._link.act(
            functools.partial(libvirt_domains.act_on, name=name, generation=generation, act=act)
        )

    async def _store(self, pool: str, work: Callable[[libvirt.virConnect], T]) -> T:
        """Run one call on a pool at a time: libvirt refuses to refresh a pool that is at work."""
        async with self._pool_locks.get(pool, self._other_pools_lock):
            return await self._link.read(work)

    async def _find_virtualization(self) -> str:
        """Return how guests run here; concurrent callers wait for one probe."""
        if not self._settings.probe_kvm and self._virtualization is None:
            self._virtualization = EMULATION
        async with self._probing:
            if self._virtualization is None:
                self._virtualization = await self._link.act(
                    functools.partial(probe_virtualization, settings=self._settings)
                )
        return self._virtualization

    def _recall(self, info: DomainInfo) -> DomainInfo:
        """Return ``info`` with what was known before libvirtd forgot why a domain ended.

        A restart of libvirtd loses the reason (of domains that ended before it, not of those that
        ended while it was away).
        """
        before = self._last_seen.get(info.name)
        if info.power is not ObservedPower.UNKNOWN or before is None:
            return info
        if (before.uuid, before.generation) != (info.uuid, info.generation):
            return info
        if before.power in (ObservedPower.RUNNING, ObservedPower.PAUSED):
            return info
        return before

    def _settled(self, info: DomainInfo) -> DomainInfo:
        """Return ``info`` without doubt: not running, for no known reason, is STOPPED."""
        if info.power is not ObservedPower.UNKNOWN:
            return info
        return DomainInfo(
            name=info.name,
            uuid=info.uuid,
            vm_id=info.vm_id,
            generation=info.generation,
            power=ObservedPower.STOPPED,
        )

    def _layout(
        self, connection: libvirt.virConnect, definition: DomainDefinition, virtualization: str
    ) -> DomainLayout:
        spec, settings = definition.spec, self._settings
        console_dir = storage.pool_target(connection, settings.console_pool)
        disks = tuple(
            str(
                storage.pool_target(connection, disk.pool)
                / volume_name(definition.vm_id, disk.name)
            )
            for disk in spec.disks
        )
        return DomainLayout(
            domain_type=virtualization,
            machine=settings.machine,
            cpu_model=settings.cpu_model,
            kernel_path=self._artefact(spec.boot.kernel),
            initrd_path=self._artefact(spec.boot.initrd) if spec.boot.initrd else None,
            disk_paths=disks,
            bridges=tuple(self._bridge(nic.network) for nic in spec.nics),
            console_log_path=str(console_dir / storage.console_log_name(definition.name)),
        )

    def _artefact(self, name: str) -> str:
        path = self._settings.artefact(name)
        if not path.is_file():
            raise ArtefactMissing(f"this node has no artefact {name!r}")
        return str(path)

    def _bridge(self, network: str) -> str:
        if network not in existing_networks(self._settings):
            raise HypervisorError(f"this node has no bridge for network {network!r}")
        return self._settings.networks[network]
