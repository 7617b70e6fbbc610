"""What the API answers to good requests: shapes, statuses, headers."""

from __future__ import annotations

import json
import logging
from datetime import timedelta

import pytest

from controlplane.api import endpoint
from controlplane.api.access import SECURITY_HEADERS
from controlplane.services.context import Leadership
from shared.model import Sample
from tests.unit.api_world import World, new_vm


@pytest.fixture
def world() -> World:
    return World()


async def test_create_answers_with_an_operation_that_can_be_followed(world: World) -> None:
    node_id = world.join("n1")
    async with world.client() as client:
        created = await client.post("/api/v1/vms", json=new_vm())
        assert created.status_code == 202
        operation = created.json()
        assert operation["kind"] == "vm.create"
        assert operation["state"] == "running"
        assert operation["by"] == "admin"
        assert created.headers["location"] == f"/api/v1/operations/{operation['id']}"
        world.run(operation["target"], node_id)
        ended = (await client.get(created.headers["location"])).json()
        assert ended["state"] == "succeeded"
        assert [step["state"] for step in ended["steps"]] == ["done", "done", "done"]


async def test_vm_view(world: World) -> None:
    node_id = world.join("n1")
    async with world.client() as client:
        vm_id = (await client.post("/api/v1/vms", json=new_vm())).json()["target"]
        pending = (await client.get("/api/v1/vms/web-1")).json()
        assert pending["status"]["phase"] == "Pending"
        assert pending["status"]["node"] is None
        world.run(vm_id, node_id)
        running = (await client.get(f"/api/v1/vms/{vm_id}")).json()
    assert running["status"]["phase"] == "Running"
    assert running["status"]["node"] == node_id
    assert running["status"]["node_name"] == "n1"
    assert running["status"]["generation"] == 1
    assert running["spec"]["boot"]["kernel"] == "tiny-kernel"
    assert running["revision"] == f"1.{world.state.vms[vm_id].revision}"
    assert running["revision"] != pending["revision"]


async def test_node_view_counts_what_its_vms_take(world: World) -> None:
    node_id = world.join("n1")
    async with world.client() as client:
        vm_id = (await client.post("/api/v1/vms", json=new_vm(vcpus=2))).json()["target"]
        world.run(vm_id, node_id)
        node = (await client.get("/api/v1/nodes/n1")).json()
    assert node["state"] == "ready"
    assert node["inventory"]["cpus"] == 4
    assert node["allocated"]["vcpus"] == 2
    assert node["allocated"]["vms"] == 1
    assert node["allocated"]["memory_mib"] > 64  # QEMU's own counts too


async def test_actions_and_delete(world: World) -> None:
    node_id = world.join("n1")
    async with world.client() as client:
        vm_id = (await client.post("/api/v1/vms", json=new_vm())).json()["target"]
        world.run(vm_id, node_id)
        shutdown = await client.post("/api/v1/vms/web-1/actions/shutdown", json={"deadline_s": 5})
        assert shutdown.status_code == 202
        request = world.state.vms[vm_id].record.request
        assert request is not None
        assert request.deadline_s == 5
        deleted = await client.delete("/api/v1/vms/web-1")
        assert deleted.status_code == 202
        assert (await client.get("/api/v1/vms/web-1")).json()["status"]["phase"] == "Deleting"


async def test_cordon_and_uncordon(world: World) -> None:
    world.join("n1")
    async with world.client() as client:
        cordoned = await client.post("/api/v1/nodes/n1/actions/cordon", json={"reason": "fans"})
        assert cordoned.status_code == 200
        assert cordoned.json()["cordoned"] is True
        assert cordoned.json()["cordon_reason"] == "fans"
        opened = await client.post("/api/v1/nodes/n1/actions/uncordon")
        assert opened.json()["cordoned"] is False


