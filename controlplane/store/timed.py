"""A store that says how long each call took, whether it succeeded or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from controlplane.store.port import (
    Campaign,
    Committed,
    Fence,
    KeyValue,
    Listing,
    MemberStatus,
    NotCommitted,
    Store,
    WatchBatch,
    Write,
)

T = TypeVar("T")

# Told of the call's name and its seconds.
Observe = Callable[[str, float], None]


class TimedStore:
    """Passes everything on; a watch has no end that could be timed, a scan its reader's pace."""

    def __init__(self, store: Store, observe: Observe) -> None:
        self._store = store
        self._observe = observe

    async def list(
        self, prefix: str, *, revision_min: int = 0, keys_only: bool = False, changed_from: int = 0
    ) -> Listing:
        listing = self._store.list(
            prefix, revision_min=revision_min, keys_only=keys_only, changed_from=changed_from
        )
        return await self._timed("list", listing)

    def scan(self, prefix: str) -> AsyncGenerator[Listing]:
        return self._store.scan(prefix)

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        return await self._timed("get", self._store.get(key, revision=revision))

    async def commit(self, fence: Fence, writes: Sequence[Write]) -> Committed | NotCommitted:
        return await self._timed("commit", self._store.commit(fence, writes))

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchBatch]:
        return self._store.watch(prefix, from_revision)

    async def campaign(self, value: bytes, lease: int) -> Campaign:
        return await self._timed("campaign", self._store.campaign(value, lease))

    async def resign(self, leader_revision: int) -> bool:
        return await self._timed("resign", self._store.resign(leader_revision))

    async def grant_lease(self, ttl_s: int) -> int:
        return await self._timed("grant_lease", self._store.grant_lease(ttl_s))

    async def renew_lease(self, lease: int) -> float:
        return await self._timed("renew_lease", self._store.renew_lease(lease))

    async def revoke_lease(self, lease: int) -> None:
        await self._timed("revoke_lease", self._store.revoke_lease(lease))

    async def register_replica(self, name: str, value: bytes, lease: int) -> None:
        registering = self._store.register_replica(name, value, lease)
        await self._timed("register_replica", registering)

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        await self._timed("compact", self._store.compact(revision, physical=physical))

    async def defragment(self, endpoint: str) -> None:
        await self._timed("defragment", self._store.defragment(endpoint))

    async def disarm(self) -> None:
        await self._timed("disarm", self._store.disarm())

    async def members(self) -> tuple[MemberStatus, ...]:
        return await self._timed("members", self._store.members())

    async def close(self) -> None:
        await self._store.close()

    async def _timed(self, name: str, call: Awaitable[T]) -> T:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            return await call
        finally:
            self._observe(name, loop.time() - began_s)
