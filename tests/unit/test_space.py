"""Room in the store: seen before it is gone, told everywhere, and made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

import pytest

from controlplane.store import keys
from controlplane.store.port import (
    Committed,
    Delete,
    Fence,
    MemberStatus,
    Put,
    Room,
    Store,
)
from controlplane.store.space import SCARCE_SHARE, StoreSpace
from shared.errors import StateConflict, StoreFull, StoreUnavailable
from shared.model import AuditRecord, Event
from tests.contract.store_worlds import ModelCluster, World, model_world
from tests.sim.virtual_loop import run_virtual
from tests.unit.api_world import World as ApiWorld
from tests.unit.api_world import new_vm
from tests.unit.cli_fake_api import Cli, FakeApi, problem
from tests.unit.cli_fixtures import api, cell, cli
from tests.unit.test_cli_views import CLUSTER

__all__ = ["api", "cell", "cli"]

QUOTA_BYTES = 10_000
REPAIR = "/api/v1/cluster/actions/repair-store"


class Looked:
    """A look at a model's room, and what was told of it."""

    def __init__(self, world: World, cluster: ModelCluster, fence: Fence) -> None:
        self.world, self.cluster, self.fence = world, cluster, fence
        self.told: tuple[bool, int, Mapping[str, tuple[int, int]]] | None = None
        self.space = StoreSpace(cast(Store, world.store), QUOTA_BYTES, self._tell)

    def _tell(self, *told: bool | int | Mapping[str, tuple[int, int]]) -> None:
        self.told = cast("tuple[bool, int, Mapping[str, tuple[int, int]]]", told)

    async def room(self) -> str:
        await self.space.reconcile()
        return self.space.room.value

    async def write(self, size_bytes: int, key: str = "a") -> None:
        writes = [Put(keys.MARK, b"mark"), Put(f"{keys.STATE}vms/{key}", bytes(size_bytes))]
        try:
            done = await self.world.store.commit(self.fence, writes)
        finally:
            mark = await self.world.store.get(keys.MARK)
            assert mark is not None
            self.fence = Fence(self.fence.leader_revision, mark.mod_revision)
        if not isinstance(done, Committed):
            raise StoreFull("what filled it up")

    async def fill_up(self) -> None:
        await self.refused(*["a"] * 20)

    async def refused(self, *names: str) -> None:
        """Write until one is refused for want of space."""
        for name in names:
            try:
                await self.write(QUOTA_BYTES // 10, name)
            except StoreFull:
                return
        raise AssertionError("there was room")


@asynccontextmanager
async def looked() -> AsyncIterator[Looked]:
    async with model_world(QUOTA_BYTES) as (world, cluster):
        yield Looked(world, cluster, await world.lead())


def test_room_is_scarce_before_it_is_gone() -> None:
    async def main() -> None:
        async with looked() as it:
            await it.write(100)
            assert await it.room() == "enough"
            await it.write(int(QUOTA_BYTES * SCARCE_SHARE))
            assert await it.room() == "scarce"
            assert "new VMs are refused" in it.space.detail
            await it.fill_up()
            assert await it.room() == "full"
            assert "repair-store" in it.space.detail
            assert it.told is not None
            full, quota, sizes = it.told
            assert (full, quota) == (True, QUOTA_BYTES)
            assert sorted(sizes) == ["model-1", "model-2", "model-3"]

    run_virtual(main())


def test_what_is_known_stays_known_while_no_member_answers() -> None:
    async def main() -> None:
        async with looked() as it:
            await it.fill_up()
            await it.space.reconcile()
            for index in range(3):
                it.cluster.kill(index)
            await it.space.reconcile()
            assert it.space.room is Room.FULL
            with pytest.raises(StoreUnavailable):
                await it.space.repair()

    run_virtual(main())


def test_a_repair_takes_one_member_after_the_other_and_the_leader_last() -> None:
    async def main() -> None:
        async with looked() as it:
            it.cluster.model.change_leader(1)
            await it.fill_up()
            order: list[int] = []

            for spy in it.world.spies:

                async def note(call: str, index: int = spy.index) -> None:
                    if call == "defragment":
                        order.append(index)

                spy.hook = note
            repaired = await it.space.repair()
            assert order == [1, 2, 0]
            assert repaired.before_bytes > repaired.after_bytes
            assert it.space.room is Room.ENOUGH
            await it.write(100)

    run_virtual(main())


class SlowMembers:
    """Two members: one compacts as it is asked to, the other a while after."""

    def __init__(self) -> None:
        self.in_use = {"m1": 9_000, "m2": 9_000}
        self.size = dict(self.in_use)
        self.looks_left = 3

    async def members(self) -> tuple[MemberStatus, ...]:
        self.looks_left -= 1
        if self.looks_left == 0:
            self.in_use["m2"] = 1_000
        return tuple(
            MemberStatus(
                endpoint=name,
                reachable=True,
                is_leader=name == "m1",
                db_size_bytes=self.size[name],
                db_in_use_bytes=self.in_use[name],
            )
            for name in self.in_use
        )

    async def compact(self, _: int, *, physical: bool) -> None:
        assert physical
        self.in_use["m1"] = 1_000

    async def defragment(self, endpoint: str) -> None:
        self.size[endpoint] = self.in_use[endpoint]

    async def disarm(self) -> None:
        pass


def test_a_repair_waits_until_every_member_has_freed_what_is_forgotten() -> None:
    """One that is defragmented before stays as large as it was, and fills up again first."""

    async def main() -> None:
        members = SlowMembers()
        space = StoreSpace(cast(Store, members), QUOTA_BYTES, lambda *told: None)
        repaired = await space.repair()
        assert (repaired.before_bytes, repaired.after_bytes) == (9_000, 1_000)

    run_virtual(main())


def test_a_repair_does_not_wait_for_ever_for_a_slow_member() -> None:
    async def main() -> None:
        members = SlowMembers()
        members.looks_left = -1
        space = StoreSpace(cast(Store, members), QUOTA_BYTES, lambda *told: None)
        assert (await space.repair()).after_bytes == 9_000

    run_virtual(main())


def test_a_member_that_is_away_is_skipped_and_named() -> None:
    async def main() -> None:
        async with looked() as it:
            await it.fill_up()
            it.cluster.kill(1)
            assert (await it.space.repair()).skipped == ("model-2",)

    run_virtual(main())


def test_what_is_still_there_fills_it_again() -> None:
    async def main() -> None:
        async with looked() as it:
            for number in range(8):
                await it.write(QUOTA_BYTES // 10, f"vm-{number}")
            await it.refused(*(f"vm-{number}" for number in range(8, 12)))
            await it.space.repair()
            await it.refused("vm-99")
            # Deletions alone are taken, and make the room that a repair gives back.
            gone = [Delete(f"{keys.STATE}vms/vm-{number}") for number in range(6)]
            assert isinstance(await it.world.store.commit(it.fence, gone), Committed)
            await it.space.repair()
            await it.write(QUOTA_BYTES // 10, "vm-99")

    run_virtual(main())


def test_two_repairs_at_once_are_one() -> None:
    async def main() -> None:
        async with looked() as it:
            await it.fill_up()
            first = asyncio.ensure_future(it.space.repair())
            await asyncio.sleep(0)
            with pytest.raises(StateConflict):
                await it.space.repair()
            await first
            await it.space.repair()

    run_virtual(main())


async def test_while_room_is_scarce_only_new_vms_are_refused() -> None:
    world = ApiWorld()
    world.space.room, world.space.detail = Room.SCARCE, "91% of it is in use"
    async with world.client() as client:
        for query in ("", "?dry_run=true"):
            refused = await client.post(f"/api/v1/vms{query}", json=new_vm("web"))
            assert (refused.status_code, refused.json()["code"]) == (507, "store_full")
            assert refused.json()["detail"] == "91% of it is in use"
        world.space.room = Room.ENOUGH
        assert (await client.post("/api/v1/vms", json=new_vm("web"))).status_code == 202
        world.space.room = Room.SCARCE
        assert (await client.post("/api/v1/vms/web/actions/stop")).status_code == 202
        assert (await client.delete("/api/v1/vms/web")).status_code == 202


async def test_a_full_store_is_told_and_makes_no_replica_unready() -> None:
    world = ApiWorld()
    world.space.room, world.space.detail = Room.FULL, "nothing more is taken"
    async with world.client() as client:
        ready = await client.get("/readyz")
        cluster = (await client.get("/api/v1/cluster")).json()
    assert ready.status_code == 200
    (check,) = (each for each in ready.json()["checks"] if each["name"] == "room")
    assert check == {
        "name": "room",
        "ok": False,
        "detail": "nothing more is taken",
        "needed": False,
    }
    assert cluster["store"] == {"room": "full", "detail": "nothing more is taken"}


async def test_a_repair_is_written_down() -> None:
    world = ApiWorld()
    world.space.room = Room.FULL
    async with world.client() as client:
        answer = await client.post(REPAIR)
    assert (answer.status_code, answer.json()["store"]["room"]) == (200, "enough")
    assert world.space.repairs == 1
    entries = list(world.state.history.values())
    (event,) = (e for e in entries if isinstance(e, Event) and e.kind == "cluster.store_repaired")
    assert event.data == {"before_bytes": 8192, "after_bytes": 4096, "skipped": []}
    assert [e.action for e in entries if isinstance(e, AuditRecord)] == ["cluster.repair_store"]


def test_the_command_repairs_and_status_tells(cli: Cli, api: FakeApi) -> None:
    told = {**CLUSTER, "store": {"room": "full", "detail": "the store is full: no change"}}
    api.on("GET", "cluster", told)
    api.on("POST", "cluster/actions/repair-store", CLUSTER, problem(507, "store_full", "too much"))

    assert cli.run("cluster", "status") == 0
    assert "the store is full: no change" in cli.stdout
    assert cli.run("cluster", "repair-store") == 0
    assert cli.stdout.splitlines() == [
        "127.0.0.1:2379: 1.5 MiB, 512 KiB in use",
        "127.0.0.1:2381: not connected",
    ]
    assert cli.run("cluster", "repair-store") == 1
    assert "too much" in cli.stderr
