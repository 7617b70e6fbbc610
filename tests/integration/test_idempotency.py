"""Idempotency keys on a real etcd: over kills, unknown outcomes, and the previous release."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from controlplane.services.views import OperationView
from controlplane.store import keys
from tests.integration.replica_api import new_vm, until
from tests.integration.replica_process import ReplicaProcess, Settings, replica_command
from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import World
from tests.previous_release import environment, unpack

pytestmark = pytest.mark.etcd

KEY = {b"Idempotency-Key": b"8e03978e-40d5-43dd-bc93"}


async def send(world: World, method: str, path: str, body: Any = None) -> httpx2.Response:
    return await world.api.send(method, f"/api/v1{path}", body, headers=KEY)


async def accepted(world: World, method: str, path: str, body: Any = None) -> httpx2.Response:
    """Send one request again and again until it is accepted, as a client does that must know."""

    async def look() -> httpx2.Response | None:
        answer = await send(world, method, path, body)
        return answer if answer.status_code == 202 else None

    return await until(look, f"{method} {path} accepted")


def operation(answer: httpx2.Response) -> OperationView:
    return msgspec.json.decode(answer.content, type=OperationView)


async def test_a_key_outlives_a_replica_that_is_killed(world: World) -> None:
    async with world.agent(WitnessNode("n1")):
        first = await send(world, "POST", "/vms", new_vm("web"))
        await world.api.done(operation(first))
        world.replica.kill()
        world.replica.restart()
        again = await send(world, "POST", "/vms", new_vm("web"))
        reused = await send(world, "POST", "/vms", new_vm("other"))
        assert again.headers["idempotency-replayed"] == "true"
        assert (again.status_code, operation(again).id) == (202, operation(first).id)
        assert (reused.status_code, reused.json()["code"]) == (422, "idempotency_key_reused")
        (vm,) = await world.api.vms()
        assert world.starts_and_ends(vm.id) == (1, 0)


@pytest.mark.parametrize("action", ["reboot", "reset"])
async def test_killed_with_the_answer_under_way_nothing_is_done_twice(
    world: World, action: str
) -> None:
    """A reboot sent twice would be two: nothing but its key tells that it is one."""
    async with world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        path = f"/vms/web/actions/{action}"
        lost = asyncio.ensure_future(send(world, "POST", path))
        await asyncio.sleep(0.005)
        world.replica.kill()
        await asyncio.gather(lost, return_exceptions=True)
        world.replica.restart()
        first = await accepted(world, "POST", path)
        await world.api.ended(operation(first))
        again = await accepted(world, "POST", path)
        assert again.headers["idempotency-replayed"] == "true"
        events = await world.api.send("GET", "/api/v1/events", kind=f"vm.{action}_requested")
        assert len(events.json()["items"]) == 1


async def test_an_unknown_outcome_is_never_done_twice(world: World) -> None:
    async with world.agent(WitnessNode("n1")):
        world.etcd.stop(0)
        lost = await send(world, "POST", "/vms", new_vm("web"))
        assert (lost.status_code, lost.json()["retryable"]) == (503, True)
        world.etcd.resume(0)
        first = await accepted(world, "POST", "/vms", new_vm("web"))
        await world.api.done(operation(first))
        (vm,) = await world.api.vms()
        assert world.starts_and_ends(vm.id) == (1, 0)
        events = await world.api.send("GET", "/api/v1/events", kind="vm.created")
        assert len(events.json()["items"]) == 1


class PreviousReplica(ReplicaProcess):
    """A replica of the previous release, on the same cell."""

    root = Path()

    def _config(self, settings: Settings) -> Settings:
        config = super()._config(settings)
        del config["enrolment"]  # new since then
        return config

    def run(self, config_file: Path) -> subprocess.Popen[bytes]:
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                replica_command(config_file),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                env={"PATH": os.environ["PATH"], **environment(self.root)},
                start_new_session=True,
            )


async def test_the_previous_release_looks_past_what_it_does_not_know(
    world: World, tmp_path: Path
) -> None:
    PreviousReplica.root = unpack(tmp_path)
    assert (await world.api.send("POST", "/api/v1/join-tokens", {})).status_code == 201
    async with world.agent(WitnessNode("n1")):
        await world.api.done(operation(await send(world, "POST", "/vms", new_vm("web"))))
    await asyncio.to_thread(world.replica.terminate)
    store = world.store()
    try:
        found = [*(await store.list(keys.IDEMPOTENCY)).items]
        found += (await store.list(keys.ADMISSION)).items
        assert len(found) == 2, "a request under its key, and a join token"
        with PreviousReplica(world.cell, "r0") as previous:
            assert "set aside" not in previous.log_text()
            assert "Traceback" not in previous.log_text()
            assert [await store.get(kept.key) for kept in found] == found
    finally:
        await store.close()
    world.replica.restart()
    again = await send(world, "POST", "/vms", new_vm("web"))
    assert again.headers["idempotency-replayed"] == "true"
