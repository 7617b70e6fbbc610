"""The hypervisor as the agent sees it: a port with two drivers, libvirt and simulated.

Every call that touches a running or defined domain names the generation it means; a driver reads
the domain's metadata immediately before it acts and raises GenerationMismatch when they differ.
Calls never block the event loop. Both drivers pass ``tests/contract/test_hypervisor.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from shared.errors import FieldError
from shared.model import (
    CpuFacts,
    NumaCell,
    ObservedPower,
    PoolFacts,
    Sample,
    VmSpec,
)
from shared.moves import EndState, MigrationFigures
from shared.protocol import DestinationLayout, DestinationQuestion, SourceCheck


class DomainInfo(Struct, frozen=True, kw_only=True):
    """One domain. ``vm_id`` is None for a domain that carries no metadata of ours (foreign).

    ``power`` is RUNNING, PAUSED, STOPPED (stopped from outside, or defined and never started),
    SHUT_OFF (the guest powered itself off), CRASHED, or UNKNOWN.
    """

    name: str
    uuid: str
    vm_id: str | None
    generation: int
    power: ObservedPower


class DomainDefinition(Struct, frozen=True, kw_only=True):
    """All that a driver needs to define a domain; paths are the driver's own business."""

    vm_id: str
    name: str
    uuid: str
    title: str
    tenant: str
    generation: int
    spec: VmSpec

    def volumes(self) -> tuple[tuple[str, str], ...]:
        """Return the pool and the name of each of its disks' volumes."""
        return tuple((d.pool, volume_name(self.vm_id, d.name)) for d in self.spec.disks)


class HypervisorFacts(Struct, frozen=True, kw_only=True):
    cpus: int
    memory_mib: int
    cpu: CpuFacts
    numa: tuple[NumaCell, ...]
    pools: tuple[PoolFacts, ...]
    networks: tuple[str, ...]
    artefacts: tuple[str, ...]
    machine_types: tuple[str, ...]
    virtualization: str
    libvirt_version: str
    qemu_version: str
    migration_tls: bool = False


class MigrationEnd(Struct, frozen=True, kw_only=True):
    """One end of a migration, as libvirt has it now.

    ``returned``: it runs again after libvirt had paused it to switch over, and nobody but libvirt
    has decided that.
    """

    generation: int
    state: EndState
    returned: bool = False


class Outgoing(Struct, frozen=True, kw_only=True):
    """A migration to begin: where to (``uri`` is the peer's libvirt, through a relay), and how.

    ``copied`` are the names of the spec's disks whose content moves along. ``paused``: the guest
    stays paused on its new node until it is resumed there.
    """

    definition: DomainDefinition
    uri: str
    address: str
    node_name: str
    layout: DestinationLayout
    copied: tuple[str, ...]
    tls: bool
    paused: bool


class Transfer(Struct, frozen=True, kw_only=True):
    """How far a running migration has come; ``iteration`` counts its passes over memory."""

    bytes_done: int
    bytes_total: int
    bytes_remaining: int
    iteration: int
    bytes_per_s: float


DomainListener = Callable[[str], None]


