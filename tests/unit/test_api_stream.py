"""The event stream: resuming, following, heartbeats, slow and departed readers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from controlplane.api import stream
from controlplane.commands.vms import CreateVm
from controlplane.services.events import FOLLOW_STEP
from shared.model import BootSpec, VmSpec
from tests.unit.api_world import SYSTEM, World


class Reader:
    """A client of the stream at the ASGI boundary; it may be slow, and may go away."""

    def __init__(self, world: World, query: str = "", last_event_id: str = "") -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self.status = 0
        self.aborted = False
        self.may_take = asyncio.Event()
        self.may_take.set()
        self._gone = asyncio.Event()
        headers = [
            (b"authorization", f"Bearer {world.token}".encode()),
            (b"accept", b"text/event-stream"),
        ]
        if last_event_id:
            headers.append((b"last-event-id", last_event_id.encode()))
        self.app = world.app()
        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": "/api/v1/events",
            "raw_path": b"/api/v1/events",
            "root_path": "",
            "query_string": query.encode(),
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "novacron.abort": self._abort,
        }
        self.task = asyncio.create_task(self.app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def events(self, count: int) -> list[dict[str, Any]]:
        """Return the next events, each checked to carry its own id."""
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(5):
            while len(found) < count:
                found += _parse(await self.chunks.get())
        assert len(found) == count
        return found

    def _abort(self) -> None:
        self.aborted = True

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        await self.may_take.wait()
        self.chunks.put_nowait(message["body"])


@pytest.fixture
def world() -> World:
    return World()


def create(world: World, name: str) -> None:
    spec = VmSpec(vcpus=1, memory_mib=64, boot=BootSpec(kernel="k"))
    world.apply(CreateVm(name=name, tenant="default", labels={}, spec=spec, by=SYSTEM))


async def test_a_stream_starts_now_and_follows(world: World) -> None:
    create(world, "before")
    reader = Reader(world)
    await reader.chunks.get()
    create(world, "first")
    create(world, "second")
    events = await reader.events(2)
    assert [event["data"]["name"] for event in events] == ["first", "second"]
    reader.leave()
    await reader.task


@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_stream_resumes_after_the_last_id_without_gap(world: World, trimmed: bool) -> None:
    for name in ("a", "b", "c"):
        create(world, name)
    reader = Reader(world, "since=e1.0&kind=vm.created")
    seen = await reader.events(3)
    reader.leave()
    await reader.task
    if trimmed:
        await world.trim_history()
    create(world, "d")
    resumed = Reader(world, "since=e1.0&kind=vm.created", last_event_id=seen[0]["id"])
    events = await resumed.events(3)
    assert [event["data"]["name"] for event in events] == ["b", "c", "d"]
    create(world, "e")
    assert (await resumed.events(1))[0]["data"]["name"] == "e"
    resumed.leave()
    await resumed.task


async def test_more_than_one_stretch_of_history(world: World) -> None:
    for number in range(2 * FOLLOW_STEP + 5):
        create(world, f"vm{number}")
    reader = Reader(world, "since=e1.0&kind=vm.created")
    events = await reader.events(2 * FOLLOW_STEP + 5)
    assert [event["seq"] for event in events] == sorted(event["seq"] for event in events)
    reader.leave()
    await reader.task


async def test_a_silent_stream_shows_life(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.01)
    reader = Reader(world)
    async with asyncio.timeout(5):
        while await reader.chunks.get() != stream.HEARTBEAT:
            pass
    reader.leave()
    await reader.task


async def test_a_reader_that_does_not_read_is_cut_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SEND_TIMEOUT_S", 0.01)
    reader = Reader(world)
    await reader.chunks.get()
    reader.may_take.clear()
    create(world, "a")
    await reader.task
    assert reader.aborted


async def test_streams_are_bounded_and_end_with_the_replica(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FOLLOWERS_MAX", 0)
    refused = Reader(world)
    await refused.task
    assert refused.status == 503
    monkeypatch.setattr(stream, "FOLLOWERS_MAX", 1)
    reader = Reader(world)
    await reader.chunks.get()
    reader.app.state.streams.close()
    await reader.task
    assert reader.status == 200


async def test_a_bad_start_is_a_problem_and_no_stream(world: World) -> None:
    reader = Reader(world, "since=yesterday")
    await reader.task
    assert reader.status == 422


def _parse(chunk: bytes) -> list[dict[str, Any]]:
    events = []
    for block in chunk.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            event: dict[str, Any] = json.loads(lines["data"])
            assert event["id"] == lines["id"]
            events.append(event)
    return events
