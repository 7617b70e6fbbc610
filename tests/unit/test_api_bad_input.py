"""What bad input gets: the exact problem with every fault, and nothing changed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.api.body import BODY_BYTES_MAX, ERRORS_MAX
from controlplane.commands.nodes import SetNodeState
from controlplane.services.context import Context
from shared.model import NodeState
from tests.unit.api_world import SPEC, SYSTEM, World, new_vm

VMS = "/api/v1/vms"


@pytest.fixture
def world() -> World:
    world = World()
    world.join("n1")
    return world


async def refused(
    world: World, path: str = VMS, *, method: str = "POST", **sent: Any
) -> dict[str, Any]:
    """Send a request that is refused; return the problem, having checked that nothing changed."""
    before = (world.state.revision, world.state.last_seq)
    async with world.client() as client:
        answer = await client.request(method, path, **sent)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (world.state.revision, world.state.last_seq) == before
    told: dict[str, Any] = answer.json()
    assert told["status"] == answer.status_code
    assert told["type"] == f"urn:novacron:problem:{told['code']}"
    assert told["request_id"] == answer.headers["x-request-id"]
    return told


def faults(told: dict[str, Any]) -> set[tuple[str, str]]:
    assert told["code"] == "validation"
    assert told["status"] == 422
    return {(error["pointer"], error["code"]) for error in told["errors"]}


async def test_every_fault_of_a_body_is_told_at_once(world: World) -> None:
    body = {
        "name": "Not<a>Name",
        "colour": "blue",
        "labels": {"Tier": "gold", "tier": 7},
        "spec": {
            "vcpus": -1,
            "memory_mib": 10**15,
            "boot": {"initrd": "../../etc/passwd", "cmdline": "a\nb"},
            "power": "unknown",
            "disks": [{"name": "a", "size_gib": "20"}, {"name": "b", "size_gib": 0, "path": "/x"}],
            "nics": [{"network": "lan", "mac": "no"}],
            "placement": {"anti_affinity": [{"group": "g", "topology": "galaxy"}]},
            "ha": None,
        },
    }
    assert faults(await refused(world, json=body)) == {
        ("/name", "bad_format"),
        ("/colour", "unknown_field"),
        ("/labels/Tier", "bad_format"),
        ("/labels/tier", "wrong_type"),
        ("/spec/vcpus", "too_small"),
        ("/spec/memory_mib", "too_large"),
        ("/spec/boot/kernel", "missing"),
        ("/spec/boot/initrd", "bad_format"),
        ("/spec/boot/cmdline", "bad_format"),
        ("/spec/power", "not_allowed"),
        ("/spec/disks/0/size_gib", "wrong_type"),
        ("/spec/disks/1/size_gib", "too_small"),
        ("/spec/disks/1/path", "unknown_field"),
        ("/spec/nics/0/mac", "bad_format"),
        ("/spec/placement/anti_affinity/0/topology", "not_allowed"),
        ("/spec/ha", "wrong_type"),
    }


@pytest.mark.parametrize(
    ("changes", "pointer", "code"),
    [
        ({"name": "web\n"}, "/name", "bad_format"),
        ({"name": "<script>"}, "/name", "bad_format"),
        ({"name": "../etc"}, "/name", "bad_format"),
        ({"name": ""}, "/name", "too_short"),
        ({"name": "a" * 64}, "/name", "too_long"),
        ({"name": "vm-" + "a" * 26}, "/name", "bad_format"),
        ({"name": None}, "/name", "wrong_type"),
        ({"labels": {f"l{n}": "" for n in range(33)}}, "/labels", "too_long"),
        ({"labels": {"a/b": "x"}}, "/labels/a~1b", "bad_format"),
        ({"spec": {**SPEC, "vcpus": 2.0}}, "/spec/vcpus", "wrong_type"),
        ({"spec": {**SPEC, "vcpus": True}}, "/spec/vcpus", "wrong_type"),
        ({"spec": {**SPEC, "vcpus": 10**18}}, "/spec/vcpus", "too_large"),
        ({"spec": [1]}, "/spec", "wrong_type"),
    ],
)
async def test_one_fault(world: World, changes: dict[str, Any], pointer: str, code: str) -> None:
    assert (pointer, code) in faults(await refused(world, json={**new_vm(), **changes}))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"boot": {"kernel": "nowhere", "initrd": "neither"}},
            {("/spec/boot/kernel", "not_found"), ("/spec/boot/initrd", "not_found")},
        ),
        (
            {
                "disks": [{"name": "root", "size_gib": 1, "pool": "gold"}] * 2,
                "nics": [{"network": "wan", "mac": "52:54:00:00:00:01"}] * 2,
            },
            {
                ("/spec/disks/0/pool", "not_found"),
                ("/spec/disks/1/pool", "not_found"),
                ("/spec/disks/1/name", "duplicate"),
                ("/spec/nics/0/network", "not_found"),
                ("/spec/nics/1/network", "not_found"),
                ("/spec/nics/1/mac", "duplicate"),
            },
        ),
        (
            {"placement": {"affinity": [{"group": "a"}], "anti_affinity": [{"group": "a"}]}},
            {("/spec/placement/anti_affinity/0/group", "duplicate")},
        ),
    ],
)
@pytest.mark.parametrize("path", [VMS, "/api/v1/placement-plans"])
async def test_faults_across_fields(
    world: World, path: str, spec: dict[str, Any], expected: set[tuple[str, str]]
) -> None:
    assert faults(await refused(world, path, json=new_vm(**spec))) == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"\xff",
        b'{"name": "\\ud800"}',
        b"[" * 200_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b"1" * 5000,
        b"1e999",
        b"NaN",
    ],
)
async def test_what_is_not_json_is_malformed(world: World, raw: bytes) -> None:
    told = await refused(world, content=raw)
    assert (told["status"], told["code"]) == (400, "malformed")


@pytest.mark.parametrize("raw", [b"[]", b"7", b'"x"', b"null", b"1" * 30])
async def test_json_of_another_kind_is_not_valid(world: World, raw: bytes) -> None:
    assert faults(await refused(world, content=raw)) == {("", "wrong_type")}


async def test_an_empty_body_misses_what_is_required(world: World) -> None:
    assert faults(await refused(world)) == {("/name", "missing"), ("/spec", "missing")}


async def test_bodies_are_bounded(world: World) -> None:
    told = await refused(world, content=b" " * (BODY_BYTES_MAX + 1))
    assert (told["status"], told["code"]) == (413, "payload_too_large")

    async def parts() -> Any:
        for _ in range(17):
            yield b" " * (BODY_BYTES_MAX // 16)

    assert (await refused(world, content=parts()))["status"] == 413
    many = {"name": "a", "spec": SPEC, "labels": {f"l{n}": "" for n in range(20_000)}}
    assert (await refused(world, json=many))["status"] == 413


async def test_the_list_of_faults_is_bounded(world: World) -> None:
    told = await refused(world, json={f"field{n}": 1 for n in range(1000)})
    assert len(told["errors"]) == ERRORS_MAX


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/api/v1/vms/web-1", {"force": True}),
        ("POST", "/api/v1/vms/web-1/actions/start", {"force": True}),
        ("POST", "/api/v1/vms/web-1/actions/shutdown", {"deadline_s": -1, "force": True}),
        ("POST", "/api/v1/nodes/n1/actions/cordon", {"force": True}),
    ],
)
async def test_no_body_ignores_what_it_does_not_know(
    world: World, method: str, path: str, body: dict[str, Any]
) -> None:
    told = await refused(world, path, method=method, json=body)
    assert ("/force", "unknown_field") in faults(told)


async def test_a_duplicate_name(world: World) -> None:
    async with world.client() as client:
        assert (await client.post(VMS, json=new_vm())).status_code == 202
    told = await refused(world, json=new_vm())
    assert (told["status"], told["code"]) == (409, "name_taken")


async def test_actions_that_do_not_fit_the_state(world: World) -> None:
    async with world.client() as client:
        await client.post(VMS, json=new_vm())
    for action in ("start", "pause", "resume", "reboot", "reset", "shutdown"):
        told = await refused(world, f"{VMS}/web-1/actions/{action}")
        assert (told["status"], told["code"]) == (409, "state_conflict")
    told = await refused(world, "/api/v1/nodes/n1/actions/uncordon")
    assert told["code"] == "state_conflict"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/vms/nobody"),
        ("DELETE", "/api/v1/vms/nobody"),
        ("POST", "/api/v1/vms/nobody/actions/start"),
        ("GET", "/api/v1/vms/nobody/console-log"),
        ("GET", "/api/v1/vms/nobody/placement"),
        ("GET", "/api/v1/vms/nobody/metrics"),
        ("GET", "/api/v1/vms?node=nobody"),
        ("GET", "/api/v1/nodes/nobody"),
        ("POST", "/api/v1/nodes/nobody/actions/cordon"),
        ("GET", "/api/v1/operations/nobody"),
        ("GET", "/api/v1/vms/a%2Fb"),
        ("GET", "/api/v1/vms/"),
        ("GET", "/nowhere"),
    ],
)
async def test_what_is_not_there(world: World, method: str, path: str) -> None:
    told = await refused(world, path, method=method)
    assert (told["status"], told["code"]) == (404, "not_found")


async def test_another_tenants_objects_are_not_there(world: World) -> None:
    async with world.client() as client:
        created = (await client.post(VMS, json=new_vm())).json()
    stored = world.state.vms[created["target"]]

    world.state.put(replace(stored.record, tenant="other"), stored.revision)
    for reference in (created["target"], "web-1"):
        assert (await refused(world, f"{VMS}/{reference}", method="GET"))["status"] == 404
    operation = world.state.operations[created["id"]]
    world.state.put(replace(operation.record, tenant="other"), operation.revision)
    told = await refused(world, f"/api/v1/operations/{created['id']}", method="GET")
    assert told["status"] == 404
    async with world.client() as client:
        assert (await client.get(VMS)).json()["items"] == []
        assert (await client.get("/api/v1/operations")).json()["items"] == []


async def test_wrong_methods(world: World) -> None:
    async with world.client() as client:
        answer = await client.put(VMS, json={})
    assert answer.status_code == 405
    assert answer.json()["code"] == "method_not_allowed"
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


@pytest.mark.parametrize(
    ("query", "pointer", "code"),
    [
        ("limit=0", "/limit", "too_small"),
        ("limit=501", "/limit", "too_large"),
        ("limit=x", "/limit", "wrong_type"),
        ("limit=" + "9" * 5000, "/limit", "wrong_type"),
        ("limit=1&limit=2", "/limit", "duplicate"),
        ("colour=blue", "/colour", "unknown_field"),
        ("phase=Unheard", "/phase", "not_allowed"),
        ("label=tier", "/label/0", "bad_format"),
        ("cursor=!", "/cursor", "bad_format"),
        ("cursor=AAAA", "/cursor", "bad_format"),
        ("cursor=", "/cursor", "bad_format"),
    ],
)
async def test_bad_query_parameters(world: World, query: str, pointer: str, code: str) -> None:
    told = await refused(world, f"{VMS}?{query}", method="GET")
    assert (pointer, code) in faults(told)


@pytest.mark.parametrize("query", ["%", "a=%ff", "&".join("a=1" for _ in range(100)), "x"])
async def test_query_strings_that_are_none(world: World, query: str) -> None:
    assert (await refused(world, f"{VMS}?{query}", method="GET"))["status"] in (400, 422)


@pytest.mark.parametrize("since", ["7", "1.7", "e2.1", "nonsense", "e1." + "9" * 30])
async def test_bad_starts_of_events(world: World, since: str) -> None:
    told = await refused(world, f"/api/v1/events?since={since}", method="GET")
    assert {pointer for pointer, _ in faults(told)} == {"/since"}


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("last=0", "too_small"),
        ("last=501", "too_large"),
        ("last=x", "wrong_type"),
        ("last=1&last=2", "duplicate"),
        ("last=5&since=e1.1", "not_allowed"),
        ("last=5&since=nonsense", "not_allowed"),
        ("last=5&cursor=AAAA", "not_allowed"),
    ],
)
async def test_bad_numbers_of_last_events(world: World, query: str, code: str) -> None:
    told = await refused(world, f"/api/v1/events?{query}", method="GET")
    assert told["status"] == 422
    assert faults(told) == {("/last", code)}


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Basic YWRtaW46YWRtaW4=",
        "Bearer",
        "Bearer nck_x",
        "Bearer nck_key-abc12300000000000000000000_" + "s" * 52,
        "Bearer {token}x",
        "Bearer \xff\xfe",
        "Bearer " + "a" * 10_000,
    ],
)
async def test_bad_tokens(world: World, header: str | None) -> None:
    headers = {}
    if header is not None:
        headers = {b"Authorization": header.replace("{token}", world.token).encode("latin-1")}
    async with world.client(token=None) as client:
        answer = await client.post(VMS, json=new_vm(), headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["code"] == "unauthenticated"
    assert "sss" not in answer.text
    assert not world.state.vms


async def test_a_token_without_the_permission(world: World) -> None:
    key = world.key(world.ids.new("key"), role="nobody")
    world.state.put(key, 1)
    async with world.client(token=f"nck_{key.id}_{'s' * 52}") as client:
        answer = await client.post(VMS, content=b"{")
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_a_silent_nodes_console_is_unavailable(world: World) -> None:

    node_id = world.state.node_id_by_name("n1")
    assert node_id is not None
    async with world.client() as client:
        world.run((await client.post(VMS, json=new_vm())).json()["target"], node_id)
    world.apply(SetNodeState(node_id=node_id, state=NodeState.SILENT, by=SYSTEM))
    told = await refused(world, f"{VMS}/web-1/console-log", method="GET")
    assert (told["status"], told["code"], told["retryable"]) == (503, "node_unreachable", True)


async def test_what_breaks_is_logged_once_and_tells_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> bytes:
        raise RuntimeError("a secret of ours")

    context: Context = replace(world.context, submit=broken)
    world.context = context
    with caplog.at_level(logging.ERROR):
        told = await refused(world, json=new_vm())
    assert (told["status"], told["code"]) == (500, "internal")
    assert "secret" not in str(told)
    assert [r.levelname for r in caplog.records if r.name != "access"] == ["ERROR"]
