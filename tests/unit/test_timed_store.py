"""The timed store: what it passes on is answered as it was, and timed also when it fails."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from controlplane.store.port import KeyValue, Store
from controlplane.store.timed import TimedStore
from shared.errors import StoreUnavailable
from tests.sim.virtual_loop import run_virtual

FOUND = KeyValue("/novacron/leader", b"r1", 3, 3)


class SlowStore:
    async def get(self, key: str, *, revision: int = 0) -> KeyValue:
        await asyncio.sleep(0.25)
        return FOUND

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        await asyncio.sleep(2)
        raise StoreUnavailable("no member answers")


def test_calls_are_timed_whatever_becomes_of_them() -> None:
    told: list[tuple[str, float]] = []
    slow = cast(Store, SlowStore())
    store = TimedStore(slow, lambda name, seconds: told.append((name, seconds)))

    async def main() -> None:
        assert await store.get("/novacron/leader") == FOUND
        with pytest.raises(StoreUnavailable):
            await store.compact(7)

    run_virtual(main())

    assert told == [("get", 0.25), ("compact", 2.0)]


def test_it_has_every_call_of_the_port() -> None:
    port = {name for name in vars(Store) if not name.startswith("_")}

    assert port <= set(vars(TimedStore))
