"""What a fault is given: the cluster, whom it strikes, and for how long.

All of it is drawn from the seed. Parts on which an operation is under way are struck oftener.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from shared.model import nodes_of
from tests.sim.cluster import SimCluster
from tests.sim.etcd import Member
from tests.sim.ledger import Ledger
from tests.sim.network import Link
from tests.sim.node import SimNode
from tests.sim.replica import SimReplica

# How many of the faults of one node come to one that has something to do.
BUSY_SHARE = 0.6
# How many of the faults of one replica come to the one that leads.
LEADER_SHARE = 0.6


class Scene:
    def __init__(self, cluster: SimCluster, ledger: Ledger, rng: random.Random) -> None:
        self.cluster = cluster
        self.ledger = ledger
        self.rng = rng
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def happened(self) -> None:
        """Look whether something has come about that a fault waits for."""
        for condition, came in self._waiting:
            if not came.done() and condition():
                came.set_result(None)

    async def until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Wait until an event has made a condition true; return whether one has, in time."""
        if condition():
            return True
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (condition, came)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(limit_s):
                await came
        except TimeoutError:
            return False
        finally:
            self._waiting.remove(entry)
        return True

    def note(self, text: str) -> None:
        self.cluster.trace.note(text)

    async def last(self, least_s: float, most_s: float) -> None:
        """Let some time pass."""
        await asyncio.sleep(self.rng.uniform(least_s, most_s))

    async def last_briefly_or_long(self) -> None:
        """Let too little time pass for anybody to give up, or enough for everybody."""
        await self.last(*self.rng.choice(((0.1, 3.0), (3.0, 45.0))))

    def replica(self) -> SimReplica:
        """Return a replica, oftener the one that leads."""
        replicas = list(self.cluster.replicas.values())
        leader = self.ledger.leader
        if leader is not None and self.rng.random() < LEADER_SHARE:
            replicas = [each for each in replicas if each.name == leader.replica]
        return self.rng.choice(replicas)

    def node(self) -> SimNode:
        """Return a node, oftener one on which an operation is under way."""
        vms = [self.ledger.vms.get(each.target) for each in self.ledger.operations.values()]
        busy = {node_id for vm in vms if vm is not None for node_id in nodes_of(vm)}
        names = [self.ledger.nodes[each].name for each in sorted(busy)]
        if not names or self.rng.random() >= BUSY_SHARE:
            names = list(self.cluster.nodes)
        return self.cluster.nodes[self.rng.choice(names)]

    def member_index(self) -> int:
        return self.rng.randrange(len(self.cluster.etcd.members))

    def member(self) -> Member:
        return self.cluster.etcd.members[self.member_index()]

    def links(self, one: str, other: str) -> tuple[Link, ...]:
        """Return one direction between two hosts, or both."""
        there, back = (one, other), (other, one)
        return self.rng.choice(((there,), (back,), (there, back)))

    async def cut(self, links: Iterable[Link], lasting: Coroutine[Any, Any, None]) -> None:
        """Let nothing pass for a while."""
        links = tuple(links)
        for link in links:
            self.note(f"cut {link[0]} -> {link[1]}")
            self.cluster.network.cut(*link)
        await lasting
        for link in links:
            self.cluster.network.heal(*link)


Fault = Callable[[Scene], Coroutine[Any, Any, None]]
