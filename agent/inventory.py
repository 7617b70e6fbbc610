"""What this node has, as the control plane is told of it."""

from __future__ import annotations

import platform

from agent.hypervisor import Hypervisor
from shared.model import Inventory, VersionFacts


async def inventory_of(hypervisor: Hypervisor, agent_version: str) -> Inventory:
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
            agent=agent_version,
            libvirt=facts.libvirt_version,
            qemu=facts.qemu_version,
            kernel=platform.release(),
        ),
    )
