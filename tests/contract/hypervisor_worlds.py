"""The two worlds that the hypervisor's contract is tested in, with the same levers on both.

A world is a node seen from outside: the tests reach around the driver only through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from typing import Protocol

from agent.hypervisor import Hypervisor
from agent.libvirt_driver import LibvirtDriver
from agent.libvirt_settings import LibvirtSettings
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState, simulated_facts
from shared.clock import SystemClock
from tests.contract.libvirt_process import BRIDGE, LibvirtProcess
from tests.lab.guest_image import ensure_guest_artefacts

FOREIGN_UUID = "0f0f0f0f-1111-4222-8333-444444444444"
_CONNECT_LIMIT_S = 30

_FOREIGN_XML = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
</domain>
"""


class World(Protocol):
    """What tests may do to a node behind its driver's back."""

    driver: Hypervisor

    def crash_guest(self, name: str) -> None:
        """End a running guest as a failure of its QEMU would."""
        ...

    def add_foreign(self, name: str) -> None: ...

    def remove_foreign(self, name: str) -> None: ...

    def libvirtd_dies(self) -> None: ...

    def libvirtd_returns(self) -> None: ...

    def new_driver(self) -> contextlib.AbstractAsyncContextManager[Hypervisor]:
        """Run a second driver on the same node, as a new agent would after a crash."""
        ...


class SimulatedWorld:
    def __init__(self) -> None:
        self.state = SimulatedNodeState(
            simulated_facts(pools=("default", "shared"), shared_pools=("shared",))
        )
        self.driver: Hypervisor = SimulatedDriver(self.state, SystemClock())

    def crash_guest(self, name: str) -> None:
        self.state.guest_crashes(name)

    def add_foreign(self, name: str) -> None:
        self.state.add_foreign(name, FOREIGN_UUID)

    def remove_foreign(self, name: str) -> None:
        del self.state.domains[name]

    def libvirtd_dies(self) -> None:
        self.state.libvirtd_dies()

    def libvirtd_returns(self) -> None:
        self.state.libvirtd_returns()

    @contextlib.asynccontextmanager
    async def new_driver(self) -> AsyncIterator[Hypervisor]:
        yield SimulatedDriver(self.state, SystemClock())


class LibvirtWorld:
    def __init__(self, process: LibvirtProcess, driver: LibvirtDriver) -> None:
        self.process = process
        self.driver: Hypervisor = driver

    def crash_guest(self, name: str) -> None:
        self.process.signal_qemu(name, signal.SIGKILL)

    def add_foreign(self, name: str) -> None:
        path = self.process.root / f"{name}.xml"
        path.write_text(_FOREIGN_XML.format(name=name, uuid=FOREIGN_UUID))
        self.process.virsh("define", str(path))
        self.process.virsh("start", name)

    def remove_foreign(self, name: str) -> None:
        self.process.virsh("destroy", name)
        self.process.virsh("undefine", name)

    def libvirtd_dies(self) -> None:
        self.process.kill()

    def libvirtd_returns(self) -> None:
        self.process.start()

    def new_driver(self) -> contextlib.AbstractAsyncContextManager[Hypervisor]:
        return libvirt_driver(libvirt_settings(self.process))


def libvirt_settings(
    process: LibvirtProcess, *, probe_kvm: bool = False, known: str | None = None
) -> LibvirtSettings:
    return LibvirtSettings(
        uri=process.uri,
        artefact_dir=ensure_guest_artefacts(),
        pools=("default", "shared"),
        shared_pools=("shared",),
        pool_dirs={"default": process.pool_dir},
        console_dir=process.console_dir,
        networks={"lan": BRIDGE, "gone": "br-none"},
        network_dir=process.network_dir,
        probe_kvm=probe_kvm,
        known_virtualization=known,
    )


@contextlib.asynccontextmanager
async def libvirt_driver(settings: LibvirtSettings) -> AsyncIterator[LibvirtDriver]:
    """Run a driver, connected, for the length of the block."""
    driver = LibvirtDriver(settings, SystemClock(), random.Random(1))
    running = asyncio.create_task(driver.run())
    try:
        async with asyncio.timeout(_CONNECT_LIMIT_S):
            await driver.wait_connected()
        yield driver
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
