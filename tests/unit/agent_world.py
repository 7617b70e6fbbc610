"""A node with its disk and libvirt, and the agent on it: all that the agent's unit tests need."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from agent.append_log import MemoryLog
from agent.fence import Fence
from agent.inventory import NodeFacts
from agent.migration import Migrations
from agent.reconciler import VmReconciler
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState, simulated_facts
from agent.simulated_fabric import SimulatedFabric, SimulatedRelays
from agent.workqueue import WorkQueue
from shared.errors import HypervisorUnavailable
from shared.model import ObservedPower
from shared.offload import inline
from shared.protocol import MigrationProgress, VmReport
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN, desired

VM = "vm-1"
A_WHILE_S = 5.0
# Reads change nothing, and are not noted.
READS = frozenset(
    {
        "domain",
        "domains",
        "facts",
        "migration_end",
        "transfer",
        "figures",
        "layout",
        "check_source",
        "check_destination",
        "volumes",
    }
)


class StillClock:
    def now(self) -> datetime:
        return BORN

    def boottime_s(self) -> float:
        return asyncio.get_running_loop().time()


class Hooks:
    """Notes the calls that act, and holds up or breaks those that a test names."""

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.hold_before: dict[str, asyncio.Event] = {}
        self.hold_after: dict[str, asyncio.Event] = {}
        self.lose_answers_of = ""

    async def before(self, call: str, name: str) -> None:
        if call not in READS:
            self.acts.append(call)
        if call in self.hold_before:
            await self.hold_before[call].wait()

    async def after(self, call: str, name: str) -> None:
        if call in self.hold_after:
            await self.hold_after[call].wait()
        if call == self.lose_answers_of:
            self.lose_answers_of = ""
            raise HypervisorUnavailable("the connection broke")


class Node:
    """A node with its disk; the agent on it can be started anew."""

    def __init__(self, fabric: SimulatedFabric | None = None, name: str = "n1") -> None:
        facts = simulated_facts(pools=("default", "shared"), shared_pools=("shared",))
        self.state = SimulatedNodeState(facts, fabric, name)
        self.name = name
        self.relays = SimulatedRelays(self.state.fabric, name)
        self.log = MemoryLog()
        self.hooks = Hooks()
        self.reports: list[VmReport] = []
        self.progress: list[MigrationProgress] = []
        self.running: asyncio.Future[Any] | None = None

    async def start_agent(self, boot_id: str = "boot-1") -> None:
        await self.stop_agent()
        self.reports.clear()
        self.hooks.acts.clear()
        self.fence = Fence(self.log, inline)
        self.driver = SimulatedDriver(self.state, StillClock(), self.hooks)
        queue = WorkQueue()
        self.migrations = Migrations(
            self.driver,
            self.fence,
            self.relays,
            node_facts(boot_id, self.name),
            queue.add,
            self.progress.append,
        )
        self.agent = VmReconciler(
            self.driver,
            self.fence,
            node_facts(boot_id, self.name),
            self.reports.append,
            self.migrations,
            queue,
            random.Random(1),
        )
        self.running = asyncio.gather(self.driver.run(), self.agent.run())

    async def stop_agent(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
            self.migrations.close()
            await self.driver.close()

    async def wants(self, **changes: Any) -> VmReport:
        """Tell the agent and return its last report after a while."""
        self.agent.take(desired(**changes))
        return await self.later()

    async def later(self) -> VmReport:
        await asyncio.sleep(A_WHILE_S)
        return self.reports[-1]

    def power(self) -> ObservedPower | None:
        domain = self.state.domains.get(VM)
        return None if domain is None else domain.power


def node_facts(boot_id: str, name: str) -> NodeFacts:
    return NodeFacts(
        name=name,
        address=name,
        relay_address=name,
        labels={},
        boot_id=boot_id,
        incarnation="i1",
        agent_version="1",
    )


@asynccontextmanager
async def node() -> AsyncIterator[Node]:
    made = Node()
    await made.start_agent()
    try:
        yield made
    finally:
        await made.stop_agent()


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)
