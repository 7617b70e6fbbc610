"""Two nodes that guests move between, in both worlds of the contract, with the same levers.

``hold_replies`` opens the window in which a guest runs on its new node while its old one does not
know that yet: whatever then breaks, breaks at the worst moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Protocol

from msgspec.structs import replace

from agent.hypervisor import DomainDefinition, Outgoing
from agent.simulated_driver import SimulatedNodeState, simulated_facts
from agent.simulated_fabric import SimulatedFabric, SimulatedRelay, TravelTimes
from shared.errors import HypervisorError
from shared.model import ObservedPower
from tests.contract.byte_relay import ByteRelay
from tests.contract.hypervisor_worlds import (
    FOREIGN_XML,
    LibvirtWorld,
    SimulatedWorld,
    World,
    libvirt_driver,
    libvirt_settings,
)
from tests.contract.libvirt_process import PAIR_ADDRESSES, LibvirtProcess

# Fast enough for a test, slow enough for what looks every 50 ms.
_TIMES = TravelTimes(transfer_s=0.5, confirm_s=0.2)
_FOR_EVER_S = 3600.0


class MigrationWorld(Protocol):
    """Guests move from ``one`` to ``two``."""

    one: World
    two: World

    def open_relay(self) -> str:
        """Return a URI by which the source reaches the destination's libvirt, once."""
        ...

    def break_relay(self) -> None: ...

    def linger(self, name: str) -> None:
        """Have the transfer of a running domain take longer than any test."""
        ...

    def hold_replies(self) -> None:
        """Keep from the source what the destination says, from the next switch on."""
        ...

    def add_foreign(self, name: str, uuid: str) -> None:
        """Have a domain that is not ours on the destination."""
        ...


class SimulatedMigrationWorld:
    def __init__(self) -> None:
        self.fabric = SimulatedFabric(_TIMES)
        self.one: World = self._node("one")
        self.two: World = self._node("two")
        self._numbers = itertools.count()
        self._relay: SimulatedRelay | None = None

    def _node(self, address: str) -> SimulatedWorld:
        facts = simulated_facts(pools=("default", "shared"), shared_pools=("shared",))
        return SimulatedWorld(SimulatedNodeState(facts, self.fabric, address))

    def open_relay(self) -> str:
        uri = f"relay-{next(self._numbers)}"
        self._relay = self.fabric.relays[uri] = SimulatedRelay("two", "one", "token")
        return uri

    def break_relay(self) -> None:
        assert self._relay is not None, "it was opened"
        self._relay.end()

    def linger(self, name: str) -> None:
        self.fabric.times = replace(_TIMES, transfer_s=_FOR_EVER_S)

    def hold_replies(self) -> None:
        self.fabric.times = replace(_TIMES, reply_s=_FOR_EVER_S)

    def add_foreign(self, name: str, uuid: str) -> None:
        self.fabric.nodes["two"].add_foreign(name, uuid)


class LibvirtMigrationWorld:
    def __init__(self, one: LibvirtWorld, two: LibvirtWorld) -> None:
        self.one: World = one
        self.two: World = two
        self._source = one
        self._destination = two.process
        self._relay: ByteRelay | None = None
        self._looks: dict[asyncio.Task[None], None] = {}

    def open_relay(self) -> str:
        path = self._source.process.root / "relay.sock"
        path.unlink(missing_ok=True)
        self._relay = ByteRelay(path, self._destination.socket)
        return f"qemu+unix:///system?socket={path}"

    def break_relay(self) -> None:
        if self._relay is not None:
            self._relay.end()

    def linger(self, name: str) -> None:
        # 192 MiB at 1 MiB/s.
        self._source.process.virsh("migrate-setspeed", name, "1")

    def hold_replies(self) -> None:
        def changed(name: str) -> None:
            look = asyncio.ensure_future(self._hold_if_paused(name))
            self._looks[look] = None
            look.add_done_callback(self._looks.pop)

        self._source.driver.listen(changed)

    async def _hold_if_paused(self, name: str) -> None:
        with contextlib.suppress(HypervisorError):
            info = await self._source.driver.domain(name)
            if info is not None and info.power is ObservedPower.PAUSED and self._relay is not None:
                self._relay.hold_replies()

    def add_foreign(self, name: str, uuid: str) -> None:
        path = self._destination.root / f"{name}.xml"
        path.write_text(FOREIGN_XML.format(name=name, uuid=uuid))
        self._destination.virsh("define", str(path))


@contextlib.asynccontextmanager
async def libvirt_migration_world(
    pair: tuple[LibvirtProcess, LibvirtProcess],
) -> AsyncIterator[LibvirtMigrationWorld]:
    """Run a driver on both nodes, and leave nothing of what a test has made."""
    one, two = pair
    shared_dir = one.root / "shared"
    async with (
        libvirt_driver(libvirt_settings(one, shared_dir=shared_dir)) as source,
        libvirt_driver(libvirt_settings(two, shared_dir=shared_dir)) as destination,
    ):
        world = LibvirtMigrationWorld(LibvirtWorld(one, source), LibvirtWorld(two, destination))
        try:
            yield world
        finally:
            world.break_relay()


async def outgoing(
    world: MigrationWorld,
    definition: DomainDefinition,
    *,
    copied: tuple[str, ...] = (),
    paused: bool = False,
) -> Outgoing:
    """Return the order to move a domain, under its new generation, through a new relay."""
    return Outgoing(
        definition=definition,
        uri=world.open_relay(),
        address=PAIR_ADDRESSES[1],
        node_name="two",
        layout=await world.two.driver.layout(definition),
        copied=copied,
        tls=False,
        paused=paused,
    )
