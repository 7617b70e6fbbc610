"""What this node is and has, as the control plane is told of it."""

from __future__ import annotations

import platform

from msgspec import Struct

from agent.hypervisor import Hypervisor
from shared.model import Inventory, MigrationFacts, VersionFacts


class NodeFacts(Struct, frozen=True, kw_only=True):
    """Who this node is, and in which boot; peers reach its relays at ``relay_address``."""

    name: str
    address: str
    relay_address: str
    labels: dict[str, str]
    boot_id: str
    incarnation: str
    agent_version: str


async def inventory_of(hypervisor: Hypervisor, node: NodeFacts) -> Inventory:
    """Return the node's inventory. Raises HypervisorUnavailable."""
    facts = await hypervisor.facts()
    return Inventory(
        cpus=facts.cpus,
        memory_mib=facts.memory_mib,
        cpu=facts.cpu,
        numa=facts.numa,
        pools=facts.pools,
        networks=facts.networks,
        artefacts=facts.artefacts,
        machine_types=facts.machine_types,
        virtualization=facts.virtualization,
        versions=VersionFacts(
            agent=node.agent_version,
            libvirt=facts.libvirt_version,
            qemu=facts.qemu_version,
            kernel=platform.release(),
        ),
        migration=MigrationFacts(
            address=node.address, relay=node.relay_address, tls=facts.migration_tls
        ),
    )
