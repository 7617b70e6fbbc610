"""A replica's memory that follows a model etcd, and what is written there, for tests of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.informer import Informer
from controlplane.store.port import (
    Fence,
    KeyValue,
    Listing,
    Put,
    Store,
    WatchBatch,
    Write,
)
from shared.codec import pack
from shared.errors import StoreUnavailable
from shared.model import ApiKey, Cluster, Event, Replica
from tests.contract.store_worlds import ModelCluster, World, model_world
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN

# Longer than any heartbeat or back-off of the watch, in virtual seconds.
A_WHILE_S = 10.0
CLUSTER = Cluster(id="cluster-1", cell="abc123", epoch=1, created_at=BORN)
REPLICA = Replica(
    name="r1",
    incarnation="i",
    url="https://r1",
    agent_address="r1:8444",
    version="1",
    started_at=BORN,
)


def api_key(name: str, role: str = "admin") -> ApiKey:
    return ApiKey(id=name, sha256="", principal="p", role=role, created_at=BORN)


def put(name: str, role: str = "admin") -> Put:
    record = api_key(name, role)
    return Put(keys.record_key(record), pack(record))


def event(seq: int) -> Put:
    entry = Event(seq=seq, id=f"event-{seq}", kind="k", object="o", at=BORN, by="b")
    return Put(keys.history_key(seq), pack(entry))


async def nothing() -> None: ...


class GatedStore:
    """The store, whose listings a test can hold up after etcd has answered, or make fail."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.answers_pass = asyncio.Event()
        self.answers_pass.set()
        self.failures = 0
        self.listed: list[str] = []
        self.reads: list[str] = []
        self.before_read: Callable[[], Awaitable[None]] = nothing
        # Whether the watch leaves the next revision out without a word.
        self.loses: Callable[[], bool] = lambda: False

    async def list(
        self, prefix: str, *, revision_min: int = 0, keys_only: bool = False, changed_from: int = 0
    ) -> Listing:
        self.listed.append(prefix)
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("no member answers")
        listing = await self._store.list(
            prefix, revision_min=revision_min, keys_only=keys_only, changed_from=changed_from
        )
        await self.answers_pass.wait()
        return listing

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchBatch]:
        async for batch in self._store.watch(prefix, from_revision):
            if not self.loses():
                yield batch

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        self.reads.append(key)
        await self.before_read()
        return await self._store.get(key, revision=revision)

    @property
    def listings(self) -> int:
        """Return how often everything was listed."""
        return self.listed.count(keys.ROOT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Following:
    def __init__(self, world: World, cluster: ModelCluster, fence: Fence) -> None:
        self.world, self.cluster, self.fence = world, cluster, fence
        self.store = GatedStore(cast(Store, world.store))
        self.state = ClusterState()
        self.informer = Informer(cast(Store, self.store), self.state)
        self.running: asyncio.Future[None] | None = None

    async def start(self) -> None:
        ready = asyncio.Event()
        self.running = asyncio.ensure_future(self.informer.run(ready.set))
        await ready.wait()

    async def commit(self, *writes: Write) -> None:
        self.fence = await self.world.commit(self.fence, *writes)

    async def seen(self) -> Sequence[str]:
        await asyncio.sleep(A_WHILE_S)
        return sorted(self.state.api_keys)


@asynccontextmanager
async def following() -> AsyncIterator[Following]:
    async with model_world() as (world, cluster):
        made = Following(world, cluster, await world.lead())
        await made.commit(put("key-a"), event(1))
        await made.start()
        try:
            yield made
        finally:
            assert made.running is not None
            assert not made.running.done(), "nothing stops following"
            made.running.cancel()
            await asyncio.gather(made.running, return_exceptions=True)


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)
