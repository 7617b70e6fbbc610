"""A backup holds all of etcd at one moment, and history up to then; and nothing of processes."""

from __future__ import annotations

from contextlib import aclosing

import pytest
from msgspec.structs import replace

from controlplane.backup.take import take
from controlplane.store import keys
from controlplane.store.history import PAGE_MAX, History
from controlplane.store.port import Fence, Put
from shared.codec import pack, unpack
from shared.errors import Unavailable
from shared.model import Event
from shared.offload import inline
from tests.unit.backed_up import CLUSTER, live, read, taken
from tests.unit.core_world import BORN, CELL, CoreWorld


def event(seq: int) -> Event:
    return Event(seq=seq, id=f"event-{seq}", kind="vm.running", object="vm-1", at=BORN, by="leader")


async def test_all_that_etcd_has_is_in_it_and_nothing_of_processes() -> None:
    core = CoreWorld()
    core.running()
    async with live() as it:
        await it.lead(core)
        fence = await it.world.lead()
        lease = await it.store.grant_lease(60)
        await it.store.register_replica("r1", b"registered", lease)
        summary, found, bodies = read(await taken(it, History(None, inline)))

        there = await it.found()
        assert there.keys() - found.keys() == {keys.LEADER, keys.replica_key("r1")}
        assert {key: there[key] for key in found} == found
        header = summary.header
        assert (header.cell, header.cluster, header.epoch) == (CELL, CLUSTER.id, 1)
        assert header.revision >= fence.leader_revision
        assert bodies == []


async def test_history_goes_in_as_far_as_etcd_had_come() -> None:
    core = CoreWorld()
    core.running()
    last = core.state.last_seq
    history = History(None, inline)
    await history.append([event(seq) for seq in range(1, PAGE_MAX + 20)])
    async with live() as it:
        await it.write([CLUSTER], [], PAGE_MAX + 7)
        _, _, bodies = read(await taken(it, history))
        seqs = [unpack(body, Event).seq for body in bodies]
        assert seqs == list(range(1, PAGE_MAX + 8))
        assert last < PAGE_MAX


async def test_what_is_written_meanwhile_is_not_in_it() -> None:
    core = CoreWorld()
    for number in range(30):
        core.create(f"web-{number}")
    async with live() as it:
        await it.lead(core)
        before = await it.found()
        store = it.world.new_store(page_keys=7)
        pieces: list[bytes] = []
        async with aclosing(take(store, History(None, inline), CLUSTER, "0.2.0", BORN)) as making:
            async for piece in making:
                pieces.append(piece)
                if len(pieces) == 1:
                    mark = await it.store.get(keys.MARK)
                    assert mark is not None
                    leader = await it.world.lead()
                    late = Put(f"{keys.STATE}vms/vm-zzz", b"late")
                    await it.store.commit(Fence(leader.leader_revision, mark.mod_revision), [late])
        _, found, _ = read(b"".join(pieces))
        assert found == before
        assert len(pieces) > 5


@pytest.mark.parametrize("known", [replace(CLUSTER, epoch=2), replace(CLUSTER, schema_level=1)])
async def test_a_replica_that_knows_another_cluster_makes_none(known: object) -> None:
    async with live() as it:
        await it.lead(CoreWorld())
        with pytest.raises(Unavailable):
            await taken(it, History(None, inline), known)  # type: ignore[arg-type]


async def test_an_empty_store_makes_none() -> None:
    async with live() as it:
        with pytest.raises(Unavailable):
            await taken(it, History(None, inline))
        fence = await it.world.lead()
        await it.store.commit(fence, [Put(keys.CLUSTER, pack(CLUSTER))])
        summary, _, _ = read(await taken(it, History(None, inline)))
        assert (summary.keys, summary.entries) == (1, 0)
