"""Blocking work as a port: a thread pool in production, a plain call in the simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Offload(Protocol):
    async def __call__(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, without holding up the event loop."""
        ...


class ThreadOffload:
    """Runs work in threads of its own; with one thread, in order."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)

    async def __call__(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


async def inline(work: Callable[[], T]) -> T:
    """Call ``work`` here and now: for work that is quick, or under a virtual clock."""
    return work()
