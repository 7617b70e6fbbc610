"""A store on model etcd with a cluster in it, as the tests of backups and restores need it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager

from controlplane.backup.format import Entry, Frame, Key, Reading, Summary
from controlplane.backup.take import take
from controlplane.store import keys
from controlplane.store.history import History
from controlplane.store.port import Committed, Fence, Put
from shared.codec import pack
from shared.model import Applied, Cluster, HistoryEntry, Record
from tests.contract.store_worlds import World, model_world
from tests.unit.core_world import BORN, CELL, CoreWorld

CLUSTER = Cluster(id="cluster-1", cell=CELL, epoch=1, created_at=BORN)
WRITES_AT_ONCE = 100


class Live:
    """A cluster that a leader has written into etcd."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = world.store

    async def lead(self, core: CoreWorld, cluster: Cluster = CLUSTER) -> None:
        """Write all that a world in memory has, as its leader would have, and stop leading."""
        state = core.state
        records: list[Record] = [cluster]
        for table in (state.vms, state.nodes, state.operations, state.api_keys, state.idempotency):
            records += [stored.record for stored in table.values()]
        await self.write(records, state.history.values(), state.last_seq)

    async def write(
        self, records: Iterable[Record], history: Iterable[HistoryEntry], last_seq: int
    ) -> None:
        fence = await self.world.lead()
        puts = [Put(keys.record_key(record), pack(record)) for record in records]
        puts += [Put(keys.history_key(entry.seq), pack(entry)) for entry in history]
        mark = Put(keys.MARK, pack(Applied(group="group-1", seq=last_seq)))
        for start in range(0, len(puts), WRITES_AT_ONCE):
            done = await self.store.commit(fence, [mark, *puts[start : start + WRITES_AT_ONCE]])
            assert isinstance(done, Committed)
            fence = Fence(fence.leader_revision, done.revision)
        assert await self.store.resign(fence.leader_revision)

    async def found(self) -> dict[str, bytes]:
        return {item.key: item.value for item in (await self.store.list(keys.ROOT)).items}


@asynccontextmanager
async def live() -> AsyncIterator[Live]:
    async with model_world() as (world, _):
        yield Live(world)


async def taken(
    live: Live, history: History, cluster: Cluster = CLUSTER, release: str = "0.2.0"
) -> bytes:
    async with aclosing(take(live.store, history, cluster, release, BORN)) as pieces:
        return b"".join([piece async for piece in pieces])


def read(data: bytes) -> tuple[Summary, dict[str, bytes], list[bytes]]:
    """Return what a backup holds: its summary, etcd's keys, and history."""
    reading = Reading()
    frames: list[Frame] = list(reading.feed(data))
    found = {each.key.decode(): each.value for each in frames if isinstance(each, Key)}
    bodies = [each.body for each in frames if isinstance(each, Entry)]
    return reading.finished(), found, bodies