class Hypervisor(Protocol):
    """Names are domain names (``DomainInfo.name``). All raise HypervisorUnavailable."""

    async def facts(self) -> HypervisorFacts: ...

    async def domains(self) -> tuple[DomainInfo, ...]:
        """Return every domain of the node, ours and foreign ones, sorted by name."""
        ...

    async def domain(self, name: str) -> DomainInfo | None: ...

    async def define(self, definition: DomainDefinition) -> None:
        """Define the domain, or redefine it while it is not running, with a new generation.

        Raises ArtefactMissing, HypervisorError (with libvirt's words) when it is refused.
        """
        ...

    async def start(self, name: str, generation: int) -> None:
        """Start a defined domain. Raises DomainNotFound, GenerationMismatch, HypervisorError."""
        ...

    async def shutdown(self, name: str, generation: int) -> None:
        """Ask the guest to power off; returns before it does."""
        ...

    async def stop(self, name: str, generation: int) -> None:
        """End the domain at once; does nothing when it is not running."""
        ...

    async def pause(self, name: str, generation: int) -> None: ...

    async def resume(self, name: str, generation: int) -> None: ...

    async def reboot(self, name: str, generation: int) -> None:
        """Ask the guest to reboot itself."""
        ...

    async def reset(self, name: str, generation: int) -> None:
        """Reset the virtual machine as its button would."""
        ...

    async def undefine(self, name: str, generation: int, *, keep_log: bool = False) -> None:
        """Forget a domain that is not running, with its NVRAM, saved state and console log.

        Does nothing when there is none. Raises HypervisorError while it runs.
        """
        ...

    async def migration_end(self, name: str) -> MigrationEnd | None:
        """Return what a domain of ours is as an end of a migration; None when there is none."""
        ...

    async def check_source(self, name: str, generation: int) -> SourceCheck:
        """Return what stands against moving a running domain live; changes nothing."""
        ...

    async def check_destination(
        self, name: str, question: DestinationQuestion
    ) -> tuple[FieldError, ...]:
        """Return what stands against a domain coming here, running or not; changes nothing."""
        ...

    async def layout(self, definition: DomainDefinition) -> DestinationLayout:
        """Return where this node keeps what a domain needs. Raises as ``define``."""
        ...

    async def migrate(self, name: str, generation: int, outgoing: Outgoing) -> None:
        """Move a running domain to another node; returns when libvirt says that it is over.

        The move goes on when the caller is cancelled, or its process ends. Whatever this returns
        or raises, both ends are to be looked at. Raises HypervisorError.
        """
        ...

    async def abort_migration(self, name: str, generation: int) -> None:
        """End a domain's outgoing migration; does nothing when there is none."""
        ...

    async def transfer(self, name: str) -> Transfer | None:
        """Return how far a domain's outgoing migration has come; None when there is none."""
        ...

    async def set_max_downtime(self, name: str, generation: int, max_downtime_ms: int) -> None: ...

    async def figures(self, name: str) -> MigrationFigures | None:
        """Return what the last migration took that left this node; None when it is not known."""
        ...

    async def hold(self, name: str, generation: int) -> bool:
        """Pause a domain that has ``returned``, in one look; True when it was so."""
        ...

    async def ensure_volume(
        self, pool: str, volume: str, size_gib: int, *, make: bool = True
    ) -> None:
        """Create a qcow2 volume unless it exists with that size.

        Raises HypervisorError for a pool that does not exist or a volume of another size, and
        DiskMissing for one that is not there and that is not to be made.
        """
        ...

    async def delete_volume(self, pool: str, volume: str) -> None:
        """Delete a volume; does nothing when there is none."""
        ...

    async def volumes(self, pool: str) -> tuple[str, ...]:
        """Return the names of a pool's volumes, sorted."""
        ...

    async def console_log(self, name: str, offset: int, limit_bytes: int) -> bytes:
        """Return part of a domain's serial console log; a negative offset counts from the end."""
        ...

    async def console_size(self, name: str) -> int:
        """Return how many bytes a domain's serial console log has; 0 for none."""
        ...

    async def delete_console_log(self, name: str) -> None:
        """Delete the console log that a domain has left here; does nothing when there is none."""
        ...

    async def samples(self) -> tuple[Sample, ...]:
        """Return one sample per running domain of ours (``object`` is the VM's id).

        Never waits for a hung domain; such a one is left out.
        """
        ...

    def listen(self, listener: DomainListener) -> None:
        """Call ``listener(domain name)`` on the event loop after a domain's state has changed.

        An empty name means that events may have been lost: look at all of them.
        """
        ...


def volume_name(vm_id: str, disk: str) -> str:
    """Return the one name of a VM's disk in its pool, the same in every driver."""
    return f"{vm_id}-{disk}.qcow2"
