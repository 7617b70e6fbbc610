"""Dry runs: refused as the write would be, told as it would go, and nothing comes of them."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.services.context import ROLES, Principal, Scope
from controlplane.services.plans import plan_delete
from tests.unit.api_world import World, new_vm

VMS = "/api/v1/vms"
WEB = f"{VMS}/web-1"
DRY = "?dry_run=true"


class Watched(World):
    """A world that tells whether anything was submitted."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted = 0
        self.context = replace(self.context, submit=self.counted)

    async def counted(self, command: Any) -> Any:
        self.submitted += 1
        return self.apply(command)


@pytest.fixture
async def world() -> Watched:
    """A cell with a running web-1 and a db-1 that waits for a node."""
    world = Watched()
    node_id = world.join("n1")
    async with world.client() as client:
        made = await client.post(VMS, json=new_vm())
        world.run(made.json()["target"], node_id)
        await client.post(VMS, json=new_vm("db-1", memory_mib=1024 * 1024))
    world.submitted = 0
    return world


async def plan(world: Watched, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """Return the plan of a write, having checked that nothing came of asking."""
    before = (world.state.revision, world.state.last_seq, dict(world.state.vms))
    async with world.client() as client:
        answer = await client.request(
            method, path + DRY, json=body, headers={"Idempotency-Key": "k", "Prefer": "wait=60"}
        )
    assert answer.status_code == 200, answer.text
    assert (world.state.revision, world.state.last_seq, dict(world.state.vms)) == before
    assert (world.submitted, world.state.idempotency) == (0, {})
    assert not {"location", "preference-applied", "etag"} & set(answer.headers)
    found: dict[str, Any] = answer.json()
    assert found["revision"] == answer.headers["x-novacron-revision"]
    return found


async def test_a_create_says_where_the_vm_would_go(world: Watched) -> None:
    (node_id,) = world.state.nodes
    found = await plan(world, "POST", VMS, new_vm("web-2"))
    (vm,) = found["vms"]
    assert (found["kind"], found["blocked"]) == ("vm.create", 0)
    assert (vm["vm"], vm["vm_name"], vm["action"]) == (None, "web-2", "create")
    assert (vm["node"], vm["target"], vm["target_name"]) == (None, node_id, "n1")
    assert vm["reasons"] == []
    assert vm["placement"]["node"] == node_id
    assert vm["placement"]["candidates"][0]["fits"] is True


async def test_a_create_that_fits_nowhere_says_why(world: Watched) -> None:
    found = await plan(world, "POST", VMS, new_vm("huge", memory_mib=1024 * 1024))
    (vm,) = found["vms"]
    assert found["blocked"] == 1
    assert (vm["target"], vm["target_name"]) == (None, None)
    assert vm["reasons"] == [
        {"code": "unschedulable", "message": "no node can run it now: 1 insufficient_memory"}
    ]


async def test_what_stays_stopped_is_not_placed(world: Watched) -> None:
    (vm,) = (await plan(world, "POST", VMS, new_vm("web-2", power="stopped")))["vms"]
    assert (vm["target"], vm["placement"], vm["reasons"]) == (None, None, [])


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("POST", f"{WEB}/actions/stop", "stop"),
        ("POST", f"{WEB}/actions/shutdown", "shutdown"),
        ("DELETE", WEB, "delete"),
    ],
)
async def test_what_ends_says_where_it_is(
    world: Watched, method: str, path: str, action: str
) -> None:
    (node_id,) = world.state.nodes
    found = await plan(world, method, path)
    (vm,) = found["vms"]
    assert (found["kind"], found["blocked"]) == (f"vm.{action}", 0)
    assert (vm["vm"], vm["vm_name"]) == (world.state.vm_id_by_name("default", "web-1"), "web-1")
    assert (vm["action"], vm["node"], vm["node_name"]) == (action, node_id, "n1")
    assert (vm["target"], vm["reasons"], vm["placement"]) == (None, [], None)


