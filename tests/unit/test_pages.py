"""Cursors: all pages of a walk show one moment, or say that it is no longer known."""

from __future__ import annotations

import base64
from typing import Any

import httpx2
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import past
from controlplane.past import Past
from controlplane.state import ClusterState
from shared.codec import pack
from shared.model import ApiKey, Cluster, Vm
from tests.unit.api_world import BORN, World, new_vm

VMS = "/api/v1/vms"
LISTS = (VMS, "/api/v1/nodes", "/api/v1/operations", "/api/v1/metrics?kind=vm", "/api/v1/events")


@pytest.fixture
async def world() -> World:
    """A cell with two nodes and six VMs, the even ones running on n1."""
    world = World()
    node_id = world.join("n1")
    world.join("n2")
    async with world.client() as client:
        for number in range(6):
            made = await client.post(VMS, json=new_vm(f"vm{number}"))
            if number % 2 == 0:
                world.run(made.json()["target"], node_id)
    return world


async def disturb(world: World, client: httpx2.AsyncClient) -> None:
    """Change, delete and create objects of every kind, before and behind where a walk stands."""
    for path in (f"{VMS}/vm1", f"{VMS}/vm5"):
        assert (await client.delete(path)).is_success
    for path in (f"{VMS}/vm0/actions/stop", f"{VMS}/vm4/actions/stop"):
        assert (await client.post(path)).is_success
    assert (await client.post(VMS, json=new_vm("vm5"))).is_success
    assert (await client.patch(f"{VMS}/vm3", json={"labels": {"tier": "silver"}})).is_success
    world.join("n3")


async def page(client: httpx2.AsyncClient, path: str, cursor: str | None) -> dict[str, Any]:
    query = "limit=1" if cursor is None else f"limit=1&cursor={cursor}"
    answer = await client.get(f"{path}{'&' if '?' in path else '?'}{query}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def walk(world: World, path: str, *, disturbed: bool) -> list[dict[str, Any]]:
    pages: list[dict[str, Any]] = []
    cursor: str | None = None
    async with world.client() as client:
        while True:
            pages.append(await page(client, path, cursor))
            cursor = pages[-1]["next_cursor"]
            if cursor is None:
                break
            if disturbed and len(pages) == 1:
                await disturb(world, client)
    assert len({each["revision"] for each in pages}) == 1
    return [item for each in pages for item in each["items"]]


@pytest.mark.parametrize(
    "path",
    [
        *LISTS,
        f"{VMS}?node=n1",
        f"{VMS}?phase=Running",
        f"{VMS}?phase=Pending",
        f"{VMS}?label=tier%3Dgold",
        f"{VMS}?name=vm5",
        "/api/v1/operations?state=running",
        "/api/v1/operations?state=succeeded",
        "/api/v1/metrics?kind=node",
        "/api/v1/events?kind=vm.created",
    ],
)
@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_walk_shows_what_was_when_it_began(world: World, path: str, trimmed: bool) -> None:
    if trimmed:
        await world.trim_history()
    undisturbed = await walk(world, path, disturbed=False)
    disturbed = await walk(world, path, disturbed=True)
    for item in (*undisturbed, *disturbed):
        item.pop("allocated", None)  # what a node's VMs take is told as of now
    assert disturbed == undisturbed
    assert disturbed


async def test_events_that_come_during_a_walk_come_after_its_revision(world: World) -> None:
    async with world.client() as client:
        first = await page(client, "/api/v1/events", None)
        await disturb(world, client)
        after = (await client.get(f"/api/v1/events?since={first['revision']}")).json()["items"]
    walked = await walk(world, "/api/v1/events", disturbed=False)
    assert [event["seq"] for event in after] == sorted(event["seq"] for event in after)
    assert after[0]["kind"] == "vm.delete_requested"
    assert len(walked) > len(after)


async def test_what_was_deleted_meanwhile_is_listed_and_not_found(world: World) -> None:
    async with world.client() as client:
        first = await page(client, VMS, None)
        await client.delete(f"{VMS}/vm1")
        second = await page(client, VMS, first["next_cursor"])
        assert second["items"][0]["name"] == "vm1"
        assert (await client.get(f"{VMS}/vm1")).status_code == 404


@pytest.mark.parametrize("path", LISTS[:4])
async def test_a_moment_that_is_forgotten_is_gone(
    world: World, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "CHANGES_MAX", 3)
    async with world.client() as client:
        first = await page(client, path, None)
        await disturb(world, client)
        mark = "&" if "?" in path else "?"
        answer = await client.get(f"{path}{mark}limit=1&cursor={first['next_cursor']}")
    assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")


async def test_cursors_of_other_times_are_gone(world: World) -> None:
    async with world.client() as client:
        cursor = (await page(client, VMS, None))["next_cursor"]
        answer = await client.get(f"{VMS}?limit=1&cursor={of_release_0_1(cursor)}")
        assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")
        (cluster,) = world.state.clusters.values()
        record = cluster.record
        restored = Cluster(id=record.id, cell=record.cell, epoch=2, created_at=BORN)
        world.state.put(restored, cluster.revision)
        answer = await client.get(f"{VMS}?limit=1&cursor={cursor}")
        assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")


async def test_a_replica_that_is_behind_the_walk_says_so(world: World) -> None:
    async with world.client() as client:
        ahead = World()
        ahead.join("n1")
        ahead.state.advanced(10_000)
        async with ahead.client() as other:
            for name in ("a", "b"):
                await other.post(VMS, json=new_vm(name))
            cursor = (await page(other, VMS, None))["next_cursor"]
        answer = await client.get(f"{VMS}?limit=1&cursor={cursor}")
    assert (answer.status_code, answer.json()["retryable"]) == (503, True)


def of_release_0_1(cursor: str) -> str:
    """Return a cursor as the release before wrote it: without a moment."""
    last, fingerprint, *_ = msgspec.msgpack.decode(base64.urlsafe_b64decode(cursor + "=="))
    return base64.urlsafe_b64encode(pack([last, fingerprint])).rstrip(b"=").decode()


# The past itself.

changes = st.lists(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, 1, 2, 3])), max_size=4),
    max_size=12,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(groups=changes, bound=st.integers(1, 8), turns=st.sets(st.integers(2, 13), max_size=3))
