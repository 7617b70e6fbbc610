"""A real agent on a simulated node, in the test's own event loop.

Everything of the agent is the real thing (session, fence on its disk, gRPC, telemetry) but the
hypervisor. The node outlives its agents, as guests do, and is the witness of what became of them.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.app import Agent, AgentPorts
from agent.append_log import FileLog
from agent.inventory import NodeFacts
from agent.node_sampler import NodeSampler
from agent.outbox import Outbox
from agent.sampler import Sampler
from agent.session_grpc import Dialler
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState, simulated_facts
from agent.simulated_fabric import SimulatedRelays
from agent.telemetry import Telemetry
from shared.clock import SystemClock
from shared.model import ObservedPower
from shared.offload import ThreadOffload
from shared.states import RUNNING_POWERS
from shared.tls import TlsMaterial
from shared.version import VERSION

# Replicas make no rate over less than half a second.
SAMPLE_PERIOD_S = 0.6
# Long enough that a burst of changes finds the node in the middle of many of them.
CALL_S = 0.02
BACKOFF_S_MAX = 0.5


class SlowCalls:
    """Each call of the hypervisor takes a while, as libvirt's do."""

    async def before(self, call: str, name: str) -> None:
        await asyncio.sleep(CALL_S)

    async def after(self, call: str, name: str) -> None:
        return None


class Impatient(random.Random):
    """Keeps every back-off short: half a minute without an agent would show a test nothing."""

    def uniform(self, a: float, b: float) -> float:
        return super().uniform(a, min(b, BACKOFF_S_MAX))


class WitnessNode(SimulatedNodeState):
    """A node that counts, by domain, how often its guest was started and how often it ended."""

    def __init__(self, name: str) -> None:
        super().__init__(simulated_facts(cpus=16, memory_mib=32_768))
        self.name = name
        self.boot_id = str(uuid.uuid4())
        self.starts: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._ran: set[str] = set()

    def changed(self, name: str) -> None:
        domain = self.domains.get(name)
        runs = domain is not None and domain.power in RUNNING_POWERS
        if runs and name not in self._ran:
            self._ran.add(name)
            self.starts[name] += 1
        elif not runs and name in self._ran:
            self._ran.discard(name)
            self.ends[name] += 1
        super().changed(name)

    def generations(self) -> dict[str, int]:
        """Return the generation of each running domain, by its name."""
        return {
            name: domain.generation
            for name, domain in self.domains.items()
            if domain.power is ObservedPower.RUNNING
        }

    def volumes(self) -> set[str]:
        return {volume for pool in self.pools.values() for volume in pool}


@asynccontextmanager
async def simulated_agent(
    node: WitnessNode,
    tls: TlsMaterial,
    replicas: Sequence[str],
    state_dir: Path,
    *,
    telemetry: bool = True,
) -> AsyncIterator[Agent]:
    """Run an agent until the context is left; what breaks it breaks the test.

    ``state_dir`` is the disk that an agent finds again when it comes back.
    """
    clock, rng = SystemClock(), Impatient()
    disk, sampling = ThreadOffload("fence"), ThreadOffload("sampling")
    log = FileLog(state_dir / "fence")
    driver = SimulatedDriver(node, clock, SlowCalls())
    dialler = Dialler(tls, rng)
    facts = NodeFacts(
        name=node.name,
        address="127.0.0.1",
        relay_address="127.0.0.1:8445",
        labels={},
        boot_id=node.boot_id,
        incarnation=uuid.uuid4().hex,
        agent_version=VERSION,
    )
    agent = Agent(
        facts,
        tuple(replicas),
        AgentPorts(
            hypervisor=driver,
            relays=SimulatedRelays(node.fabric, node.address),
            log=log,
            offload=disk,
            dial=dialler.session,
            rng=rng,
        ),
    )
    outbox = Outbox(SAMPLE_PERIOD_S)
    sampler = Sampler(
        NodeSampler(lambda: agent.node_id or "", sampling, clock).sample,
        driver.samples,
        outbox,
        sample_period_s=SAMPLE_PERIOD_S,
        batch_period_s=SAMPLE_PERIOD_S,
    )
    sender = Telemetry(
        tuple(replicas), dialler.telemetry, outbox, agent.telemetry_hello, clock, rng
    )
    running = [
        asyncio.ensure_future(agent.run()),
        asyncio.ensure_future(dialler.keep_open(replicas)),
    ]
    if telemetry:
        running += [asyncio.ensure_future(sampler.run()), asyncio.ensure_future(sender.run())]
    try:
        yield agent
    finally:
        for task in running:
            task.cancel()
        ends = await asyncio.gather(*running, return_exceptions=True)
        await dialler.close()
        await driver.close()
        log.close()
        disk.close()
        sampling.close()
    for end in ends:
        if isinstance(end, Exception):
            raise end
