"""A queue of keys: each is in it at most once, and worked on by one worker at a time.

That is the lock of a VM: whoever has taken its key is the only one that acts on it. A key that is
added while it is worked on comes back afterwards. Bounded by the number of keys there are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Set
from contextlib import contextmanager


class WorkQueue:
    def __init__(self) -> None:
        self._waiting: deque[str] = deque()
        self._queued: set[str] = set()
        self._working: set[str] = set()
        self._again: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._available = asyncio.Event()
        self._observed: list[set[str]] = []
        self._awaited: list[tuple[set[str], asyncio.Event]] = []

    def add(self, key: str) -> None:
        if key in self._working:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._waiting.append(key)
            self._available.set()

    def add_after(self, key: str, delay_s: float) -> None:
        """Add a key later; of several delays the earliest counts."""
        loop = asyncio.get_running_loop()
        pending = self._timers.get(key)
        if pending is not None and pending.when() <= loop.time() + delay_s:
            return
        if pending is not None:
            pending.cancel()
        self._timers[key] = loop.call_later(delay_s, self._due, key)

    async def take(self) -> str:
        """Return the next key; nobody else gets it until ``done``."""
        while not self._waiting:
            self._available.clear()
            await self._available.wait()
        key = self._waiting.popleft()
        self._queued.discard(key)
        self._working.add(key)
        for touched in self._observed:
            touched.add(key)
        return key

    def done(self, key: str) -> None:
        self._working.discard(key)
        for left, ended in self._awaited:
            left.discard(key)
            if not left:
                ended.set()
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    async def finished(self) -> None:
        """Return once all that is worked on at this moment has been put down."""
        left, ended = set(self._working), asyncio.Event()
        if not left:
            return
        waiting = (left, ended)
        self._awaited.append(waiting)
        try:
            await ended.wait()
        finally:
            self._awaited = [other for other in self._awaited if other is not waiting]

    @contextmanager
    def touched(self) -> Iterator[Set[str]]:
        """Yield the keys that are worked on at any moment from here to the end of the block."""
        touched = set(self._working)
        self._observed.append(touched)
        try:
            yield touched
        finally:
            self._observed = [other for other in self._observed if other is not touched]

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _due(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)
