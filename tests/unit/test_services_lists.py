"""Lists: pages, cursors, filters; operations and events across memory and SQLite."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from controlplane.commands.vms import CreateVm
from controlplane.services.context import ROLES, Permission
from controlplane.store.history import EntryFilter
from shared.model import BootSpec, HistoryEntry, VmSpec
from tests.unit.api_world import SYSTEM, World


@pytest.fixture
def world() -> World:
    return World()


def make_vms(world: World, count: int) -> list[str]:
    """Create VMs, the odd ones labelled; return their operations' ids, oldest first."""
    spec = VmSpec(vcpus=1, memory_mib=64, boot=BootSpec(kernel="k"))
    return [
        world.apply(
            CreateVm(
                name=f"vm{number}",
                tenant="default",
                labels={"odd": "yes"} if number % 2 else {},
                spec=spec,
                by=SYSTEM,
            )
        )
        for number in range(count)
    ]


async def walk(
    client: httpx2.AsyncClient, path: str, start: str | None = None
) -> list[dict[str, Any]]:
    """Return all items of a list, page by page, from a cursor on."""
    items: list[dict[str, Any]] = []
    cursor = "" if start is None else f"&cursor={start}"
    for _ in range(100):
        page = (await client.get(path + cursor)).raise_for_status().json()
        items += page["items"]
        if page["next_cursor"] is None:
            return items
        cursor = f"&cursor={page['next_cursor']}"
    raise AssertionError("the walk does not end")


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 500])
async def test_a_walk_returns_each_vm_once_in_order_of_age(world: World, limit: int) -> None:
    make_vms(world, 7)
    async with world.client() as client:
        items = await walk(client, f"/api/v1/vms?limit={limit}")
    assert [item["name"] for item in items] == [f"vm{n}" for n in range(7)]


async def test_filters(world: World) -> None:
    node_id = world.join("n1", artefacts=("k",))
    make_vms(world, 6)
    bound = world.state.vm_id_by_name("default", "vm3")
    assert bound is not None
    world.run(bound, node_id)

    async def names(query: str) -> list[str]:
        async with world.client() as client:
            return [item["name"] for item in await walk(client, f"/api/v1/vms?limit=2&{query}")]

    assert await names("label=odd%3Dyes") == ["vm1", "vm3", "vm5"]
    assert await names("label=odd%3Dyes&label=odd%3Dno") == []
    assert await names("node=n1") == ["vm3"]
    assert await names(f"node={node_id}") == ["vm3"]
    assert await names("phase=Running") == ["vm3"]
    assert await names("phase=Pending&label=odd%3Dyes") == ["vm1", "vm5"]
    assert await names("name=vm2") == ["vm2"]
    assert await names("name=nobody") == []


async def test_a_cursor_of_another_filter_is_refused(world: World) -> None:
    make_vms(world, 4)
    async with world.client() as client:
        page = (await client.get("/api/v1/vms?limit=1&label=odd%3Dyes")).json()
        for path in ("/api/v1/vms?limit=1", "/api/v1/operations?limit=1", "/api/v1/events?limit=1"):
            answer = await client.get(f"{path}&cursor={page['next_cursor']}")
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["pointer"] == "/cursor"


async def test_nodes_and_usage_are_paged(world: World) -> None:
    for number in range(5):
        world.join(f"n{number}")
    async with world.client() as client:
        nodes = await walk(client, "/api/v1/nodes?limit=2")
        usage = await walk(client, "/api/v1/metrics?kind=node&limit=2")
        assert len(await walk(client, "/api/v1/nodes?label=zone%3Da&limit=2")) == 5
        assert await walk(client, "/api/v1/nodes?label=zone%3Db") == []
    assert [item["name"] for item in nodes] == [f"n{n}" for n in range(5)]
    assert [item["name"] for item in usage] == [f"n{n}" for n in range(5)]


@pytest.mark.parametrize("trimmed", [False, True])
async def test_operations_open_and_finished_newest_first(world: World, trimmed: bool) -> None:
    world.join("n1", artefacts=("k",))
    operations = make_vms(world, 5)
    async with world.client() as client:
        for name in ("vm1", "vm3"):  # never placed: gone at once, their creation cancelled
            operations.append((await client.delete(f"/api/v1/vms/{name}")).json()["id"])
        if trimmed:
            await world.trim_history()
        every = await walk(client, "/api/v1/operations?limit=2")
        assert [item["id"] for item in every] == sorted(operations, reverse=True)
        cancelled = await walk(client, "/api/v1/operations?limit=1&state=cancelled")
        assert [item["id"] for item in cancelled] == [operations[3], operations[1]]
        target = world.state.vm_id_by_name("default", "vm2")
        for reference in ("vm2", target):
            items = await walk(client, f"/api/v1/operations?target={reference}")
            assert [item["id"] for item in items] == [operations[2]]
        finished = await client.get(f"/api/v1/operations/{operations[1]}")
        assert finished.json()["error"]["code"] == "superseded"


