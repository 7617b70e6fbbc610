"""`novacron events --follow` on a real replica that is killed under it: no gap, no repetition."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading

import pytest

from controlplane.cli.main import run
from controlplane.cli.terminal import Terminal
from tests.integration.replica_api import until
from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import World

pytestmark = pytest.mark.etcd


class Screen(Terminal):
    """A terminal whose user presses Ctrl-C at the first pause after ``done`` is set."""

    def __init__(self) -> None:
        self.out, self.told = io.StringIO(), io.StringIO()
        super().__init__(self.out, self.told)
        self.done = threading.Event()

    def sleep(self, seconds: float) -> None:
        if self.done.wait(seconds):
            raise KeyboardInterrupt

    def seqs(self) -> list[int]:
        lines = self.out.getvalue().splitlines(keepends=True)
        return [json.loads(line)["seq"] for line in lines if line.endswith("\n")]


async def test_a_kill_and_a_stop_leave_no_gap_and_no_repetition(world: World) -> None:
    events = "/api/v1/events"
    revision = (await world.api.send("GET", events)).json()["revision"]
    screen = Screen()
    environ = {
        "HOME": str(world.cell.directory),
        "NOVACRON_ENDPOINT": world.replica.api_url,
        "NOVACRON_CA": str(world.cell.files.ca_file),
        "NOVACRON_TOKEN": world.cell.token,
    }
    command = ("events", "--follow", "--kind", "vm.*", "--since", revision, "-o", "json")
    following = asyncio.ensure_future(
        asyncio.to_thread(run, command, environ, screen, random.Random(1))
    )
    expected: list[int] = []

    async def all_are_shown() -> bool:
        answer = await world.api.send("GET", events, since=revision, kind="vm.*", limit=500)
        expected[:] = [event["seq"] for event in answer.json()["items"]]
        return screen.seqs() == expected

    async with world.agent(WitnessNode("n1")):
        for name in ("a", "b", "c"):
            await world.api.done(await world.api.create(name))
            await until(all_are_shown, "every event on the screen")
            if name == "a":
                world.replica.kill()
            elif name == "b":
                await asyncio.to_thread(world.replica.terminate)
            if name != "c":
                world.replica.restart()
    screen.done.set()
    world.replica.kill()
    assert await following == 0
    assert len(expected) >= 9
    assert screen.seqs() == expected
    assert "trying again" in screen.told.getvalue()
