"""Etcd clusters as the store's contract tests need them: real or model, with the same handles."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast

from controlplane.store import keys
from controlplane.store.etcd_grpc import GrpcMember
from controlplane.store.etcd_members import Limits
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.etcd_rpc import DeleteOp, MemberRpc, Txn, prefix_end
from controlplane.store.model_etcd import ModelEtcd
from controlplane.store.model_member import ModelMember
from controlplane.store.port import Committed, Fence, Put, Write
from shared.errors import OutcomeUnknown, StoreUnavailable, WatchLost
from tests.contract.etcd_process import EtcdCluster

POLL_S = 0.02
# Generous, since a loaded machine may hold everything up; reached only by a failure.
CALL_S = 20.0


class Switches:
    """Faults of one model member, switched by a test."""

    def __init__(self) -> None:
        self.down = False
        self.running = asyncio.Event()
        self.running.set()
        self.lose_answers_of = ""
        self.stale_by = 0

    async def before(self, call: str) -> None:
        await self.running.wait()
        if self.down and call in ("receive", "send_progress_request"):
            raise WatchLost("the member is down")
        if self.down:
            raise StoreUnavailable("the member is down")

    async def after(self, call: str) -> None:
        if call == self.lose_answers_of:
            raise OutcomeUnknown("the answer was lost")

    def read_revision(self, revision: int) -> int:
        return max(revision - self.stale_by, 1)


class Breakable(Protocol):
    """What a test does to members, by index: SIGSTOP, SIGCONT, SIGKILL, and starting again."""

    def stop(self, index: int) -> None: ...

    def resume(self, index: int) -> None: ...

    def kill(self, index: int) -> None: ...

    def restart(self, index: int) -> None: ...


class ModelCluster:
    """A model's members with their switches; also what a test breaks them with."""

    def __init__(self, model: ModelEtcd, members: int) -> None:
        self.model = model
        self.switches = tuple(Switches() for _ in range(members))
        self.rpcs = tuple(
            ModelMember(model, index + 1, switches) for index, switches in enumerate(self.switches)
        )

    def stop(self, index: int) -> None:
        self.switches[index].running.clear()

    def resume(self, index: int) -> None:
        self.switches[index].running.set()

    def kill(self, index: int) -> None:
        self.switches[index].down = True

    def restart(self, index: int) -> None:
        self.switches[index].down = False


class Spied:
    """A member that notes each call, and runs a test's gate before it and its hook after it."""

    def __init__(self, rpc: MemberRpc, index: int) -> None:
        self._rpc = rpc
        self.index = index
        self.calls: list[str] = []
        self.gate: Callable[[str], Awaitable[None]] | None = None
        self.hook: Callable[[str], Awaitable[None]] | None = None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._rpc, name)
        if name in ("endpoint", "close"):
            return method

        async def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if self.gate is not None:
                await self.gate(name)
            result = await method(*arguments)
            if self.hook is not None:
                await self.hook(name)
            return result

        return call


class World:
    """One cluster, emptied, with a store on it."""

    def __init__(self, rpcs: Sequence[MemberRpc], broken: Breakable) -> None:
        self.rpcs = tuple(rpcs)
        self.spies = tuple(Spied(rpc, index) for index, rpc in enumerate(rpcs))
        self.broken = broken
        self.store = self.new_store()

    def new_store(self, limits: Limits | None = None, page_keys: int = 2_000) -> EtcdStore:
        spies = cast("Sequence[MemberRpc]", self.spies)
        # The seed is only for the jitter of retries.
        return EtcdStore(spies, random.Random(7), limits, page_keys)

    async def lead(self, ttl_s: int = 60) -> Fence:
        """Win the election; return the fence of the first commit."""
        lease = await self.store.grant_lease(ttl_s)
        campaign = await self.store.campaign(b"leader", lease)
        return Fence(campaign.leader.create_revision, 0)

    async def commit(self, fence: Fence, *writes: Write) -> Fence:
        """Commit with the mark; return the next fence."""
        done = await self.store.commit(fence, [Put(keys.MARK, b"mark"), *writes])
        assert isinstance(done, Committed)
        return Fence(fence.leader_revision, done.revision)


@asynccontextmanager
async def model_world(quota_bytes: int = 0) -> AsyncIterator[tuple[World, ModelCluster]]:
    model = ModelEtcd(quota_bytes=quota_bytes)
    cluster = ModelCluster(model, members=3)
    world = World(cluster.rpcs, cluster)
    try:
        yield world, cluster
    finally:
        await world.store.close()
        await model.close()


@asynccontextmanager
async def etcd_world(cluster: EtcdCluster) -> AsyncIterator[World]:
    world = World([GrpcMember(endpoint, None) for endpoint in cluster.endpoints], cluster)
    await world.rpcs[0].txn(Txn((), (DeleteOp(keys.ROOT, prefix_end(keys.ROOT)),)), CALL_S)
    try:
        yield world
    finally:
        await world.store.close()
