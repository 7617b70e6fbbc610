"""Idempotency keys: one request is one change, however often it is sent, over any restart."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, cast

import pytest
from msgspec.structs import replace

from controlplane.commands import terms
from controlplane.commands.terms import FORGET_MAX, KEPT_FOR
from controlplane.commands.vms import CreateVm, DeleteVm
from controlplane.reconcilers.idempotency import ForgetOldKeys
from controlplane.state import ClusterState
from shared.errors import OutcomeUnknown
from shared.model import DEFAULT_TENANT, BootSpec, IdempotencyRecord, Power, VmSpec
from tests.unit.api_world import BORN, SYSTEM, World, new_vm

VMS = "/api/v1/vms"
KEY = {"Idempotency-Key": "8e03978e-40d5-43dd"}


@pytest.fixture
def world() -> World:
    world = World()
    world.join("n1")
    return world


async def test_a_create_sent_again_is_answered_with_the_same_operation(world: World) -> None:
    async with world.client() as client:
        first = await client.post(VMS, json=new_vm(), headers=KEY)
        again = await client.post(VMS, json=new_vm(), headers=KEY)
        other = await client.post(VMS, json=new_vm(), headers={"Idempotency-Key": "another"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert other.json()["code"] == "name_taken"
    assert len(world.state.vms) == 1


async def test_a_delete_sent_again_finds_what_it_became_though_the_vm_is_gone(
    world: World,
) -> None:
    async with world.client() as client:
        await client.post(VMS, json=new_vm())
        first = await client.delete(f"{VMS}/web-1", headers=KEY)
        assert world.state.vms == {}
        again = await client.delete(f"{VMS}/web-1", headers=KEY)
        assert (await client.delete(f"{VMS}/web-1")).status_code == 404
    assert again.json() == first.json()
    assert again.status_code == 202


async def test_a_node_is_what_it_is_now(world: World) -> None:
    path = "/api/v1/nodes/n1/actions/cordon"
    async with world.client() as client:
        first = await client.post(path, json={"reason": "fans"}, headers=KEY)
        again = await client.post(path, json={"reason": "fans"}, headers=KEY)
        assert (await client.post(path, json={"reason": "fans"})).status_code == 409
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", VMS, new_vm("web-2")),
        ("POST", f"{VMS}/web-1/actions/stop", None),
        ("DELETE", f"{VMS}/web-1", None),
    ],
)
async def test_a_key_is_of_one_request(world: World, method: str, path: str, body: Any) -> None:
    async with world.client() as client:
        await client.post(VMS, json=new_vm(), headers=KEY)
        before = world.state.revision
        answer = await client.request(method, path, json=body, headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert world.state.revision == before


async def test_a_key_is_of_one_principal(world: World) -> None:
    key = world.key(world.ids.new("key"), principal="somebody-else")
    world.state.put(key, 1)
    async with world.client() as client:
        first = await client.post(VMS, json=new_vm("a"), headers=KEY)
    async with world.client(token=f"nck_{key.id}_{'s' * 52}") as client:
        second = await client.post(VMS, json=new_vm("b"), headers=KEY)
    assert second.status_code == 202
    assert second.json()["id"] != first.json()["id"]


async def test_a_refused_request_keeps_no_key(world: World) -> None:
    async with world.client() as client:
        refused = await client.post(f"{VMS}/web-1/actions/stop", headers=KEY)
        assert refused.status_code == 404
        assert world.state.idempotency == {}
        await client.post(VMS, json=new_vm())
        assert (await client.post(f"{VMS}/web-1/actions/stop", headers=KEY)).status_code == 202


async def test_two_at_once_are_one(world: World) -> None:
    """The second passes the look at memory before the first is committed."""
    gate = asyncio.Event()

    async def slow(command: Any) -> Any:
        await gate.wait()
        return world.apply(command)

    world.context = replace(world.context, submit=slow)
    async with world.client() as client:
        both = [
            asyncio.ensure_future(client.post(VMS, json=new_vm(), headers=KEY)) for _ in range(2)
        ]
        await asyncio.sleep(0)
        gate.set()
        first, second = await asyncio.gather(*both)
    assert first.json() == second.json()
    assert [a.headers.get("idempotency-replayed") for a in (first, second)] == [None, "true"]
    assert len(world.state.vms) == 1


async def test_what_was_made_before_an_unknown_outcome_is_not_made_twice(world: World) -> None:
    async def unknown(command: Any) -> Any:
        world.apply(command)
        raise OutcomeUnknown("the replica stopped while the change was written")

    healthy = world.context
    world.context = replace(healthy, submit=unknown)
    async with world.client() as client:
        lost = await client.post(VMS, json=new_vm(), headers=KEY)
    assert (lost.status_code, lost.json()["code"]) == (503, "outcome_unknown")
    world.context = healthy
    async with world.client() as client:
        again = await client.post(VMS, json=new_vm(), headers=KEY)
    assert again.status_code == 202
    assert again.headers["idempotency-replayed"] == "true"
    assert len(world.state.vms) == 1


async def test_a_change_of_what_is_gone_since_is_not_called_a_change_of_nothing(
    world: World,
) -> None:
    patch = {"labels": {"tier": "silver"}}
    async with world.client() as client:
        await client.post(VMS, json=new_vm(power="stopped"))
        assert (await client.patch(f"{VMS}/web-1", json=patch, headers=KEY)).status_code == 200
        await client.delete(f"{VMS}/web-1")
        again = await client.patch(f"{VMS}/web-1", json=patch, headers=KEY)
        assert (again.status_code, again.json()["code"]) == (404, "deleted_since")
        # Another has the name by now; the key still stands for the first one.
        await client.post(VMS, json=new_vm(power="stopped"))
        again = await client.patch(f"{VMS}/web-1", json=patch, headers=KEY)
        assert (again.status_code, again.json()["code"]) == (404, "deleted_since")
        fresh = await client.patch(f"{VMS}/web-2", json=patch, headers={"Idempotency-Key": "new"})
        assert (fresh.status_code, fresh.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("has_successor", [False, True])
async def test_a_vm_that_is_deleted_right_after_its_change_was_changed(
    world: World, has_successor: bool
) -> None:
    """The leader commits both at once, or this follower sees both at once."""

    async def overtaken(command: Any) -> Any:
        decided = world.apply(command)
        world.apply(DeleteVm(vm_id=decided.result, by=SYSTEM))
        if has_successor:
            world.apply(create("web-1"))
        return decided

    world.apply(create("web-1"))
    world.context = replace(world.context, submit=overtaken)
    async with world.client() as client:
        answer = await client.patch(f"{VMS}/web-1", json={"labels": {"tier": "silver"}})
    assert (answer.status_code, answer.json()["code"]) == (404, "deleted_since")


def create(name: str) -> CreateVm:
    spec = VmSpec(vcpus=1, memory_mib=64, power=Power.STOPPED, boot=BootSpec(kernel="tiny-kernel"))
    return CreateVm(name=name, tenant=DEFAULT_TENANT, labels={}, spec=spec, by=SYSTEM)


@pytest.mark.parametrize(
    ("key", "code"), [("", "bad_format"), ("a" * 129, "too_long"), ("two words", "bad_format")]
)
async def test_keys_are_bounded(world: World, key: str, code: str) -> None:
    async with world.client() as client:
        answer = await client.post(VMS, json=new_vm(), headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"]) == ("/Idempotency-Key", code)
    assert world.state.vms == {}


async def test_past_the_bound_new_keys_are_refused_and_old_ones_hold(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms, "KEYS_MAX", 1)
    async with world.client() as client:
        await client.post(VMS, json=new_vm("a"), headers=KEY)
        full = await client.post(VMS, json=new_vm("b"), headers={"Idempotency-Key": "new"})
        assert (full.status_code, full.json()["code"]) == (503, "overloaded")
        again = await client.post(VMS, json=new_vm("a"), headers=KEY)
        assert again.headers["idempotency-replayed"] == "true"
        assert (await client.post(VMS, json=new_vm("b"))).status_code == 202


async def test_after_its_time_a_key_is_new_again(world: World) -> None:
    async with world.client() as client:
        first = await client.post(VMS, json=new_vm("a"), headers=KEY)
        world.clock.at += KEPT_FOR
        again = await client.post(VMS, json=new_vm("a"), headers=KEY)
    assert first.status_code == 202
    assert again.json()["code"] == "name_taken"


async def test_old_keys_are_forgotten_in_steps(world: World) -> None:
    for number in range(FORGET_MAX + 5):
        world.state.put(kept(number), 1)
    world.clock.at += KEPT_FOR
    young = replace(kept(10_000), created_at=world.clock.at)
    world.state.put(young, 2)
    sizes: list[int] = []

    class Steps:
        async def submit(self, command: terms.ForgetKeys) -> None:
            sizes.append(len(command.ids))
            world.apply(command)

    loop = ForgetOldKeys(cast(Any, Steps()), world.state, world.clock)
    await loop.reconcile()
    assert sizes == [FORGET_MAX, 5]
    assert list(world.state.idempotency) == [young.id]


def test_a_key_that_was_used_anew_meanwhile_is_not_forgotten(world: World) -> None:
    world.clock.at += KEPT_FOR + timedelta(hours=1)
    young = replace(kept(1), created_at=world.clock.at)
    world.state.put(young, 1)
    world.apply(terms.ForgetKeys(ids=(young.id, "gone")))
    assert list(world.state.idempotency) == [young.id]


def test_records_are_counted_with_those_of_the_draft() -> None:
    state = ClusterState()
    state.put(kept(1), 1)
    assert state.count(IdempotencyRecord) == 1


def kept(number: int) -> IdempotencyRecord:
    return IdempotencyRecord(
        id=f"{number:040x}", principal="p", fingerprint="f", result="op-1", created_at=BORN
    )
