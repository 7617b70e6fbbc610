"""A VM's life through the real fronts: HTTPS on one side, gRPC with mTLS on the other."""

from __future__ import annotations

from functools import partial

import pytest

from controlplane.services.views import SeriesView
from shared.model import NodeState, VmPhase
from tests.integration.replica_api import until
from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import World, new_world

pytestmark = pytest.mark.etcd


async def test_a_vm_lives_as_it_is_told(world: World) -> None:
    api = world.api
    async with world.agent(WitnessNode("n1")) as agent:
        operation = await api.done(await api.create("web"))
        assert [step.name for step in operation.steps] == ["place", "permit", "run"]
        web = await api.vm("web")
        assert (web.status.phase, web.status.node) == (VmPhase.RUNNING, agent.node_id)
        await until(lambda: _console_says(world, b"count"), "a guest that has booted")
        for action, phase in (
            ("pause", VmPhase.PAUSED),
            ("resume", VmPhase.RUNNING),
            ("reboot", VmPhase.RUNNING),
        ):
            await api.done(await api.act("web", action))
            await world.vm_is("web", phase)
        await until(lambda: _console_says(world, b"boot", times=2), "a second boot")
        assert world.starts_and_ends(web.id) == (1, 0)
        await api.done(await api.act("web", "shutdown", {"deadline_s": 30}))
        await world.vm_is("web", VmPhase.STOPPED)
        await api.done(await api.act("web", "start"))
        assert (await world.vm_is("web", VmPhase.RUNNING)).status.generation == 2
        await api.done(await api.act("web", "stop"))
        await world.vm_is("web", VmPhase.STOPPED)
        assert world.starts_and_ends(web.id) == (2, 2)
        await api.done(await api.delete("web"))
        assert (await api.send("GET", "/api/v1/vms/web")).status_code == 404
        assert not world.nodes[0].domains
        assert not world.nodes[0].volumes()


async def test_figures_of_node_and_vm_come_and_are_exported(world: World) -> None:
    async with world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        for path in ("/nodes/n1/metrics", "/vms/web/metrics"):
            series = await until(partial(_figures, world, path), f"figures at {path}")
            assert series.latest is not None
            assert series.latest.memory_bytes > 0
            assert series.latest.cpu_percent > 0
        text = (await world.api.send("GET", "/metrics")).text
        assert 'node="n1"' in text
        assert 'vm="web"' in text
        assert "novacron_is_leader 1.0" in text
        assert 'novacron_operations_total{kind="vm.create",state="succeeded"} 1.0' in text
        assert 'novacron_etcd_request_duration_seconds_count{method="commit"}' in text


async def test_a_node_whose_agent_is_gone_is_silent_and_its_guests_go_on() -> None:
    times = {"sessions": {"heartbeat_period_s": 0.2, "silence_limit_s": 1.0}}
    node = WitnessNode("n1")
    async with new_world(times) as world:
        async with world.agent(node):
            await world.api.done(await world.api.create("web"))
            web = await world.api.vm("web")
        await world.node_is(node, NodeState.SILENT)
        assert (await world.api.vm("web")).status.phase is VmPhase.RUNNING
        async with world.agent(node):
            await world.api.done(await world.api.act("web", "pause"))
            await world.api.done(await world.api.act("web", "resume"))
            await world.agrees()
        assert world.starts_and_ends(web.id) == (1, 0)


async def _console_says(world: World, what: bytes, times: int = 1) -> bool:
    answer = await world.api.send("GET", "/api/v1/vms/web/console-log", offset=0)
    return answer.content.count(what) >= times


async def _figures(world: World, path: str) -> SeriesView | None:
    series = await world.api.get(SeriesView, path)
    found = series.latest
    return series if found is not None and found.cpu_percent > 0 else None