async def test_plan_tells_each_nodes_reasons_and_changes_nothing(world: World) -> None:
    small = world.join("n1", cpus=1, memory_mib=600)
    large = world.join("n2")
    before = world.state.revision
    async with world.client() as client:
        answer = await client.post("/api/v1/placement-plans", json=new_vm(memory_mib=1024))
    plan = answer.json()
    assert plan["node"] == large
    assert plan["node_name"] == "n2"
    assert [c["node"] for c in plan["candidates"]] == [large, small]
    assert plan["candidates"][0]["scores"]["spread"] > 0
    assert plan["candidates"][1]["reasons"][0]["code"] == "insufficient_memory"
    assert plan["refusals"] == {"insufficient_memory": 1}
    assert world.state.revision == before


async def test_a_vm_larger_than_any_node_is_accepted_and_explained(world: World) -> None:
    world.join("n1")
    async with world.client() as client:
        created = await client.post("/api/v1/vms", json=new_vm(memory_mib=1024 * 1024))
        assert created.status_code == 202
        assert (await client.get("/api/v1/vms/web-1")).json()["status"]["phase"] == "Pending"
        placement = (await client.get("/api/v1/vms/web-1/placement")).json()
    assert placement["node"] is None
    assert placement["refusals"]["insufficient_memory"] == 1


async def test_placement_of_a_running_vm_does_not_count_it_twice(world: World) -> None:
    node_id = world.join("n1")
    async with world.client() as client:
        vm = await client.post("/api/v1/vms", json=new_vm(memory_mib=3000))
        world.run(vm.json()["target"], node_id)
        placement = (await client.get("/api/v1/vms/web-1/placement")).json()
    assert placement["node"] == node_id


async def test_console_log_is_asked_of_the_vms_node(world: World) -> None:
    node_id = world.join("n1")
    async with world.client() as client:
        vm_id = (await client.post("/api/v1/vms", json=new_vm())).json()["target"]
        early = await client.get("/api/v1/vms/web-1/console-log")
        assert early.json()["code"] == "state_conflict"
        world.run(vm_id, node_id)
        log = await client.get("/api/v1/vms/web-1/console-log?offset=-10&limit=100")
    assert log.content == world.console
    assert log.headers["content-type"].startswith("text/plain")
    (asked_node, query) = world.asked[0]
    assert asked_node == node_id
    assert (query.vm_id, query.offset, query.limit_bytes) == (vm_id, -10, 100)


async def test_metrics_of_one_and_of_all(world: World) -> None:
    node_id = world.join("n1")
    for step in range(3):
        world.windows.add(Sample(object=node_id, at=1000.0 + 5 * step, cpu_s_total=step))
    async with world.client() as client:
        series = (await client.get("/api/v1/nodes/n1/metrics")).json()
        usage = (await client.get("/api/v1/metrics?kind=node")).json()
    assert series["series"]["cpu_percent"] == [20.0, 20.0]
    assert len(series["at"]) == 2
    assert series["latest"]["cpu_percent"] == 20.0
    assert series["as_of"].startswith("1970-01-01T00:16:50")
    assert usage["items"][0]["object"] == node_id
    assert usage["items"][0]["name"] == "n1"
    assert usage["items"][0]["latest"]["cpu_percent"] == 20.0


async def test_metrics_of_an_object_not_heard_of(world: World) -> None:
    world.join("n1")
    async with world.client() as client:
        series = (await client.get("/api/v1/nodes/n1/metrics")).json()
        usage = (await client.get("/api/v1/metrics?kind=node")).json()
    assert (series["latest"], series["series"], series["as_of"]) == (None, {}, None)
    assert usage["items"][0]["latest"] is None


async def test_cluster_view(world: World) -> None:
    world.join("n1")
    async with world.client() as client:
        cluster = (await client.get("/api/v1/cluster")).json()
    assert cluster["cell"] == "abc123"
    assert cluster["leader"] == {
        "replica": "r1",
        "url": "https://127.0.0.1:8443",
        "term": "1.7",
        "since": "2026-11-01T12:00:00Z",
    }
    assert cluster["replicas"][0]["name"] == "r1"
    assert cluster["members"][0]["alarms"] == ["NOSPACE"]
    assert cluster["nodes"] == {"ready": 1, "silent": 0}
    assert cluster["vms"] == 0


