"""Compacts etcd's history of revisions, so that it stays small whatever its own settings are.

What is compacted is minutes old: watches that fell behind that far list again.
"""

from __future__ import annotations

import asyncio
from collections import deque

from controlplane.state import ClusterState
from controlplane.store.port import Store

# A rewritten record costs 2 kB until compaction: five minutes of 1,000 writes a second are 0.6 GB.
KEPT_S = 300.0


class CompactStore:
    name = "compaction"
    period_s = 60.0

    def __init__(self, store: Store, state: ClusterState) -> None:
        self._store = store
        self._state = state
        self._seen: deque[tuple[float, int]] = deque()
        self._compacted = 0

    async def reconcile(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._seen.append((now_s, self._state.revision))
        old = 0
        while self._seen and now_s - self._seen[0][0] >= KEPT_S:
            old = self._seen.popleft()[1]
        if old > self._compacted:
            await self._store.compact(old)
            self._compacted = old
