"""What goes wrong: one function a kind of fault, each ends by itself after a while.

Which kind, when, where and for how long is drawn from the seed. Every fault that is injected is
noted with the phases of the operations that were open at that moment: the coverage.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from agent.simulated_fabric import SimulatedRelay
from shared.model import nodes_of
from tests.sim.aim import TARGETS, Aim, Target
from tests.sim.cluster import SimCluster
from tests.sim.ledger import Ledger
from tests.sim.node import SimNode
from tests.sim.replica import SimReplica

# (kind of fault, kind of operation and its phase)
Pair = tuple[str, str]
# How many faults come whenever they come; the others wait for an operation, and strike within it.
AT_REST_SHARE = 0.3
MOMENT_LIMIT_S = 10.0
MOMENT_LOOK_S = 0.02
MOMENT_LENGTH_S = 0.6
# An aim fails where no VM runs yet, or none can be moved: then it is taken a little later.
AIM_TRIES = 4
AIM_AGAIN_S = (1.0, 10.0)
# How many of the faults of one node come to one that has something to do.
BUSY_SHARE = 0.6
# How many of the relays that break do so in the few milliseconds in which libvirt runs two guests.
CRITICAL_SHARE = 0.5
SWITCH_LOOK_S = 0.002
SWITCH_LIMIT_S = 5.0
# Twice as long as a saga waits for a source that it has to clean up.
ISOLATED_S = 80.0
CRASH_SHARE = 0.5
# How many effects a process that dies "somewhere" still has.
DIE_IN_MAX = 25
# How long such a process may live before it is killed anyway.
DIE_IN_LIMIT_S = 5.0


class Faults:
    """``coverage`` counts which fault met which operation in which phase."""

    def __init__(
        self, cluster: SimCluster, ledger: Ledger, rng: random.Random, aim: Aim, seed: int
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._rng = rng
        self._aim = aim
        self._seed = seed
        self.coverage: Counter[Pair] = Counter()

    async def run(self, count: int, duration_s: float) -> None:
        """Inject ``count`` faults, spread over the time; several may overlap.

        Half of them are aimed: seed after seed they walk through all pairs of a kind of fault and a
        step of a saga; in every other walk they strike a little after the step has begun.
        """
        aimed = self._rng.sample(range(count), count // 2)
        places = [self._seed * len(aimed) + turn for turn in range(len(aimed))]
        times = sorted(self._rng.uniform(0, duration_s) for _ in range(count))
        start_s = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as under_way:
            for number, time_s in enumerate(times):
                now_s = asyncio.get_running_loop().time()
                await asyncio.sleep(max(0.0, start_s + time_s - now_s))
                if number in aimed:
                    strike = self._strike_at(places.pop(), under_way.create_task)
                    under_way.create_task(strike)
                    continue
                await self._moment()
                fault = self._rng.choice(FAULTS)
                self._note(fault.__name__)
                under_way.create_task(fault(self))

    async def _strike_at(
        self, place: int, spawn: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        """Inject a fault when a saga has come to a step; give up when none does."""
        walk, position = divmod(place, len(ALL_PAIRS))
        fault, target = ALL_PAIRS[position]
        self._cluster.trace.note(f"aim {fault.__name__} at {target.kind}:{target.phase}")
        for _ in range(AIM_TRIES):
            if await self._aim.at(target, spawn):
                await self._while(0.0, MOMENT_LENGTH_S if walk % 2 else 0.0)
                self._note(fault.__name__)
                await fault(self)
                return
            await self._while(*AIM_AGAIN_S)

    async def crash_replica(self) -> None:
        replica = self._replica()
        replica.crash()
        await self._while(0.2, 15.0)
        self._start_replica(replica)

    async def crash_replica_somewhere(self) -> None:
        """Die before or after one of its next effects."""
        replica = self._replica()
        if replica.process is not None:
            await self._die_soon(replica.process.alive_until(self._rng.randint(1, DIE_IN_MAX)))
        replica.crash()
        await self._while(0.2, 10.0)
        self._start_replica(replica)

    async def crash_agent(self) -> None:
        node = self._node()
        node.crash_agent()
        await self._while(0.1, 15.0)
        _start_agent(node)

    async def crash_agent_somewhere(self) -> None:
        """Die before or after one of its next effects."""
        node = self._node()
        if node.process is not None:
            await self._die_soon(node.process.alive_until(self._rng.randint(1, DIE_IN_MAX)))
        node.crash_agent()
        await self._while(0.1, 10.0)
        _start_agent(node)

    async def lose_power(self) -> None:
        node = self._node()
        if not node.powered:
            return
        node.lose_power()
        await self._while(1.0, 40.0)
        node.boot()

    async def lose_libvirtd(self) -> None:
        node = self._node()
        libvirtd = node.libvirtd
        libvirtd.go_away()
        await self._while(0.2, 20.0)
        if node.libvirtd is libvirtd and node.powered:
            libvirtd.come_back()

    async def crash_member(self) -> None:
        index = self._member()
        self._cluster.etcd.crash(index)
        await self._while(0.2, 15.0)
        self._cluster.etcd.restart(index)

    async def pause_member(self) -> None:
        index = self._member()
        self._cluster.etcd.pause(index)
        await self._while(0.2, 15.0)
        self._cluster.etcd.resume(index)

    async def lose_answers(self) -> None:
        self._cluster.etcd.lose_answers(self._rng.randint(1, 4))

    async def cut_node(self) -> None:
        await self._cut(self._node().name, self._replica().name)

    async def cut_member(self) -> None:
        await self._cut(self._replica().name, self._cluster.etcd.members[self._member()].host)

    async def cut_nodes(self) -> None:
        """Two nodes do not hear each other: what is moved between them stands still."""
        one, other = self._rng.sample(list(self._cluster.nodes), 2)
        await self._cut(one, other)

    async def break_relay(self) -> None:
        """End a migration's relay; now and then right after the destination has resumed."""
        relay = await self._relay()
        if relay is None:
            return
        if self._rng.random() < CRITICAL_SHARE:
            await self._until_switched(relay)
        self._cluster.trace.note(f"break the relay to {relay.destination}")
        relay.end()

    async def fail_libvirtd_at_switch(self) -> None:
        """End a libvirtd between the destination's resume and the source's end."""
        relay = await self._relay()
        if relay is None:
            return
        await self._until_switched(relay)
        await self._while(0.0, 0.2)
        names = [relay.destination, *self._cluster.nodes]
        node = self._cluster.nodes[self._rng.choice(names)]
        libvirtd = node.libvirtd
        libvirtd.go_away()
        await self._while(0.2, 20.0)
        if node.libvirtd is libvirtd and node.powered:
            libvirtd.come_back()

    async def isolate_source_at_switch(self) -> None:
        """Nobody hears the source once its guest has moved; its relay may break, and the guest may
        crash on its new node long before the old one can be asked again.
        """
        relay = await self._relay()
        if relay is None or relay.travel is None:
            return
        travel, source = relay.travel, relay.source_node
        await self._until_switched(relay)
        replicas = tuple(self._cluster.replicas)
        links = [*((source, each) for each in replicas), *((each, source) for each in replicas)]
        self._cluster.trace.note(f"isolate {source}")
        for link in links:
            self._cluster.network.cut(*link)
        if self._rng.random() < CRITICAL_SHARE:
            relay.end()
        await self._while(0.0, ISOLATED_S / 2)
        state = self._cluster.nodes[relay.destination].state
        domain = state.domains.get(travel.domain_name)
        if domain is not None and domain.is_active() and self._rng.random() < CRASH_SHARE:
            state.guest_crashes(travel.domain_name)
        await self._while(1.0, ISOLATED_S / 2)
        for link in links:
            self._cluster.network.heal(*link)

    async def _relay(self) -> SimulatedRelay | None:
        """Return a relay through which a guest is being moved, if there is one soon."""
        for _ in range(round(MOMENT_LIMIT_S / MOMENT_LOOK_S)):
            relays = [
                relay
                for relay in self._cluster.fabric.relays.values()
                if relay.travel is not None and not relay.travel.done.done()
            ]
            if relays:
                return self._rng.choice(relays)
            await asyncio.sleep(MOMENT_LOOK_S)
        return None

    async def _until_switched(self, relay: SimulatedRelay) -> None:
        travel = relay.travel
        for _ in range(round(SWITCH_LIMIT_S / SWITCH_LOOK_S)):
            if travel is None or travel.done.done() or travel.switched:
                return
            await asyncio.sleep(SWITCH_LOOK_S)

    async def break_streams(self) -> None:
        self._cluster.network.break_streams(self._node().name, self._replica().name)

    async def _moment(self) -> None:
        """Mostly strike in the middle of an operation, when one comes soon."""
        if self._rng.random() < AT_REST_SHARE:
            return
        for _ in range(round(MOMENT_LIMIT_S / MOMENT_LOOK_S)):
            if self._ledger.operations:
                await self._while(0.0, MOMENT_LENGTH_S)
                return
            await asyncio.sleep(MOMENT_LOOK_S)

    async def _cut(self, one: str, other: str) -> None:
        links = self._rng.choice((((one, other),), ((other, one),), ((one, other), (other, one))))
        for link in links:
            self._cluster.trace.note(f"cut {link[0]} -> {link[1]}")
            self._cluster.network.cut(*link)
        await self._while(*self._rng.choice(((0.1, 3.0), (3.0, 45.0))))
        for link in links:
            self._cluster.network.heal(*link)

    async def _die_soon(self, death: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(DIE_IN_LIMIT_S):
                await death
        except TimeoutError:
            return

    async def _while(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self._rng.uniform(low_s, high_s))

    def _note(self, kind: str) -> None:
        self._cluster.trace.note(f"fault {kind}")
        phases = {f"{each.kind}:{each.phase}" for each in self._ledger.operations.values()}
        for phase in sorted(phases) or ["at rest"]:
            self.coverage[kind, phase] += 1

    def _replica(self) -> SimReplica:
        return self._rng.choice(list(self._cluster.replicas.values()))

    def _node(self) -> SimNode:
        """Return a node, oftener one on which an operation is under way."""
        vms = [self._ledger.vms.get(each.target) for each in self._ledger.operations.values()]
        busy = {node_id for vm in vms if vm is not None for node_id in nodes_of(vm)}
        names = [self._ledger.nodes[each].name for each in sorted(busy)]
        if not names or self._rng.random() >= BUSY_SHARE:
            names = list(self._cluster.nodes)
        return self._cluster.nodes[self._rng.choice(names)]

    def _member(self) -> int:
        return self._rng.randrange(len(self._cluster.etcd.members))

    def _start_replica(self, replica: SimReplica) -> None:
        if replica.process is None:
            replica.start()


def heal(cluster: SimCluster) -> None:
    """End every fault and start whatever is down."""
    cluster.trace.note("heal")
    cluster.network.heal_all()
    cluster.etcd.heal()
    for replica in cluster.replicas.values():
        if replica.process is None:
            replica.start()
    for node in cluster.nodes.values():
        if not node.powered:
            node.boot()
        node.libvirtd.come_back()
        _start_agent(node)


def _start_agent(node: SimNode) -> None:
    if node.powered and node.process is None:
        node.start_agent()


Fault = Callable[[Faults], Coroutine[Any, Any, None]]
FAULTS: tuple[Fault, ...] = (
    Faults.crash_replica,
    Faults.crash_replica_somewhere,
    Faults.crash_agent,
    Faults.crash_agent_somewhere,
    Faults.lose_power,
    Faults.lose_libvirtd,
    Faults.crash_member,
    Faults.pause_member,
    Faults.lose_answers,
    Faults.cut_node,
    Faults.cut_member,
    Faults.break_streams,
    Faults.cut_nodes,
    Faults.break_relay,
    Faults.fail_libvirtd_at_switch,
    Faults.isolate_source_at_switch,
)
# Neighbours differ in both, so that no seed is spent on one kind of fault or on one step.
ALL_PAIRS: tuple[tuple[Fault, Target], ...] = tuple(
    (FAULTS[(number + turn) % len(FAULTS)], TARGETS[number])
    for turn in range(len(FAULTS))
    for number in range(len(TARGETS))
)
