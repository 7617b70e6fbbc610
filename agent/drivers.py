"""Which hypervisor driver an agent runs with, made from its configuration."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from agent.config import AgentConfig
from agent.hypervisor import Hypervisor
from agent.libvirt_driver import LibvirtDriver
from agent.libvirt_settings import LibvirtSettings
from shared.clock import Clock
from shared.errors import HypervisorError

# libvirtd may be away when the agent starts.
RETRY_S = 5.0


class Driver(Hypervisor, Protocol):
    async def run(self) -> None:
        """Keep what the driver needs alive, until cancelled or closed."""
        ...

    async def wait_connected(self) -> None:
        """Return once the hypervisor can be asked."""
        ...

    async def close(self) -> None: ...


class ProbeResult(Struct, frozen=True):
    """What a probe of KVM found; it holds for the boot it was made in."""

    boot_id: str
    virtualization: str


def open_driver(config: AgentConfig, boot_id: str, clock: Clock, rng: random.Random) -> Driver:
    hypervisor = config.hypervisor
    settings = LibvirtSettings(
        uri=hypervisor.uri,
        artefact_dir=hypervisor.artefact_dir,
        pools=hypervisor.pools,
        shared_pools=hypervisor.shared_pools,
        console_pool=hypervisor.console_pool,
        qemu_tls_dir=hypervisor.qemu_tls_dir,
        networks=config.networks,
        cpus=config.capacity.cpus,
        memory_mib=config.capacity.memory_mib,
        probe_kvm=hypervisor.probe_kvm,
        known_virtualization=_known(_probe_file(config), boot_id),
    )
    return LibvirtDriver(settings, clock, rng)


async def remember_probe(driver: Hypervisor, config: AgentConfig, boot_id: str) -> None:
    """Write down what the driver finds, so that the next start in this boot need not probe."""
    while True:
        try:
            facts = await driver.facts()
            break
        except HypervisorError:
            await asyncio.sleep(RETRY_S)
    result = ProbeResult(boot_id=boot_id, virtualization=facts.virtualization)
    _probe_file(config).write_bytes(msgspec.json.encode(result))


def _probe_file(config: AgentConfig) -> Path:
    return config.state_dir / "virtualization.json"


def _known(path: Path, boot_id: str) -> str | None:
    """A file that is missing, torn or of another boot only costs a probe."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=ProbeResult)
    except (OSError, msgspec.DecodeError):
        return None
    return result.virtualization if result.boot_id == boot_id else None
