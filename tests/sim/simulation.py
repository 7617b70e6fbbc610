"""One seed: a cluster, users, faults, then healing; judged at every step and at its end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from msgspec import Struct

from controlplane.election import ElectionSettings
from controlplane.services.context import Scope
from controlplane.services.operations import find_operation
from controlplane.sessions.hub import HubSettings
from controlplane.store.etcd_members import Limits
from shared.model import SCHEMA_LEVEL, Operation
from tests.sim.aim import Aim
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.faults.healing import heal
from tests.sim.faults.injector import Faults, Pair
from tests.sim.invariants import (
    INVARIANTS,
    Check,
    Judge,
    Violation,
    everything_settles,
    replicas_agree,
)
from tests.sim.invariants.settled import acknowledged_is_kept
from tests.sim.ledger import Died, SimEvent
from tests.sim.process import adopt_by_context
from tests.sim.sizes import sizes
from tests.sim.trace import Tell, Trace
from tests.sim.upgrade import EVERY, Upgrade
from tests.sim.virtual_loop import run_virtual
from tests.sim.workload import Workload

# Renewals, heartbeats and looks take most of a quiet cluster's work. They come less often than in
# production; what they must outlast is as much longer.
ELECTION = ElectionSettings(
    lease_ttl_s=10, renew_period_s=2.5, suspend_after_s=6.0, follower_look_s=2.5
)
SESSIONS = HubSettings(heartbeat_period_s=6.0, silence_limit_s=30.0)
STORE = Limits(watch_silence_s=4.0)
# Of a cell that began with 0.1.
PREVIOUS_LEVEL = 1
# Often enough for a follower whose watch has left something out to find that before the end.
COMPARISON_PERIOD_S = 120.0

# After healing: the longest back-off of a VM that crashed a few times, agents' reconnects, a
# greeting. Operations' own deadline is later, so that one that hangs is seen.
SETTLE_LIMIT_S = 600.0
SETTLE_LOOK_S = 5.0
MEASURE_PERIOD_S = 20.0


class SimulationSettings(Struct, frozen=True, kw_only=True):
    """How much happens in one seed."""

    operations: int = 60
    faults: int = 15
    duration_s: float = 600.0


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a seed; ``violated`` is the invariant's name, empty when all held."""

    seed: int
    violated: str
    complaint: str
    digest: str
    virtual_s: float
    trace_lines: int
    outcomes: Counter[str]
    coverage: Counter[Pair]


def simulate(
    seed: int,
    settings: SimulationSettings | None = None,
    *,
    tell: Tell | None = None,
    only: Check | None = None,
) -> Outcome:
    """Run one seed to its end or to its first violation.

    ``tell`` is given what happens, line by line; ``only`` judges by one invariant, or by what must
    hold at rest.
    """
    run = _Run(seed, settings or SimulationSettings(), tell, only)
    return run_virtual(run.main(), adopt_by_context)


