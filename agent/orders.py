"""What an order of a migration names on this node: its domain, its relay, its end, its disks."""

from __future__ import annotations

from msgspec.structs import replace

from agent.hypervisor import DomainDefinition, Hypervisor, MigrationEnd, volume_name
from shared.model import Power
from shared.moves import EndState
from shared.protocol import Desired, MigrationOrder, MigrationRole

# The same state of a domain means another thing on the node that it comes to.
AS_DESTINATION: dict[EndState, EndState] = {
    EndState.MOVING: EndState.INCOMING,
    EndState.AWAY: EndState.INCOMING,
}


def definition_of(desired: Desired, generation: int) -> DomainDefinition:
    return DomainDefinition(
        vm_id=desired.vm_id,
        name=desired.domain_name,
        uuid=desired.domain_uuid,
        title=desired.name,
        tenant=desired.tenant,
        generation=generation,
        spec=desired.spec,
    )


def relay_name(vm_id: str, generation: int) -> str:
    return f"{vm_id}.{generation}"


async def end_of(hypervisor: Hypervisor, desired: Desired, order: MigrationOrder) -> MigrationEnd:
    """Return this end, as far as the domain is the order's; another generation is no end."""
    ours = order.source_generation if order.role is MigrationRole.SOURCE else order.generation
    end = await hypervisor.migration_end(desired.domain_name)
    if end is None or end.generation != ours:
        return MigrationEnd(generation=ours, state=EndState.ABSENT)
    if order.role is MigrationRole.SOURCE:
        came_to_an_end = end.state is EndState.NEVER_RAN  # after an earlier arrival
        return replace(end, state=EndState.DOWN) if came_to_an_end else end
    if end.state is EndState.HELD:
        # libvirt has the same word for one that has run already, and was paused since.
        waits = arrives_paused(desired)
        return replace(end, state=EndState.READY if waits else EndState.RUNNING)
    return replace(end, state=AS_DESTINATION.get(end.state, end.state))


def arrives_paused(desired: Desired) -> bool:
    """Return whether a guest is to stay paused on its new node until it is resumed there."""
    return desired.spec.migration.strict or desired.spec.power is Power.PAUSED


def copied_volumes(desired: Desired, order: MigrationOrder) -> list[tuple[str, str, int]]:
    """Return pool, name and size in GiB of each volume whose content moves along."""
    return [
        (disk.pool, volume_name(desired.vm_id, disk.name), disk.size_gib)
        for disk in desired.spec.disks
        if disk.name in order.copied
    ]


async def delete_copies(hypervisor: Hypervisor, desired: Desired, order: MigrationOrder) -> None:
    for pool, volume, _ in copied_volumes(desired, order):
        await hypervisor.delete_volume(pool, volume)