async def test_a_long_poll_answers_when_the_operation_ends(world: World) -> None:
    node_id = world.join("n1", artefacts=("k",))
    (operation_id,) = make_vms(world, 1)
    vm_id = world.state.operations[operation_id].record.target
    async with world.client() as client:
        waiting = asyncio.create_task(client.get(f"/api/v1/operations/{operation_id}?wait=60"))
        await asyncio.sleep(0)
        world.join("n2")  # a change that is none of the operation's
        await asyncio.sleep(0)
        assert not waiting.done()
        world.run(vm_id, node_id)
        assert (await waiting).json()["state"] == "succeeded"


async def test_a_long_poll_answers_with_what_is_when_its_time_is_over(world: World) -> None:
    (operation_id,) = make_vms(world, 1)
    async with world.client() as client:
        answer = await client.get(f"/api/v1/operations/{operation_id}?wait=1")
        assert answer.json()["state"] == "running"
        over = await client.get(f"/api/v1/operations/{operation_id}?wait=61")
        assert over.json()["errors"][0]["code"] == "too_large"


@pytest.mark.parametrize("copied", ["nothing", "half", "overlap", "all"])
@pytest.mark.parametrize("limit", [1, 3, 500])
async def test_events_are_without_gap_or_repeat(world: World, copied: str, limit: int) -> None:
    make_vms(world, 6)
    entries = [world.state.history[seq] for seq in sorted(world.state.history)]
    kept = {"nothing": 0, "half": len(entries) // 2, "overlap": len(entries) // 2}
    part = entries[: kept.get(copied, len(entries))]
    await world.history.append(part)
    trimmed = part if copied != "overlap" else part[: len(part) // 2]
    for entry in trimmed:
        world.state.remove_history(entry.seq)
    async with world.client() as client:
        events = await walk(client, f"/api/v1/events?limit={limit}")
        created = await walk(client, f"/api/v1/events?limit={limit}&kind=vm.created")
        for position, event in enumerate(events):
            after = await walk(client, f"/api/v1/events?limit={limit}&since={event['id']}")
            assert after == events[position + 1 :]
    expected = [entry.seq for entry in entries if type(entry).__name__ == "Event"]
    assert [event["seq"] for event in events] == expected
    assert [event["data"]["name"] for event in created] == [f"vm{n}" for n in range(6)]


@pytest.mark.parametrize("copied", ["nothing", "half", "overlap", "all"])
async def test_the_last_events_are_the_newest_oldest_first(world: World, copied: str) -> None:
    make_vms(world, 6)
    async with world.client() as client:
        for name in ("vm1", "vm3"):
            await client.delete(f"/api/v1/vms/{name}")
        vm2 = world.state.vm_id_by_name("default", "vm2")
        whole = {
            query: await walk(client, f"/api/v1/events?limit=3{query}")
            for query in ("", "&kind=vm.created", "&kind=vm.*", f"&object={vm2}&kind=vm.*")
        }
        entries = [world.state.history[seq] for seq in sorted(world.state.history)]
        await trim(world, "half" if copied == "overlap" else copied)
        if copied == "overlap":
            for entry in entries[len(entries) // 4 : len(entries) // 2]:
                world.state.put_history(entry)
        for query, every in whole.items():
            for last in (1, 2, 4, len(every), 500):
                answer = await client.get(f"/api/v1/events?last={last}{query}")
                page = answer.raise_for_status().json()
                assert page["items"] == every[-last:]
                assert page["next_cursor"] is None


async def test_who_follows_the_last_events_misses_none(world: World) -> None:
    make_vms(world, 3)
    async with world.client() as client:
        page = (await client.get("/api/v1/events?last=1&kind=vm.created")).json()
        await client.delete("/api/v1/vms/vm0")
        after = await walk(client, f"/api/v1/events?since={page['revision']}")
    assert [event["data"]["name"] for event in page["items"]] == ["vm2"]
    assert [event["kind"] for event in after] == ["vm.delete_requested", "vm.deleted"]


async def test_the_last_events_cost_no_look_at_what_is_not_returned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vms(world, 6)
    await trim(world, "half")
    asked: list[EntryFilter] = []
    entries = world.history.entries

    async def counted(wanted: EntryFilter) -> list[HistoryEntry]:
        asked.append(wanted)
        return await entries(wanted)

    monkeypatch.setattr(world.history, "entries", counted)
    async with world.client() as client:
        await client.get("/api/v1/events?last=2")
        assert asked == []
        await client.get("/api/v1/events?last=5")
    assert [(wanted.newest, wanted.limit < 5) for wanted in asked] == [(True, True)]


async def test_operations_that_have_not_ended_are_not_looked_for_in_sqlite(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_vms(world, 4)
    async with world.client() as client:
        await client.delete("/api/v1/vms/vm1")
        await world.trim_history()
        with monkeypatch.context() as without:
            without.setattr(world.history, "operations", None)
            path = "/api/v1/operations?limit=2&state=running"
            running = await walk(client, path)
            assert (await client.get("/api/v1/operations?state=pending")).json()["items"] == []
            migrations = "/api/v1/migrations?state=cancelling"
            assert (await client.get(migrations)).json()["next_cursor"] is None
        cancelled = await walk(client, "/api/v1/operations?state=cancelled")
    assert [item["id"] for item in running] == [made[3], made[2], made[0]]
    assert [item["id"] for item in cancelled] == [made[1]]


async def test_events_of_one_object_and_after_a_lists_revision(world: World) -> None:
    make_vms(world, 2)
    async with world.client() as client:
        revision = (await client.get("/api/v1/vms")).json()["revision"]
        await client.delete("/api/v1/vms/vm0")
        after = await walk(client, f"/api/v1/events?since={revision}")
        assert [event["kind"] for event in after] == ["vm.delete_requested", "vm.deleted"]
        of_one = await walk(client, "/api/v1/events?object=vm1")
        assert [event["kind"] for event in of_one] == ["vm.created"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/events?object=vm0&limit=1",
        "/api/v1/audit-records?object=vm0&limit=1",
        "/api/v1/operations?target=vm0&limit=1",
    ],
)
async def test_a_name_means_what_it_meant_when_the_walk_began(world: World, path: str) -> None:
    make_vms(world, 1)
    async with world.client() as client:
        await client.post("/api/v1/vms/vm0/actions/stop")
        every = await walk(client, path)
        first = (await client.get(path)).json()
        await client.delete("/api/v1/vms/vm0")
        make_vms(world, 1)
        rest = await walk(client, path, first["next_cursor"])
    assert [*first["items"], *rest] == every
    assert len(every) > 1


async def test_a_walk_goes_on_whatever_was_named(world: World) -> None:
    """Names that mean nothing any more are as long as names may be."""
    make_vms(world, 1)
    async with world.client() as client:
        await client.post("/api/v1/vms/vm0/actions/stop")
        for letter in ("n", "é", "🐧"):
            unknown = "".join(f"&object={f'{letter}{n}':{letter}<63}" for n in range(15))
            assert len(await walk(client, f"/api/v1/events?limit=1&object=vm0{unknown}")) > 1
            only = unknown.removeprefix("&")
            assert await walk(client, f"/api/v1/events?limit=1&{only}") == []


async def test_operations_are_found_by_the_name_of_a_node(world: World) -> None:
    world.join("n1")
    async with world.client() as client:
        drain = (await client.post("/api/v1/nodes/n1/actions/drain", json={})).json()
        (found,) = await walk(client, "/api/v1/operations?target=n1")
        assert found["id"] == drain["id"]


@pytest.mark.parametrize("copied", ["nothing", "half", "all"])
async def test_operations_of_some_kinds_across_memory_and_sqlite(world: World, copied: str) -> None:
    world.join("n1", artefacts=("k",))
    made = make_vms(world, 6)
    async with world.client() as client:
        gone = [(await client.delete(f"/api/v1/vms/vm{n}")).json()["id"] for n in range(5)]
        await trim(world, copied)
        deletes = await walk(client, "/api/v1/operations?limit=2&kind=vm.delete")
        every = await walk(client, "/api/v1/operations?limit=2&kind=vm.*")
        none = await walk(client, "/api/v1/operations?kind=node.*&kind=vm.start")
        of_one = f"/api/v1/operations?kind=vm.create&target={deletes[0]['target']}"
        assert [item["kind"] for item in await walk(client, of_one)] == ["vm.create"]
    assert [item["id"] for item in deletes] == sorted(gone, reverse=True)
    assert [item["id"] for item in every] == sorted([*made, *gone], reverse=True)
    assert none == []


@pytest.mark.parametrize("copied", ["nothing", "half", "all"])
@pytest.mark.parametrize("limit", [1, 3, 500])
async def test_audit_records_across_memory_and_sqlite(
    world: World, copied: str, limit: int
) -> None:
    make_vms(world, 4)
    async with world.client() as client:
        for name in ("vm1", "vm2"):
            await client.delete(f"/api/v1/vms/{name}")
        vm0 = world.state.vm_id_by_name("default", "vm0")
        await trim(world, copied)
        path = f"/api/v1/audit-records?limit={limit}"
        items = await walk(client, path)
        deletes = await walk(client, f"{path}&action=vm.delete")
        of_one = await walk(client, f"{path}&object=vm0&action=vm.*")
        after = await walk(client, f"{path}&since={items[3]['id']}")
    assert [item["action"] for item in items] == ["vm.create"] * 4 + ["vm.delete"] * 2
    assert [item["by"] for item in items] == ["system"] * 4 + ["admin"] * 2
    assert all(item["request_id"].startswith("req-") for item in items[4:])
    assert deletes == items[4:] == after
    assert [item["object"] for item in of_one] == [vm0]


async def test_audit_records_need_their_own_permission(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROLES, "admin", frozenset(Permission) - {Permission.AUDIT_READ})
    async with world.client() as client:
        assert (await client.get("/api/v1/audit-records")).status_code == 403


async def trim(world: World, copied: str) -> None:
    """Move a part of history from memory to SQLite."""
    entries = [world.state.history[seq] for seq in sorted(world.state.history)]
    part = entries[: {"nothing": 0, "half": len(entries) // 2}.get(copied, len(entries))]
    await world.history.append(part)
    for entry in part:
        world.state.remove_history(entry.seq)
