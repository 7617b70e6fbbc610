"""Migrations in the simulated cluster: the plain case, and each hard one made on purpose."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from controlplane.services.context import Permission, Principal, Scope
from controlplane.services.migrations import migrate_vm
from controlplane.services.operations import get_operation
from controlplane.services.requests import MigrateOrder, NewVm
from controlplane.services.views import OperationView
from controlplane.services.vms import create_vm, get_vm
from shared.model import BootSpec, DiskSpec, MigrationSpec, OperationState, VmSpec
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

    async def ended(self, operation: OperationView, wait_s: float = 120) -> OperationView:
        return await get_operation(self.cluster.context(), ADMIN, operation.id, wait_s)

    async def migrate(self) -> OperationView:
        return await migrate_vm(self.cluster.context(), ADMIN, "web-1", MigrateOrder())

    async def where(self) -> str | None:
        return (await get_vm(self.cluster.context(), ADMIN, "web-1")).status.node_name

    def complaints(self) -> list[str]:
        found = [node.found() for node in self.cluster.nodes.values()]
        return list(everything_settles(self.judge.ledger, found))

    async def settled(self, limit_s: float = 200) -> None:
        async with asyncio.timeout(limit_s):
            while self.complaints():  # noqa: ASYNC110 - what it waits for is spread over parts
                await asyncio.sleep(1)


def run(story: Callable[[Bench], Awaitable[None]], nodes: int = 2) -> None:
    async def main() -> None:
        bench = Bench(nodes)
        try:
            await story(bench)
        finally:
            await bench.cluster.stop()

    run_virtual(main(), adopt_by_context)


SPECS: dict[str, dict[str, Any]] = {
    "no disk": {},
    "a disk that is copied": {"disks": (DiskSpec(name="root", size_gib=1),)},
    "a shared disk": {"disks": (DiskSpec(name="root", size_gib=1, pool="shared"),)},
    "strict": {"migration": MigrationSpec(strict=True)},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_vm_moves_and_nothing_is_left(spec: dict[str, Any]) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(**spec)
        before = await bench.where()
        ended = await bench.ended(await bench.migrate())
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert [step.state.value for step in ended.steps] == ["done"] * 7
        assert await bench.where() != before
        await bench.settled()

    run(story)