class _Run:
    def __init__(
        self, seed: int, settings: SimulationSettings, tell: Tell | None, only: Check | None
    ) -> None:
        self._seed = seed
        self._settings = settings
        if only is None:
            self._judge = Judge()
        else:
            self._judge = Judge(each for each in INVARIANTS if each is only)
        self._must_settle = only in (None, everything_settles)
        self._trace = Trace(tell)
        self._violation: Violation | None = None
        self._stopped = asyncio.Event()
        self._aim: Aim | None = None
        self._faults: Faults | None = None

    async def main(self) -> Outcome:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._callback_failed)
        rng = random.Random(self._seed)
        upgrades = self._seed % EVERY == EVERY - 1
        cluster = SimCluster(
            _shape(rng),
            rng,
            trace=self._trace,
            observe=self._observe,
            schema_level=PREVIOUS_LEVEL if upgrades else SCHEMA_LEVEL,
        )
        ledger = self._judge.ledger
        workload = Workload(
            cluster,
            ledger,
            cluster.part(),
            operations=self._settings.operations,
            duration_s=self._settings.duration_s,
        )
        self._aim = Aim(workload, ledger)
        faults = self._faults = Faults(cluster, ledger, cluster.part(), self._aim, self._seed)
        upgrade = Upgrade(cluster, workload.client, cluster.part()) if upgrades else None
        await self._unless_stopped(self._story(cluster, workload, faults, upgrade))
        virtual_s = loop.time()
        digest, lines = self._trace.digest(), self._trace.lines
        for node in cluster.nodes.values():
            node.crash_agent()
        for replica in cluster.replicas.values():
            replica.crash()
        await cluster.stop()
        return Outcome(
            seed=self._seed,
            violated="" if self._violation is None else self._violation.name,
            complaint="" if self._violation is None else str(self._violation),
            digest=digest,
            virtual_s=virtual_s,
            trace_lines=lines,
            outcomes=workload.client.outcomes,
            coverage=faults.coverage,
        )

    async def _story(
        self, cluster: SimCluster, workload: Workload, faults: Faults, upgrade: Upgrade | None
    ) -> None:
        await cluster.start()
        measuring = asyncio.ensure_future(self._measure(cluster))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(workload.run())
            tasks.create_task(faults.run(self._settings.faults, self._settings.duration_s))
            if upgrade is not None:
                tasks.create_task(upgrade.run(self._settings.duration_s))
        measuring.cancel()
        heal(cluster)
        if self._must_settle:
            await self._settle(cluster, workload)

    async def _measure(self, cluster: SimCluster) -> None:
        while True:
            await asyncio.sleep(MEASURE_PERIOD_S)
            for measured in sizes(cluster, self._judge.ledger):
                self._observe(measured)

    async def _settle(self, cluster: SimCluster, workload: Workload) -> None:
        end_s = asyncio.get_running_loop().time() + SETTLE_LIMIT_S
        while complaints := await self._complaints(cluster):
            if asyncio.get_running_loop().time() >= end_s:
                self._stop(Violation("everything_settles", "; ".join(complaints)))
                return
            await workload.delete_what_does_not_fit()
            await asyncio.sleep(SETTLE_LOOK_S)

    async def _complaints(self, cluster: SimCluster) -> list[str]:
        """Look twice, so that what only passes through rest does not count as settled."""
        for _ in range(2):
            found = [node.found() for node in cluster.nodes.values()]
            states = {
                name: replica.control_plane.state
                for name, replica in cluster.replicas.items()
                if replica.control_plane is not None
            }
            complaints = [
                *everything_settles(self._judge.ledger, found),
                *replicas_agree(self._judge.ledger, states),
                *await self._forgotten(cluster),
            ]
            if complaints:
                return complaints
            await asyncio.sleep(SETTLE_LOOK_S)
        return []

    async def _forgotten(self, cluster: SimCluster) -> list[str]:
        """Ask every replica for every operation that a client was told of."""
        ledger, complaints = self._judge.ledger, list[str]()
        for name, replica in cluster.replicas.items():
            if replica.control_plane is None:
                complaints.append(f"{name} is down")
                continue
            context, found = replica.control_plane.context(), dict[str, Operation | None]()
            for operation_id in ledger.acknowledged:
                found[operation_id] = await find_operation(context, Scope(), operation_id)
            complaints += acknowledged_is_kept(ledger, name, found)
        return complaints

    async def _unless_stopped(self, work: Any) -> None:
        story = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait({story, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (story, stopped):
            task.cancel()
        ended = (await asyncio.gather(story, stopped, return_exceptions=True))[0]
        if isinstance(ended, Exception) and self._violation is None:
            raise ended

    def _observe(self, event: SimEvent) -> None:
        """Judge an event; whoever caused it must not be the one that a complaint is raised to."""
        if self._violation is None:
            try:
                self._judge.take(event)
            except Violation as violation:
                self._stop(violation)
        if self._aim is not None:
            self._aim.take(event)
        if self._faults is not None:
            self._faults.happened()

    def _stop(self, violation: Violation) -> None:
        self._trace.note(f"violation: {violation}")
        self._violation = violation
        self._stopped.set()

    def _callback_failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "future" not in context and "task" not in context:
            self._observe(Died("a callback", f"{context['message']}: {error!r}"))


def _shape(rng: random.Random) -> ClusterSettings:
    return ClusterSettings(
        replicas=3,
        members=3,
        nodes=rng.choice((4, 5)),
        node_cpus=2,
        node_memory_mib=4096,
        election=ELECTION,
        sessions=SESSIONS,
        store=STORE,
        exchange_period_s=5.0,
        comparison_period_s=COMPARISON_PERIOD_S,
    )