async def test_a_start_goes_to_its_node_or_says_what_that_lacks(world: Watched) -> None:
    async with world.client() as client:
        await client.post(f"{VMS}/db-1/actions/stop")
        (await client.post(VMS, json=new_vm("web-2", power="stopped"))).raise_for_status()
    world.submitted = 0
    (vm,) = (await plan(world, "POST", f"{VMS}/web-2/actions/start"))["vms"]
    assert vm["target_name"] == "n1"
    found = await plan(world, "POST", f"{VMS}/db-1/actions/start")
    assert found["blocked"] == 1
    (node_id,) = world.state.nodes
    stored = world.state.vms[world.state.vm_id_by_name("default", "db-1") or ""]
    bound = replace(stored.record, status=replace(stored.record.status, node=node_id))
    world.state.put(bound, stored.revision + 1)
    (vm,) = (await plan(world, "POST", f"{VMS}/db-1/actions/start"))["vms"]
    assert vm["node"] == node_id
    assert [reason["code"] for reason in vm["reasons"]] == ["insufficient_memory"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", VMS, {"name": "Not<a>Name"}),
        ("POST", VMS, new_vm(boot={"kernel": "nowhere"})),
        ("POST", VMS, new_vm()),
        ("POST", f"{WEB}/actions/start", None),
        ("POST", f"{WEB}/actions/shutdown", {"deadline_s": -1}),
        ("POST", f"{VMS}/db-1/actions/shutdown", None),
        ("POST", f"{VMS}/nobody/actions/stop", None),
        ("DELETE", f"{VMS}/nobody", None),
        ("DELETE", WEB, {"force": True}),
    ],
)
async def test_it_is_refused_as_the_write_is(
    world: Watched, method: str, path: str, body: Any
) -> None:
    async with world.client() as client:
        rehearsed = await client.request(method, path + DRY, json=body)
        real = await client.request(method, path, json=body)
    assert rehearsed.status_code == real.status_code >= 400
    assert {**rehearsed.json(), "request_id": ""} == {**real.json(), "request_id": ""}


async def test_a_bad_key_is_refused_though_none_is_kept(world: Watched) -> None:
    async with world.client() as client:
        answer = await client.delete(WEB + DRY, headers={"Idempotency-Key": "two words"})
    assert answer.json()["errors"][0]["pointer"] == "/Idempotency-Key"


async def test_if_match_is_asked_too(world: Watched) -> None:
    async with world.client() as client:
        etag = (await client.get(WEB)).headers["etag"]
        assert (await client.delete(WEB + DRY, headers={"If-Match": etag})).status_code == 200
        stale = await client.delete(WEB + DRY, headers={"If-Match": '"1.1"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")


async def test_a_token_that_may_not_write_may_not_plan_either(world: Watched) -> None:
    world.state.put(world.key(world.ids.new("key"), role="nobody"), 1)
    (key_id,) = (k for k, s in world.state.api_keys.items() if s.record.role == "nobody")
    async with world.client(token=f"nck_{key_id}_{'s' * 52}") as client:
        assert (await client.delete(WEB + DRY)).status_code == 403


@pytest.mark.parametrize(
    ("query", "code"),
    [("dry_run=yes", "wrong_type"), ("dry_run=1", "wrong_type"), ("dryrun=true", "unknown_field")],
)
async def test_other_spellings_are_errors_and_change_nothing(
    world: Watched, query: str, code: str
) -> None:
    async with world.client() as client:
        answer = await client.delete(f"{WEB}?{query}")
        assert [fault["code"] for fault in answer.json()["errors"]] == [code]
        assert (await client.post(f"{WEB}/actions/pause{DRY}")).status_code == 422
        assert (await client.get(WEB)).json()["status"]["phase"] == "Running"
        assert (await client.delete(f"{WEB}?dry_run=false")).status_code == 202


async def test_a_use_case_plans_without_writing_whoever_calls_it(world: Watched) -> None:
    principal = Principal("p", ROLES["admin"], Scope())
    assert (await plan_delete(world.context, principal, "web-1")).blocked == 0
    assert world.submitted == 0
