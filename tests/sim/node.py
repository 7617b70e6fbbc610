"""A node in the simulation: what its disk and libvirtd keep, and its agents one after the other."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from agent.app import Agent, AgentPorts
from agent.append_log import MemoryLog
from agent.inventory import NodeFacts
from agent.outbox import Outbox
from agent.sampler import Sampler
from agent.session import LeaderChannel
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState
from agent.simulated_fabric import SimulatedRelays
from agent.telemetry import Telemetry, TelemetryChannel
from shared.model import ObservedPower, Sample
from shared.protocol import SESSION_METHOD, TELEMETRY_METHOD
from shared.version import VERSION
from tests.sim.agent_ports import LogOfProcess, ProcessHypervisor, RelaysOfProcess
from tests.sim.invariants import Found
from tests.sim.ledger import Died
from tests.sim.libvirtd import Libvirtd
from tests.sim.previous_processes import make_agent
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

# One pool's name on every node, and the same files.
SHARED_POOL = "shared"
SAMPLE_PERIOD_S = 5.0
BATCH_PERIOD_S = 10.0


class SimNode:
    """``is_previous``: its next agent is of the previous release.

    ``slow_log_s``: how long a write to the agent's log takes, at least and at most."""

    def __init__(self, cluster: SimCluster, name: str, replicas: tuple[str, ...]) -> None:
        self._cluster = cluster
        self._rng = cluster.part()
        self._replicas = replicas
        self._boots = 0
        self._started = 0
        self.name = name
        self.state = SimulatedNodeState(cluster.facts(), cluster.fabric, name)
        self.log = MemoryLog()
        self.slow_log_s: tuple[float, float] | None = None
        self.process: Process | None = None
        self.agent: Agent | None = None
        self.is_previous = False
        self._main: asyncio.Task[None] | None = None
        self.powered = True
        self.libvirtd = self._boot()

    def start_agent(self) -> None:
        """Start a new agent on what disk and libvirtd have kept."""
        assert self.process is None, "a node has one agent"
        self._started += 1
        process = Process(
            self.name, f"{self.name}.{self._started}", self._cluster.host_clock(self.name)
        )
        self._cluster.trace.note(f"start {process.incarnation} in {self.libvirtd.boot_id}")
        self.process = process
        self._main = process.spawn(self._run(process), process.incarnation)

    def crash_agent(self, *, power_loss: bool = False) -> None:
        """kill -9; guests go on."""
        if self.process is None:
            return
        self._cluster.trace.note(f"kill {self.process.incarnation}")
        process, self.process, self.agent = self.process, None, None
        process.kill(power_loss=power_loss)

    async def stop_agent(self) -> None:
        if self._main is not None:
            self._main.cancel()
            await asyncio.wait({self._main})
        self.crash_agent()

    def lose_power(self) -> None:
        """Everything on the node ends at once; what was on disk is there after the next boot."""
        self._cluster.trace.note(f"{self.name} loses power")
        self.powered = False
        self.crash_agent(power_loss=True)
        self.libvirtd.go_away()
        for relay in self._cluster.fabric.relays.values():
            if relay.destination == self.name or (relay.used and relay.source_node == self.name):
                relay.end()
        self.state.reboot()
        # Nothing answers before the next boot, no migration's peer either.
        self.state.libvirtd_dies()
        self.libvirtd.end_boot()

    def boot(self) -> None:
        """Come up again, in a new boot, with nothing running."""
        self.powered = True
        self.state.reboot()
        self.libvirtd = self._boot()
        self.start_agent()

    def found(self) -> Found:
        """Return what is really there."""
        ours = {d.vm_id: d for d in self.state.domains.values() if d.vm_id is not None}
        return Found(
            node=self.name,
            running={
                vm: d.generation for vm, d in ours.items() if d.is_active() and not d.incoming
            },
            paused=tuple(vm for vm, d in ours.items() if d.power is ObservedPower.PAUSED),
            defined={vm: d.generation for vm, d in ours.items()},
            volumes=tuple(
                name
                for pool in self.state.pools
                if pool != SHARED_POOL
                for name in self.state.pools[pool]
            ),
            shared_volumes=tuple(self.state.pools[SHARED_POOL]),
        )

    def _log_delay_s(self) -> float:
        return 0.0 if self.slow_log_s is None else self._rng.uniform(*self.slow_log_s)

    def _boot(self) -> Libvirtd:
        self._boots += 1
        return Libvirtd(
            self.name,
            f"boot-{self.name}-{self._boots}",
            self.state,
            SimulatedDriver(self.state, self._cluster.clock_of(self.name)),
            self._cluster.part(),
            self._cluster.observe,
            self._cluster.settings.held_up_share,
        )

    async def _run(self, process: Process) -> None:
        rng = random.Random(self._rng.getrandbits(64))
        hypervisor = ProcessHypervisor(process, self.libvirtd)
        log = LogOfProcess(self.log, process, self._log_delay_s)
        try:
            if self.is_previous:
                await make_agent(
                    self._cluster,
                    self.name,
                    self._replicas,
                    self.libvirtd.boot_id,
                    hypervisor,
                    log,
                    rng,
                    process,
                ).run()
            else:
                await self._run_present(process, hypervisor, log, rng)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            self._cluster.observe(Died(process.incarnation, repr(error)))

    async def _run_present(
        self,
        process: Process,
        hypervisor: ProcessHypervisor,
        log: LogOfProcess,
        rng: random.Random,
    ) -> None:
        cluster = self._cluster
        facts = NodeFacts(
            name=self.name,
            address=self.name,
            relay_address=self.name,
            labels={},
            boot_id=self.libvirtd.boot_id,
            incarnation=process.incarnation,
            agent_version=VERSION,
        )

        async def dial(address: str) -> LeaderChannel:
            return await cluster.network.dial(address, SESSION_METHOD)

        ports = AgentPorts(
            hypervisor=hypervisor,
            relays=RelaysOfProcess(
                self.name, process, SimulatedRelays(cluster.fabric, self.name), cluster.observe
            ),
            log=log,
            offload=log.offload,
            dial=dial,
            rng=rng,
        )
        agent = self.agent = Agent(facts, self._replicas, ports)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(agent.run())
            if cluster.settings.telemetry:
                self._measure(tasks, agent, hypervisor, rng)

    def _measure(
        self,
        tasks: asyncio.TaskGroup,
        agent: Agent,
        hypervisor: ProcessHypervisor,
        rng: random.Random,
    ) -> None:
        cluster = self._cluster
        clock = cluster.clock_of(self.name)
        outbox = Outbox(BATCH_PERIOD_S)

        async def node_sample() -> Sample | None:
            node_id = agent.node_id
            at = clock.now().timestamp()
            return None if node_id is None else Sample(object=node_id, at=at)

        async def dial(address: str) -> TelemetryChannel:
            return await cluster.network.dial(address, TELEMETRY_METHOD)

        sampler = Sampler(
            node_sample,
            hypervisor.samples,
            outbox,
            sample_period_s=SAMPLE_PERIOD_S,
            batch_period_s=BATCH_PERIOD_S,
        )
        telemetry = Telemetry(self._replicas, dial, outbox, agent.telemetry_hello, clock, rng)
        tasks.create_task(sampler.run())
        tasks.create_task(telemetry.run())
