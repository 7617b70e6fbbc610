"""ETags: what has not changed is not sent again, and no change falls on what was not seen."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.api.stream import EventStreams
from controlplane.services import operations
from controlplane.services.context import Context
from controlplane.services.views import OperationView
from shared.errors import Unavailable
from shared.model import Operation
from tests.unit.api_world import World, new_vm

VMS = "/api/v1/vms"
WEB = f"{VMS}/web-1"
N1 = "/api/v1/nodes/n1"


@pytest.fixture
async def world() -> World:
    world = World()
    world.join("n1")
    async with world.client() as client:
        await client.post(VMS, json=new_vm())
    return world


async def test_a_vms_etag_is_its_revision(world: World) -> None:
    async with world.client() as client:
        answer = await client.get(WEB)
    assert answer.headers["etag"] == f'"{answer.json()["revision"]}"'


@pytest.mark.parametrize("reference", [WEB, N1, "operation"])
async def test_what_is_known_is_not_sent_again(world: World, reference: str) -> None:
    if reference == "operation":
        reference = f"/api/v1/operations/{next(iter(world.state.operations))}"
    async with world.client() as client:
        etag = (await client.get(reference)).headers["etag"]
        for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
            same = await client.get(reference, headers={"If-None-Match": known})
            assert (same.status_code, same.content) == (304, b"")
            assert same.headers["etag"] == etag
            assert "content-type" not in same.headers
        for unknown in ('"1.1"', "nonsense", etag.strip('"')):
            other = await client.get(reference, headers={"If-None-Match": unknown})
            assert other.status_code == 200


async def test_an_etag_moves_with_all_that_the_answer_holds(world: World) -> None:
    """A node's sums and an operation's steps are of the answer, not of the node's record."""
    (vm_id,), (node_id,) = world.state.vms, world.state.nodes
    (operation_id,) = world.state.operations
    paths = (N1, f"/api/v1/operations/{operation_id}", WEB)
    async with world.client() as client:
        before = [(await client.get(path)).headers["etag"] for path in paths]
        revision = world.state.nodes[node_id].revision
        world.run(vm_id, node_id)
        assert world.state.nodes[node_id].revision == revision
        after = [(await client.get(path)).headers["etag"] for path in paths]
        assert len({*before, *after}) == 6
        # The record is the same: what its VMs take is no reason to refuse.
        cordoned = await client.post(f"{N1}/actions/cordon", headers={"If-Match": before[0]})
    assert cordoned.status_code == 200
    assert cordoned.headers["etag"] not in (before[0], after[0])


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", WEB), ("PATCH", WEB), ("POST", f"{WEB}/actions/stop")],
)
async def test_a_change_falls_only_on_what_was_seen(world: World, method: str, path: str) -> None:
    async with world.client() as client:
        old = (await client.get(WEB)).headers["etag"]
        await client.patch(WEB, json={"labels": {"tier": "silver"}})
        before = world.state.revision
        body: Any = {"labels": {}} if method == "PATCH" else None
        for stale in (old, '"2.7"', '"x"', f"W/{(await client.get(WEB)).headers['etag']}"):
            late = await client.request(method, path, json=body, headers={"If-Match": stale})
            assert (late.status_code, late.json()["code"]) == (412, "precondition_failed")
        assert world.state.revision == before
        new = (await client.get(WEB)).headers["etag"]
        fitting = {"If-Match": f"{old}, {new}"}
        assert (await client.request(method, path, json=body, headers=fitting)).is_success


async def test_any_version_will_do_where_the_star_says_so(world: World) -> None:
    async with world.client() as client:
        assert (await client.delete(WEB, headers={"If-Match": "*"})).status_code == 202
        assert (await client.delete(WEB, headers={"If-Match": "*"})).status_code == 404
        made = await client.post(VMS, json=new_vm("web-2"), headers={"If-Match": "*"})
    assert (made.status_code, made.json()["code"]) == (412, "precondition_failed")


@pytest.mark.parametrize("header", ["1.7", '"1.7', "", '"a" "b"', ", ".join(['"1.7"'] * 33)])
async def test_what_is_no_etag_is_told(world: World, header: str) -> None:
    async with world.client() as client:
        answer = await client.delete(WEB, headers={"If-Match": header})
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"]) == ("/If-Match", "bad_format")


