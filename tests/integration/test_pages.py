"""Walks through lists on a real etcd: on another replica, and over a restart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.replica_api import Api, until
from tests.integration.replica_process import ReplicaProcess
from tests.integration.world import World

pytestmark = pytest.mark.etcd

VMS = "/api/v1/vms"


async def page(api: Api, cursor: str | None = None) -> dict[str, Any]:
    query: dict[str, Any] = {"limit": "1"} if cursor is None else {"limit": "1", "cursor": cursor}
    answer = await api.send("GET", VMS, **query)
    found: dict[str, Any] = answer.json()
    return found


async def test_a_walk_goes_on_where_its_moment_is_known(world: World) -> None:
    with ReplicaProcess(world.cell, "r2", leads=False) as second:
        async with Api(second.api_url, world.cell, world.cell.token) as other:
            for name in ("a", "b", "c"):
                await world.api.create(name)
            first = await until(lambda: _first_of_a_moment_both_know(world.api, other), "a page")
            await world.api.delete("b")

            async def sees_the_change() -> bool:
                return bool(await _revision_of(other) != first["revision"])

            await until(sees_the_change, "the change on the follower")
            rest = await page(other, first["next_cursor"])
            assert [vm["name"] for vm in rest["items"]] == ["b"]
            assert rest["revision"] == first["revision"]
    world.replica.kill()
    world.replica.restart()
    gone = await page(world.api, first["next_cursor"])
    assert (gone["status"], gone["code"]) == (410, "cursor_expired")
    assert [vm["name"] for vm in (await page(world.api))["items"]] == ["a"]


async def _first_of_a_moment_both_know(api: Api, other: Api) -> dict[str, Any] | None:
    """Return a first page of a moment at which nothing was under way."""
    first = await page(api)
    revisions = {first["revision"], await _revision_of(other), await _revision_of(api)}
    return first if len(first["items"]) == len(revisions) == 1 else None


async def _revision_of(api: Api) -> str:
    answer = await api.send("GET", "/healthz")
    return str(answer.headers["x-novacron-revision"])