def test_the_past_is_right_or_silent(
    groups: list[list[tuple[str, int | None]]], bound: int, turns: set[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past, "CHANGES_MAX", bound)
        kept: Past[int] = Past()
        now: dict[str, int] = {}
        seen: dict[int, dict[str, int]] = {}
        kept.seal(0, 1)
        seen[1] = {}
        for revision, group in enumerate(groups, start=2):
            for name, value in group:
                kept.note(str, name, now.get(name))
                if value is None:
                    now.pop(name, None)
                else:
                    now[name] = value
            kept.seal(revision - 1, revision)
            seen[revision] = dict(now)
            if revision in turns:
                kept.turn(revision)
    for revision, expected in seen.items():
        before = kept.since(str, revision)
        if before is None:
            continue
        then = {**now, **{k: v for k, v in before.items() if v is not None}}
        for name in (k for k, v in before.items() if v is None):
            then.pop(name, None)
        assert then == expected
    assert kept.since(str, len(groups) + 1) == {}


def test_a_moment_within_changes_that_came_as_one_is_not_told() -> None:
    kept: Past[int] = Past()
    kept.seal(0, 5)
    kept.note(str, "a", 1)
    kept.seal(5, 9)
    assert kept.since(str, 5) == {"a": 1}
    assert kept.since(str, 7) is None
    assert kept.since(str, 9) == kept.since(str, 12) == {}
    assert kept.since(int, 5) == {}
    assert kept.since(str, 4) is None


def test_what_did_not_change_is_not_kept() -> None:
    """A fresh listing puts every record again."""
    world = World()
    node_id = world.join("n1")
    revision = world.state.revision
    stored = world.state.nodes[node_id]
    world.state.put(stored.record, stored.revision)
    world.state.put(ApiKey(id="k", sha256="", principal="p", role="r", created_at=BORN), 99)
    world.state.advanced(99)
    assert world.state.past.since(type(stored.record), revision) == {}


def test_nothing_is_known_of_before_the_first_listing() -> None:
    state = ClusterState()
    state.advanced(40)
    assert state.then(Vm, 39) is None
    assert state.then(Vm, 40) is not None