async def test_the_comparison_is_made_where_the_change_is(world: World) -> None:
    """Somebody changes the VM after the request was checked and before it is decided."""
    changed = False

    async def late(command: Any) -> Any:
        nonlocal changed
        if not changed:
            changed = True
            async with world.client() as other:
                await other.patch(WEB, json={"labels": {"tier": "silver"}})
        return world.apply(command)

    async with world.client() as client:
        etag = (await client.get(WEB)).headers["etag"]
    world.context = replace(world.context, submit=late)
    async with world.client() as client:
        answer = await client.delete(WEB, headers={"If-Match": etag})
    assert answer.status_code == 412
    assert not next(iter(world.state.vms.values())).record.deleting


async def test_a_change_that_was_made_is_not_held_against_its_own_repetition(
    world: World,
) -> None:
    async with world.client() as client:
        etag = (await client.get(WEB)).headers["etag"]
        headers = {"If-Match": etag, "Idempotency-Key": "k1"}
        first = await client.patch(WEB, json={"labels": {"tier": "silver"}}, headers=headers)
        again = await client.patch(WEB, json={"labels": {"tier": "silver"}}, headers=headers)
    assert first.status_code == again.status_code == 200
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["etag"] == first.headers["etag"] != etag


async def test_an_operation_that_has_ended_has_an_etag_too(world: World) -> None:
    (operation_id,) = world.state.operations
    async with world.client() as client:
        deleted = await client.delete(WEB)
        ended = await client.get(f"/api/v1/operations/{operation_id}")
    assert world.state.get(Operation, operation_id) is None
    assert deleted.headers["etag"] != ended.headers["etag"]
    assert ended.headers["etag"].startswith('"ended-')


async def test_an_etag_that_comes_in_several_lines_is_one_list(world: World) -> None:
    async with world.client() as client:
        etag = (await client.get(WEB)).headers["etag"]
        for lines in ((etag, '"9.9"'), ('"9.9"', etag)):
            headers = [("If-Match", line) for line in lines]
            answer = await client.patch(WEB, json={"labels": {}}, headers=headers)
            assert answer.status_code == 200
            etag = answer.headers["etag"]
            again = [("If-None-Match", line) for line in (etag, '"9.9"')]
            assert (await client.get(WEB, headers=again)).status_code == 304


async def test_the_etag_of_an_operation_is_of_what_is_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that comes right after the operation was read is not in its tag."""
    (operation_id,) = world.state.operations
    path = f"/api/v1/operations/{operation_id}"
    loop = asyncio.get_running_loop()
    show = operations.show_operation

    def commit() -> None:
        stored = world.state.operations[operation_id]
        world.state.put(replace(stored.record, phase="later"), world.state.revision + 1)

    def show_then_commit(context: Context, operation: Operation) -> OperationView:
        loop.call_soon(commit)
        return show(context, operation)

    async with world.client() as client:
        before = (await client.get(path)).headers["etag"]
        monkeypatch.setattr(operations, "show_operation", show_then_commit)
        seen = await client.get(path)
    assert seen.json()["phase"] == "place"
    assert seen.headers["etag"] == before
    assert world.state.operations[operation_id].record.phase == "later"


async def test_a_replica_that_stops_answers_with_what_was_accepted_and_its_own_etag(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stopping(streams: EventStreams, work: Coroutine[Any, Any, object]) -> object:
        waiting = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        waiting.cancel()
        for stored in list(world.state.operations.values()):
            later = replace(stored.record, phase="later")
            world.state.put(later, world.state.revision + 1)
        raise Unavailable("this replica stops: ask again")

    monkeypatch.setattr(EventStreams, "unless_closing", stopping)
    async with world.client() as client:
        accepted = await client.post(VMS, json=new_vm("web-2"), headers={"Prefer": "wait=1"})
        assert (accepted.status_code, accepted.json()["phase"]) == (202, "place")
        cancel = f"/api/v1/operations/{accepted.json()['id']}/actions/cancel"
        tag = {"If-Match": accepted.headers["etag"]}
        assert (await client.post(cancel, headers=tag)).status_code == 412