async def test_health_and_readiness_need_no_token(world: World) -> None:
    async with world.client(token=None) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).json()["ready"] is True
        world.leadership = Leadership()
        unready = await client.get("/readyz")
    assert unready.status_code == 503
    assert [c["name"] for c in unready.json()["checks"] if not c["ok"]] == ["leader"]


async def test_prometheus_scrape_needs_a_token_and_counts_requests(world: World) -> None:
    world.join("n1")
    async with world.client() as client:
        await client.get("/api/v1/nodes/n1")
        scrape = await client.get("/metrics")
        assert 'novacron_node_ready{node="n1"' in scrape.text
        assert 'method="GET",route="/api/v1/nodes/{node}",status="200"' in scrape.text
    async with world.client(token=None) as client:
        assert (await client.get("/metrics")).status_code == 401


async def test_every_answer_carries_request_id_revision_and_security_headers(
    world: World,
) -> None:
    async with world.client() as client:
        found = await client.get("/api/v1/vms")
        missing = await client.get("/api/v1/nowhere")
    for answer in (found, missing):
        assert answer.headers["x-request-id"].startswith("req-")
        assert answer.headers["x-novacron-revision"] == found.json()["revision"]
        for name, value in SECURITY_HEADERS:
            assert answer.headers[name.decode()] == value.decode()
    assert found.headers["x-request-id"] != missing.headers["x-request-id"]
    assert missing.json()["request_id"] == missing.headers["x-request-id"]


async def test_head_is_get_without_a_body(world: World) -> None:
    async with world.client() as client:
        get = await client.get("/api/v1/vms")
        head = await client.head("/api/v1/vms")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_one_access_line_for_each_request(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "access"):
        async with world.client() as client:
            await client.get("/api/v1/vms/nobody?x=1")
            await client.get("/api/v1/%0A{forged}")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "access"]
    assert [line["status"] for line in lines] == [422, 404]
    assert lines[0]["route"] == "/api/v1/vms/{vm}"
    assert lines[0]["by"] == "admin"
    assert lines[1]["route"] == "unmatched"


async def test_a_read_waits_for_the_revision_that_its_client_has_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "CATCH_UP_S", 0.01)
    state = world.state
    async with world.client() as client:
        seen = {"X-Novacron-Min-Revision": f"1.{state.revision}.{state.last_seq}"}
        assert (await client.get("/api/v1/vms", headers=seen)).status_code == 200
        nonsense = {"X-Novacron-Min-Revision": "tomorrow"}
        assert (await client.get("/api/v1/vms", headers=nonsense)).status_code == 400
        ahead = {"X-Novacron-Min-Revision": f"1.{state.revision + 1}.0"}
        late = await client.get("/api/v1/vms", headers=ahead)
    assert (late.status_code, late.json()["code"]) == (503, "unavailable")
    assert late.headers["retry-after"]


async def test_a_replica_that_has_read_nothing_calls_no_token_wrong(world: World) -> None:
    for kind, record_id in list(world.state.record_ids()):
        world.state.remove(kind, record_id)
    async with world.client() as client:
        for answer in (await client.get("/api/v1/vms"), await client.delete("/api/v1/vms/web")):
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    async with world.client(token="nonsense") as client:
        assert (await client.get("/api/v1/vms")).status_code == 401


async def test_an_expired_key_stops_working(world: World) -> None:
    key = world.key(world.ids.new("key"), expires_at=world.clock.at + timedelta(minutes=1))
    world.state.put(key, 1)
    async with world.client(token=f"nck_{key.id}_{'s' * 52}") as client:
        assert (await client.get("/api/v1/vms")).status_code == 200
        world.clock.at += timedelta(minutes=2)
        assert (await client.get("/api/v1/vms")).json()["code"] == "unauthenticated"
