"""All domains of ours on this node, for a leader that has only a restored backup to go by.

Reads, and nothing else. What it says of a domain is what the domain is, not what it should be: the
leader compares the nodes, and decides (docs/decisions/0016-backup-and-restore.md).
"""

from __future__ import annotations

from agent.fence import VmFacts
from agent.hypervisor import DomainInfo, Hypervisor, MigrationEnd
from agent.migration import Migrations
from agent.orders import AS_DESTINATION
from shared.moves import EndState
from shared.protocol import Sighting


async def sighting_of(
    hypervisor: Hypervisor, migrations: Migrations, facts: VmFacts, domain: DomainInfo
) -> Sighting | None:
    """Return what a domain of ours is; None when it has gone meanwhile."""
    end = await hypervisor.migration_end(domain.name)
    if end is None:
        return None
    return Sighting(
        vm_id=facts.vm_id,
        generation=end.generation,
        end=_end(end, facts, moving=migrations.is_under_way(facts.vm_id)),
        power=domain.power,
        departing=_is_source(end, facts),
    )


def _end(end: MigrationEnd, facts: VmFacts, *, moving: bool) -> EndState:
    """Return its state by what this node is for it: the same one means another thing where it comes
    to. A transfer that has not reached libvirt yet is under way, too.
    """
    if _is_source(end, facts) or facts.arrival != end.generation:
        return EndState.MOVING if moving else end.state
    return AS_DESTINATION.get(end.state, end.state)


def _is_source(end: MigrationEnd, facts: VmFacts) -> bool:
    departure = facts.departure
    return departure is not None and departure.source_generation == end.generation
