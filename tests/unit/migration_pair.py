"""Two nodes with an agent each, and a leader played by the test: it tells stages, reads reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from agent.hypervisor import DomainDefinition, Outgoing, volume_name
from agent.simulated_fabric import SimulatedFabric, TravelTimes
from shared.errors import HypervisorUnavailable
from shared.model import DiskSpec, ObservedPower
from shared.moves import EndState, MigrationStage
from shared.protocol import (
    Desired,
    Intent,
    MigrationOrder,
    MigrationReport,
    MigrationRole,
    MigrationTarget,
)
from tests.unit.agent_world import VM, Node
from tests.unit.core_world import desired, spec

SOURCE, DESTINATION = MigrationRole.SOURCE, MigrationRole.DESTINATION
ROOT = DiskSpec(name="root", size_gib=1)
VOLUME = volume_name(VM, "root")
TIMES = TravelTimes()
FOR_EVER_S = 10_000.0
OLD, NEW = 1, 2
# Longer than a whole migration takes, shorter than the agents' own period of looking again.
A_WHILE_S = 5.0


class Pair:
    """``one`` runs generation OLD of a VM; ``two`` is where it becomes generation NEW."""

    def __init__(self) -> None:
        self.fabric = SimulatedFabric(TIMES)
        self.one = Node(self.fabric, "one")
        self.two = Node(self.fabric, "two")
        self.revision = 10
        self.target: MigrationTarget | None = None
        self.spec = spec(disks=(ROOT,))

    def order(self, role: MigrationRole, stage: MigrationStage, **changes: Any) -> MigrationOrder:
        fields: dict[str, Any] = {
            "operation": "op-1",
            "role": role,
            "stage": stage,
            "generation": NEW,
            "source_generation": OLD,
            "boot_id": "boot-1",
            "peer": "two" if role is SOURCE else "one",
            "copied": ("root",),
            "target": self.target if role is SOURCE else None,
        }
        return MigrationOrder(**{**fields, **changes})

    def wish(self, role: MigrationRole, order: MigrationOrder | None, **changes: Any) -> Desired:
        """Return what the leader would tell a node, under the newest revision."""
        leaves = order is not None and order.stage is MigrationStage.FINALIZE
        fields: dict[str, Any] = {
            "revision": self.revision,
            "permitted": False,
            "generation": OLD if role is SOURCE else NEW,
            "intent": Intent.RUN,
            "spec": self.spec,
            "migration": order,
        }
        if role is DESTINATION:
            fields["intent"] = Intent.RECEIVE
        elif leaves:
            fields["intent"] = Intent.LEAVE
        return desired(**{**fields, **changes})

    def tell(
        self,
        role: MigrationRole,
        stage: MigrationStage,
        *,
        intent: Intent | None = None,
        **changes: Any,
    ) -> None:
        """Tell one node a stage, under a new revision, without waiting."""
        self.revision += 1
        wish = self.wish(role, self.order(role, stage, **changes))
        self.node(role).agent.take(wish if intent is None else replace(wish, intent=intent))

    async def told(
        self, role: MigrationRole, stage: MigrationStage, **changes: Any
    ) -> MigrationReport:
        """Tell one node a stage, and return what it reports of it after a while."""
        self.tell(role, stage, **changes)
        await asyncio.sleep(A_WHILE_S)
        report = self.report(role)
        assert report.stage is stage
        return report

    def node(self, role: MigrationRole) -> Node:
        return self.one if role is SOURCE else self.two

    def report(self, role: MigrationRole) -> MigrationReport:
        report = self.node(role).reports[-1].migration
        assert report is not None, "its last report is about a migration"
        return report

    async def prepare(self) -> None:
        """Have the destination make ready."""
        report = await self.told(DESTINATION, MigrationStage.PREPARE)
        assert (report.settled, report.fault) == (True, None)
        self.target = report.target
        assert self.target is not None

    async def end(self, role: MigrationRole) -> EndState:
        end = await self.node(role).driver.migration_end(VM)
        return EndState.ABSENT if end is None else end.state

    async def until_end(self, role: MigrationRole, state: EndState) -> None:
        async def reached() -> bool:
            return await self.end(role) is state

        await until(reached)

    async def arrive_unheard(self) -> None:
        """Bring the guest to its destination, while the source waits for the answer for ever."""
        self.fabric.times = replace(TIMES, reply_s=FOR_EVER_S)
        await self.prepare()
        self.tell(SOURCE, MigrationStage.TRANSFER)
        await self.until_end(DESTINATION, EndState.RUNNING)

    def running(self) -> dict[str, int]:
        """Return under which generation the guest runs, by node."""
        nodes = {node.name: node.state.domains.get(VM) for node in (self.one, self.two)}
        return {
            name: domain.generation
            for name, domain in nodes.items()
            if domain is not None and domain.power is ObservedPower.RUNNING and not domain.incoming
        }

    async def outgoing(self, uri: str) -> Outgoing:
        definition = self.definition(NEW)
        return Outgoing(
            definition=definition,
            uri=uri,
            address="two",
            node_name="two",
            layout=await self.two.driver.layout(definition),
            copied=("root",),
            tls=False,
            paused=False,
        )

    def definition(self, generation: int) -> DomainDefinition:
        wish = self.wish(SOURCE, None)
        return DomainDefinition(
            vm_id=VM,
            name=wish.domain_name,
            uuid=wish.domain_uuid,
            title=wish.name,
            tenant=wish.tenant,
            generation=generation,
            spec=self.spec,
        )


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    """Look ten times in each 100 ms of the loop's time."""
    for _ in range(3000):
        try:
            if await reached():
                return
        except HypervisorUnavailable:
            pass
        await asyncio.sleep(0.01)
    raise AssertionError("never seen")


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """Run both agents; the guest runs on ``one``."""
    made = Pair()
    await made.one.start_agent()
    await made.two.start_agent()
    try:
        made.one.agent.take(made.wish(SOURCE, None, permitted=True))
        await asyncio.sleep(A_WHILE_S)
        assert made.running() == {"one": OLD}
        made.one.hooks.acts.clear()
        yield made
    finally:
        await made.one.stop_agent()
        await made.two.stop_agent()
