"""What users and guests do: operations through the services, as the API calls them, and surprises.

``Client`` is how they ask. Some of them only look, at any replica, and never want to see less than
they have seen.
"""

from __future__ import annotations

import asyncio
import random

from controlplane.commands.migrations import MOVABLE_PHASES
from shared.model import (
    BootSpec,
    DiskSpec,
    MigrationSpec,
    ObservedPower,
    OperationState,
    Power,
    VmSpec,
)
from shared.states import VmAction, vm_phase
from tests.sim.client import Client
from tests.sim.cluster import SimCluster
from tests.sim.ledger import Ledger
from tests.sim.node import SHARED_POOL

CLIENTS = 4
# More VMs than this would not fit on the nodes, and creates would wait for ever.
VMS_MAX = 8
NODES_MAX = 6
# How long a node that has left stays away.
AWAY_S = (10.0, 90.0)
# How often somebody looks.
LOOK_S = (2.0, 20.0)

_ACTIONS: tuple[VmAction, ...] = (
    VmAction.START,
    VmAction.START,
    VmAction.STOP,
    VmAction.SHUTDOWN,
    VmAction.REBOOT,
    VmAction.RESET,
    VmAction.PAUSE,
    VmAction.RESUME,
    VmAction.RESUME,
)


class Workload:
    """``operations`` operations of several clients, spread over ``duration_s``."""

    def __init__(
        self,
        cluster: SimCluster,
        ledger: Ledger,
        rng: random.Random,
        *,
        operations: int,
        duration_s: float,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._rng = rng
        self._operations = operations
        self._duration_s = duration_s
        self._made = 0
        self.client = Client(cluster, ledger, random.Random(rng.getrandbits(64)))

    async def run(self) -> None:
        looking = asyncio.ensure_future(self._look())
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._use(self._operations // CLIENTS))
        looking.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(*LOOK_S))
            await self.client.look()

    async def delete_what_does_not_fit(self) -> None:
        """As a user would in the end: VMs that wait for room are given up."""
        for vm in list(self._ledger.vms.values()):
            waits = any(c.type == "Placed" and not c.status for c in vm.status.conditions)
            if waits and not vm.deleting:
                await self.client.delete(vm.id)

    async def _use(self, operations: int) -> None:
        pause_s = 2 * self._duration_s / operations
        for _ in range(operations):
            await asyncio.sleep(self._rng.uniform(0, pause_s))
            await self._one()

    async def _one(self) -> None:
        vms = sorted(self._ledger.vms)
        draw = self._rng.random()
        if not vms or (draw < 0.4 and len(vms) < VMS_MAX):
            self._made += 1
            await self.client.create(f"vm-{self._made}", self._spec())
        elif draw < 0.5:
            await self.client.delete(self._rng.choice(vms))
        elif draw < 0.58:
            self._surprise()
        elif draw < 0.78:
            await self.client.migrate(self._rng.choice(vms))
        elif draw < 0.83:
            await self.drain_one()
        elif draw < 0.85:
            await self._leave()
        elif draw < 0.87:
            self._join()
        elif draw < 0.90:
            await self._cancel()
        else:
            await self.client.act(self._rng.choice(vms), self._rng.choice(_ACTIONS))

    async def migrate_one(self) -> None:
        """Move a VM that runs, if there is one."""
        running = [vm.id for vm in self._ledger.vms.values() if vm_phase(vm) in MOVABLE_PHASES]
        if running:
            await self.client.migrate(self._rng.choice(sorted(running)))

    async def drain_one(self) -> None:
        """Drain a node, and open it again some time later, however the drain went."""
        node_name = self._rng.choice(list(self._cluster.nodes))
        await self.client.drain(node_name)
        await self.client.uncordon(node_name)

    def _join(self) -> None:
        """A node joins that nobody has heard of before."""
        if len(self._cluster.nodes) < NODES_MAX:
            self._cluster.add_node().start_agent()

    async def _leave(self) -> None:
        """A node is emptied, goes away, and comes back."""
        node = self._cluster.nodes[self._rng.choice(list(self._cluster.nodes))]
        if await self.client.drain(node.name) == OperationState.SUCCEEDED and node.powered:
            await node.stop_agent()
            await asyncio.sleep(self._rng.uniform(*AWAY_S))
            if node.powered and node.process is None:
                node.start_agent()
        await self.client.uncordon(node.name)

    async def _cancel(self) -> None:
        sagas = [op.id for op in self._ledger.operations.values() if op.saga is not None]
        if sagas:
            await self.client.cancel(self._rng.choice(sorted(sagas)))

    def _spec(self) -> VmSpec:
        pools = self._rng.choice(((), ("default",), (SHARED_POOL,), ("default", SHARED_POOL)))
        disks = tuple(DiskSpec(name=f"d{i}", size_gib=1, pool=p) for i, p in enumerate(pools))
        strict = self._rng.random() < 0.3
        ends = self._rng.choice(("", "", "", "nova.exit=poweroff@20", "nova.exit=reboot@5"))
        return VmSpec(
            vcpus=self._rng.choice((1, 2)),
            memory_mib=self._rng.choice((512, 1024, 2048)),
            boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline=ends),
            disks=disks,
            migration=MigrationSpec(strict=strict),
            power=self._rng.choice((Power.RUNNING,) * 8 + (Power.PAUSED,)),
        )

    def _surprise(self) -> None:
        """A guest ends by itself, somewhere; one that stands still can only crash."""
        active = [
            (node, name, domain.power is ObservedPower.RUNNING)
            for node in self._cluster.nodes.values()
            for name, domain in sorted(node.state.domains.items())
            if domain.is_active()
        ]
        if not active:
            return
        node, name, runs = self._rng.choice(active)
        crashes = self._rng.random() < 0.5 or not runs
        self._cluster.trace.note(f"guest {name} {'crashes' if crashes else 'powers off'}")
        (node.state.guest_crashes if crashes else node.state.guest_powers_off)(name)
