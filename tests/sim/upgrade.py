"""An upgrade in the middle of everything: from the previous release to the present one.

All begin with the previous release, at its schema level. One process after the other is replaced,
in any order; some are put back once more, as they may be until the upgrade is finalized. Then it is
finalized, and from then on nobody goes back.
"""

from __future__ import annotations

import asyncio
import random

from tests.sim.client import Client
from tests.sim.cluster import SimCluster
from tests.sim.faults.processes import start_agent, start_replica
from tests.sim.node import SimNode
from tests.sim.replica import SimReplica

# One seed of so many begins with the previous release.
EVERY = 8
# How many of those that were replaced are put back for a while.
PUT_BACK_SHARE = 0.25
# In which part of the time processes are replaced.
FROM, UNTIL = 0.1, 0.5
DOWN_S = (0.2, 5.0)


class Upgrade:
    def __init__(self, cluster: SimCluster, client: Client, rng: random.Random) -> None:
        self._cluster = cluster
        self._client = client
        self._rng = rng
        client.has_keys = False
        for each in self._all():
            each.is_previous = True

    async def run(self, duration_s: float) -> None:
        start_s = asyncio.get_running_loop().time()
        first_s, last_s = start_s + FROM * duration_s, start_s + UNTIL * duration_s
        turns: list[tuple[float, SimReplica | SimNode, bool]] = []
        for each in self._all():
            turns.append((self._rng.uniform(first_s, last_s), each, False))
            if self._rng.random() < PUT_BACK_SHARE:
                turns.append((self._rng.uniform(first_s, last_s), each, True))
        for time_s, each, is_previous in sorted(turns, key=lambda turn: turn[0]):
            await asyncio.sleep(max(0.0, time_s - asyncio.get_running_loop().time()))
            await self._replace(each, is_previous)
        await self.finish()

    async def finish(self) -> None:
        """Replace what is left, and finalize."""
        for each in self._all():
            if each.is_previous:
                await self._replace(each, False)
        await self._client.finalize_upgrade()
        self._client.has_keys = True

    async def _replace(self, each: SimReplica | SimNode, is_previous: bool) -> None:
        release = "the previous release" if is_previous else "the present release"
        self._cluster.trace.note(f"{each.name} gets {release}")
        each.is_previous = is_previous
        if isinstance(each, SimReplica):
            each.crash()
            await asyncio.sleep(self._rng.uniform(*DOWN_S))
            start_replica(each)
        else:
            each.crash_agent()
            await asyncio.sleep(self._rng.uniform(*DOWN_S))
            start_agent(each)

    def _all(self) -> list[SimReplica | SimNode]:
        return [*self._cluster.replicas.values(), *self._cluster.nodes.values()]
