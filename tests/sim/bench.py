"""A small cluster in one process, for a test that plays one scenario in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from controlplane.services.context import Permission, Principal, Scope
from controlplane.services.migrations import migrate_vm
from controlplane.services.nodes import set_cordon
from controlplane.services.operations import get_operation
from controlplane.services.requests import CordonOrder, MigrateOrder, NewVm
from controlplane.services.views import OperationView
from controlplane.services.vms import act_on_vm, create_vm, get_vm
from shared.model import BootSpec, DiskSpec, OperationState, Power, VmSpec
from shared.moves import MigrationStage
from shared.states import VmAction
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.invariants import Judge, everything_settles
from tests.sim.process import adopt_by_context
from tests.sim.virtual_loop import run_virtual

ADMIN = Principal("admin", frozenset(Permission), Scope())


class Bench:
    """A small cluster with one VM that runs, and a judge of all that happens in it."""

    def __init__(self, nodes: int = 2) -> None:
        self.judge = Judge()
        settings = ClusterSettings(nodes=nodes, held_up_share=0.0)
        self.cluster = SimCluster(settings, random.Random(1), observe=self.judge.take)

    async def start(self, **spec: Any) -> str:
        await self.cluster.start()
        await self.cluster.until_ready()
        new = NewVm(
            name="web-1",
            spec=VmSpec(vcpus=1, memory_mib=512, boot=BootSpec(kernel="tiny-kernel"), **spec),
        )
        operation = await create_vm(self.cluster.context(), ADMIN, new)
        ended = await self.ended(operation)
        assert ended.state is OperationState.SUCCEEDED
        return operation.target

    async def create_on(
        self,
        node_name: str,
        name: str,
        pools: tuple[str, ...],
        power: Power,
        others: tuple[str, ...] = (),
    ) -> None:
        """Make a VM that comes to be bound to a node, and then has the power asked for.

        ``others`` are the nodes that are open but for that; all of them when they are not named.
        """
        context = self.cluster.context()
        others = others or tuple(each for each in self.cluster.nodes if each != node_name)
        cordon = CordonOrder()
        for other in others:
            await set_cordon(context, ADMIN, other, cordon, cordoned=True)
        disks = tuple(DiskSpec(name=f"d{i}", size_gib=1, pool=p) for i, p in enumerate(pools))
        spec = VmSpec(vcpus=1, memory_mib=256, boot=BootSpec(kernel="tiny-kernel"), disks=disks)
        await self.ended(await create_vm(context, ADMIN, NewVm(name=name, spec=spec)))
        if power is Power.STOPPED:
            await self.ended(await act_on_vm(context, ADMIN, name, VmAction.STOP))
        for other in others:
            await set_cordon(context, ADMIN, other, cordon, cordoned=False)

    async def ended(self, operation: OperationView, wait_s: float = 120) -> OperationView:
        return await get_operation(self.cluster.context(), ADMIN, operation.id, wait_s)

    async def migrate(self) -> OperationView:
        return await migrate_vm(self.cluster.context(), ADMIN, "web-1", MigrateOrder())

    async def where(self) -> str | None:
        return (await get_vm(self.cluster.context(), ADMIN, "web-1")).status.node_name

    def on_the_move(self) -> list[str]:
        """Return the names of the VMs whose transfer may be under way."""
        claimed = ((vm.name, vm.status.migration) for vm in self.judge.ledger.vms.values())
        stages = (MigrationStage.REQUESTED, MigrationStage.PREPARE)
        return [name for name, claim in claimed if claim and claim.stage not in stages]

    def places(self) -> dict[str, str]:
        """Return the name of the node that each VM is bound to."""
        ledger = self.judge.ledger
        return {vm.name: ledger.nodes[vm.status.node or ""].name for vm in ledger.vms.values()}

    async def until(
        self, holds: Callable[[], bool], limit_s: float = 200, look_s: float = 0.1
    ) -> None:
        async with asyncio.timeout(limit_s):
            while not holds():  # noqa: ASYNC110 - what it waits for is spread over parts
                await asyncio.sleep(look_s)

    def complaints(self) -> list[str]:
        found = [node.found() for node in self.cluster.nodes.values()]
        return list(everything_settles(self.judge.ledger, found))

    async def settled(self, limit_s: float = 200) -> None:
        await self.until(lambda: not self.complaints(), limit_s)


def run(story: Callable[[Bench], Awaitable[None]], nodes: int = 2) -> None:
    async def main() -> None:
        bench = Bench(nodes)
        try:
            await story(bench)
        finally:
            await bench.cluster.stop()

    run_virtual(main(), adopt_by_context)
