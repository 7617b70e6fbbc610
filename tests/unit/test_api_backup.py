"""The route of a backup: sent as it is made, cut off when it fails, to few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from msgspec.structs import replace

from controlplane.api import endpoint
from controlplane.services.context import ROLES, Permission
from controlplane.store import keys
from controlplane.store.port import KeyValue, Listing, Store
from shared.codec import pack
from shared.errors import Compacted, StoreUnavailable
from tests.unit.api_world import World
from tests.unit.backed_up import read

PATH = "/api/v1/cluster/backup"


class Scanned:
    """A store of two pages; a test holds it up, or breaks it, between them."""

    def __init__(self, world: World) -> None:
        cluster = world.state.cluster()
        self.value = pack(cluster)
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.fails_before: Exception | None = None
        self.fails_after: Exception | None = None
        self.scans = 0
        self.begun = asyncio.Semaphore(0)

    async def scan(self, prefix: str) -> AsyncGenerator[Listing]:
        self.scans += 1
        self.begun.release()
        if self.fails_before is not None:
            raise self.fails_before
        yield Listing(7, (self._item(f"{keys.STATE}a", b"a"),), 1)
        await self.may_go_on.wait()
        if self.fails_after is not None:
            raise self.fails_after
        yield Listing(7, (self._item(keys.LEADER, b"leads"),), 1)
        yield Listing(7, (self._item(keys.CLUSTER, self.value),), 1)

    def _item(self, key: str, value: bytes) -> KeyValue:
        return KeyValue(key, value, 1, 1)


def with_store(world: World) -> Scanned:
    store = Scanned(world)
    world.context = replace(world.context, store=cast(Store, store))
    return store


async def test_a_backup_comes_whole() -> None:
    world = World()
    with_store(world)
    async with world.client() as client:
        answer = await client.get(PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    summary, found, _ = read(answer.content)
    assert sorted(found) == [f"{keys.STATE}a", keys.CLUSTER]
    assert summary.header.revision == 7


async def test_only_whoever_may_back_up_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    store = with_store(world)
    monkeypatch.setitem(ROLES, "admin", frozenset(Permission) - {Permission.CLUSTER_BACKUP})
    async with world.client() as client:
        assert (await client.get(PATH)).status_code == 403
    async with world.client(token=None) as client:
        assert (await client.get(PATH)).status_code == 401
    assert store.scans == 0


async def test_what_fails_before_it_begins_is_a_problem() -> None:
    world = World()
    with_store(world).fails_before = StoreUnavailable("etcd does not answer")
    async with world.client() as client:
        answer = await client.get(PATH)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")


async def test_what_fails_later_is_cut_off() -> None:
    world = World()
    with_store(world).fails_after = Compacted(9)
    async with world.client() as client:
        with pytest.raises(Compacted):  # as the network's end sees it: the connection is closed
            await client.get(PATH)


async def test_a_head_sends_no_backup() -> None:
    world = World()
    with_store(world)
    async with world.client() as client:
        answer = await client.head(PATH)
    assert (answer.status_code, answer.content) == (200, b"")


async def test_only_so_many_are_sent_at_a_time() -> None:
    world = World()
    store = with_store(world)
    store.may_go_on.clear()
    async with world.client() as client:
        sending = [asyncio.create_task(client.get(PATH)) for _ in range(endpoint.STREAMS_MAX)]
        for _ in sending:
            await store.begun.acquire()
        refused: Any = await client.get(PATH)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        store.may_go_on.set()
        for answer in await asyncio.gather(*sending):
            read(answer.content)
        assert (await client.get(PATH)).status_code == 200
