"""Decides which fault comes when, and counts what it meets.

Every fault that is injected is noted with the phases of the operations that were open at that
moment: the coverage.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from tests.sim.aim import Aim
from tests.sim.cluster import SimCluster
from tests.sim.faults.kinds import ALL_PAIRS, FAULTS
from tests.sim.faults.scene import Scene
from tests.sim.ledger import Ledger

# (kind of fault, kind of operation and its phase)
Pair = tuple[str, str]
# How many faults come whenever they come; the others wait for an operation, and strike within it.
AT_REST_SHARE = 0.3
MOMENT_LIMIT_S = 10.0
MOMENT_LENGTH_S = 0.6
# An aim fails where no VM runs yet, or none can be moved: then it is taken a little later.
AIM_TRIES = 4
AIM_AGAIN_S = (1.0, 10.0)


class Faults:
    """``coverage`` counts which fault met which operation in which phase."""

    def __init__(
        self, cluster: SimCluster, ledger: Ledger, rng: random.Random, aim: Aim, seed: int
    ) -> None:
        self._scene = Scene(cluster, ledger, rng)
        self.happened = self._scene.happened
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
        # Each walk begins a seed later than the one before: it takes a multiple of eight seeds, and
        # of eight one begins with the release before, whose sagas are few. The same pairs would
        # always fall to those.
        walk = self._seed * len(aimed) // len(ALL_PAIRS)
        places = [(self._seed + walk) * len(aimed) + turn for turn in range(len(aimed))]
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
                under_way.create_task(fault(self._scene))

    async def _strike_at(
        self, place: int, spawn: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        """Inject a fault when a saga has come to a step; give up when none does."""
        walk, position = divmod(place, len(ALL_PAIRS))
        fault, target = ALL_PAIRS[position]
        self._scene.note(f"aim {fault.__name__} at {target.kind}:{target.phase}")
        for _ in range(AIM_TRIES):
            if await self._aim.at(target, spawn):
                await self._scene.last(0.0, MOMENT_LENGTH_S if walk % 2 else 0.0)
                self._note(fault.__name__)
                await fault(self._scene)
                return
            await self._scene.last(*AIM_AGAIN_S)

    async def _moment(self) -> None:
        """Mostly strike in the middle of an operation, when one comes soon."""
        if self._rng.random() < AT_REST_SHARE:
            return
        if await self._scene.until(lambda: bool(self._ledger.operations), MOMENT_LIMIT_S):
            await self._scene.last(0.0, MOMENT_LENGTH_S)

    def _note(self, kind: str) -> None:
        self._scene.note(f"fault {kind}")
        phases = {f"{each.kind}:{each.phase}" for each in self._ledger.operations.values()}
        for phase in sorted(phases) or ["at rest"]:
            self.coverage[kind, phase] += 1
