"""The compaction loop: what is compacted is old, and never compacted twice."""

from __future__ import annotations

import asyncio

from controlplane.reconcilers.compaction import KEPT_S, CompactStore
from controlplane.state import ClusterState
from tests.sim.virtual_loop import run_virtual


class FakeStore:
    def __init__(self) -> None:
        self.compacted: list[int] = []

    async def compact(self, revision: int) -> None:
        self.compacted.append(revision)


def test_only_what_is_minutes_old_is_compacted() -> None:
    store, state = FakeStore(), ClusterState()
    loop = CompactStore(store, state)  # type: ignore[arg-type]

    async def main() -> None:
        for minute in range(10):
            state.advanced(100 + minute)
            await loop.reconcile()
            await asyncio.sleep(loop.period_s)

    run_virtual(main())

    kept_minutes = round(KEPT_S / loop.period_s)
    assert store.compacted == list(range(100, 100 + 10 - kept_minutes))


def test_a_quiet_cluster_is_compacted_once() -> None:
    store, state = FakeStore(), ClusterState()
    loop = CompactStore(store, state)  # type: ignore[arg-type]
    state.advanced(7)

    async def main() -> None:
        for _ in range(20):
            await loop.reconcile()
            await asyncio.sleep(loop.period_s)

    run_virtual(main())

    assert store.compacted == [7]
