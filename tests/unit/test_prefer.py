"""Prefer: wait=N on writes: the answer waits for the operation's end, and never for longer."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette

from controlplane.api.terms import preferred_wait_s
from controlplane.services.requests import WAIT_MAX_S
from tests.unit.api_world import World, new_vm

VMS = "/api/v1/vms"


@pytest.fixture
def world() -> World:
    world = World()
    world.join("n1")
    return world


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"wait=5", 5),
        (b"respond-async, wait=10", 10),
        (b'Wait = "7"; x=y, other', 7),
        (b"wait=100000", WAIT_MAX_S),
        (b"wait=0", 0),
        (b"wait=-1", None),
        (b"wait=1.5", None),
        (b"wait", None),
        (b"await=5", None),
        (b"", None),
        (None, None),
    ],
)
def test_what_is_preferred(header: bytes | None, expected: int | None) -> None:
    assert preferred_wait_s(header) == expected


async def test_the_answer_comes_with_the_end(world: World) -> None:
    (node_id,) = world.state.nodes
    async with world.client() as client:
        waiting = asyncio.create_task(
            client.post(VMS, json=new_vm(), headers={"Prefer": "wait=600"})
        )
        await world.state.changes.wait()
        assert not waiting.done()
        world.run(next(iter(world.state.vms)), node_id)
        answer = await waiting
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == f"wait={WAIT_MAX_S}"
    assert answer.headers["location"].endswith(answer.json()["id"])
    assert answer.headers["etag"].startswith('"ended-')


async def test_what_takes_longer_is_accepted(world: World) -> None:
    async with world.client() as client:
        for seconds in (0, 1):
            answer = await client.post(
                VMS, json=new_vm(f"vm{seconds}"), headers={"Prefer": f"wait={seconds}"}
            )
            assert (answer.status_code, answer.json()["state"]) == (202, "running")
            assert answer.headers["preference-applied"] == f"wait={seconds}"


async def test_what_has_ended_at_once_need_not_be_waited_for(world: World) -> None:
    async with world.client() as client:
        await client.post(VMS, json=new_vm())
        plain = await client.delete(f"{VMS}/web-1")
        assert "preference-applied" not in plain.headers
        await client.post(VMS, json=new_vm())
        gone = await client.delete(f"{VMS}/web-1", headers={"Prefer": "wait=60"})
    assert (plain.status_code, gone.status_code) == (202, 200)
    assert gone.json()["state"] == "succeeded"


async def test_a_replay_waits_too(world: World) -> None:
    (node_id,) = world.state.nodes
    headers = {"Idempotency-Key": "k", "Prefer": "wait=60"}
    async with world.client() as client:
        first = await client.post(VMS, json=new_vm(), headers={"Idempotency-Key": "k"})
        again = asyncio.create_task(client.post(VMS, json=new_vm(), headers=headers))
        await asyncio.sleep(0.01)
        world.run(first.json()["target"], node_id)
        answer = await again
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["idempotency-replayed"] == "true"


async def test_what_is_no_operation_has_nothing_to_wait_for(world: World) -> None:
    async with world.client() as client:
        answer = await client.post("/api/v1/nodes/n1/actions/cordon", headers={"Prefer": "wait=60"})
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


async def test_a_replica_that_stops_says_what_was_accepted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is made: an error would make the client send it again."""
    app: Starlette = world.app()
    monkeypatch.setattr(world, "app", lambda: app)
    async with world.client() as client:
        waiting = asyncio.create_task(
            client.post(VMS, json=new_vm(), headers={"Prefer": "wait=60"})
        )
        await world.state.changes.wait()
        app.state.streams.close()
        answer = await waiting
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
