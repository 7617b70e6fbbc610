"""The event stream: resuming, following, heartbeats, slow and departed readers."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from starlette.types import Message

from controlplane.api import stream
from controlplane.commands.vms import CreateVm, DeleteVm
from controlplane.services.context import ROLES, Permission
from controlplane.services.events import FOLLOW_STEP
from shared.model import BootSpec, VmSpec
from tests.unit.api_world import BORN, SYSTEM, World


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


def place(world: World) -> bytes:
    return f"id: e1.{world.state.last_seq}\n\n".encode()


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


async def test_who_follows_a_name_hears_of_its_end_and_of_whatever_has_it_next(
    world: World,
) -> None:
    create(world, "web")
    reader = Reader(world, "object=web&kind=vm.created&kind=vm.deleted")
    await reader.chunks.get()
    (vm_id,) = world.state.vms
    world.apply(DeleteVm(vm_id=vm_id, by=SYSTEM))
    (event,) = await reader.events(1)
    assert (event["kind"], event["object"]) == ("vm.deleted", vm_id)
    create(world, "web")
    create(world, "other")
    (event,) = await reader.events(1)
    assert (event["kind"], event["object"] != vm_id) == ("vm.created", True)
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
        while not (chunk := await reader.chunks.get()).startswith(stream.HEARTBEAT):
            pass
    assert chunk == stream.HEARTBEAT + place(world)
    reader.leave()
    await reader.task


async def test_a_stream_whose_filter_lets_nothing_pass_shows_life_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that are none of its business wake it, and must not keep it silent."""
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.01)
    reader = Reader(world, "kind=node.ready")

    async def disturb() -> None:
        for number in range(1000):
            create(world, f"vm{number}")
            await asyncio.sleep(0.001)

    disturbing = asyncio.create_task(disturb())
    async with asyncio.timeout(5):
        while not (await reader.chunks.get()).startswith(stream.HEARTBEAT):
            pass
    disturbing.cancel()
    reader.leave()
    await reader.task


async def test_a_reader_whose_filter_lets_nothing_pass_moves_on(world: World) -> None:
    reader = Reader(world, "kind=node.ready")
    assert (await reader.chunks.get()).endswith(place(world))
    for number in range(FOLLOW_STEP):
        create(world, f"vm{number}")
    async with asyncio.timeout(5):
        assert await reader.chunks.get() == place(world)
    reader.leave()
    await reader.task


async def test_the_first_frame_says_where_the_stream_began(world: World) -> None:
    """Who is cut off before the first event comes back to where it was, not to what is then now."""
    reader = Reader(world)
    begun = (await reader.chunks.get()).decode()
    reader.leave()
    await reader.task
    create(world, "while-away")
    resumed = Reader(world, last_event_id=begun.rpartition("id: ")[2].strip())
    assert (await resumed.events(1))[0]["data"]["name"] == "while-away"
    resumed.leave()
    await resumed.task


async def test_several_kinds_and_objects(world: World) -> None:
    world.join("n1")
    for name in ("a", "b", "c"):
        create(world, name)
    every = "since=e1.0&kind=vm.*&kind=node.joined"
    reader = Reader(world, every)
    kinds = [event["kind"] for event in await reader.events(4)]
    assert kinds == ["node.joined", "vm.created", "vm.created", "vm.created"]
    some = Reader(world, f"{every}&object=a&object=n1&object=c")
    events = await some.events(3)
    assert [event["data"]["name"] for event in events] == ["n1", "a", "c"]
    for each in (reader, some):
        each.leave()
        await each.task


@pytest.mark.parametrize("since", ["e1.2", "1.3.2", "e7.3"])
async def test_what_is_not_all_here_is_told_and_followed_from_now(world: World, since: str) -> None:
    """An id of before a restore, or of history that neither memory nor SQLite has any more."""
    for name in ("a", "b"):
        create(world, name)
    for seq in list(world.state.history)[:-1]:
        world.state.remove_history(seq)
    reader = Reader(world, last_event_id=since)
    chunk = (await reader.chunks.get()).decode()
    assert "event: resync\n" in chunk
    assert chunk.count("id: ") == 1
    assert f"id: e1.{world.state.last_seq}\n" in chunk
    create(world, "later")
    assert (await reader.events(1))[0]["data"]["name"] == "later"
    reader.leave()
    await reader.task
    if since.startswith("e7"):
        return
    async with world.client() as client:
        gone = await client.get(f"/api/v1/events?since={since}")
        assert (gone.status_code, gone.json()["code"]) == (410, "history_gone")
        assert (await client.get("/api/v1/events")).status_code == 200


async def test_a_stream_whose_history_cannot_be_read_says_where_to_go_on(world: World) -> None:
    reader = Reader(world)
    await reader.chunks.get()
    begun = world.state.last_seq
    world.history._database.execute("DROP TABLE history")
    create(world, "trimmed-before-it-was-sent")
    for seq in list(world.state.history):
        world.state.remove_history(seq)
    async with asyncio.timeout(5):
        last = (await reader.chunks.get()).decode()
        await reader.task
    assert last.startswith(f"event: resume\nid: e1.{begun}\n")
    assert "the copy of history" in last


async def test_what_was_forgotten_is_gone_for_a_stream_and_a_list(world: World) -> None:
    for number in range(5):
        create(world, f"vm{number}")
    await world.trim_history()
    first = (await world.history.reach()).first
    for seq in (world.state.last_seq - 1, world.state.last_seq):
        await world.history.forget(BORN + timedelta(days=40), below=seq)
    assert (await world.history.reach()).first > first
    reader = Reader(world, last_event_id="e1.2")
    assert "event: resync\n" in (await reader.chunks.get()).decode()
    reader.leave()
    await reader.task
    async with world.client() as client:
        gone = await client.get("/api/v1/events?since=e1.2")
        assert (gone.status_code, gone.json()["code"]) == (410, "history_gone")
        assert (await client.get("/api/v1/audit-records?since=e1.2")).status_code == 410
        assert (await client.get("/api/v1/events")).status_code == 200


async def test_a_stream_that_ends_says_where_to_go_on(world: World) -> None:
    reader = Reader(world, "kind=node.ready")
    create(world, "a")
    await reader.chunks.get()
    reader.app.state.streams.close()
    await reader.task
    last = reader.chunks.get_nowait().decode()
    at = f"e1.{world.state.last_seq}"
    assert last.startswith(f"event: resume\nid: {at}\ndata: ")
    assert json.loads(last.partition("data: ")[2])["id"] == at


async def test_progress_is_shown_to_who_asks_and_is_no_part_of_history(world: World) -> None:
    create(world, "a")
    create(world, "b")
    of_a, of_b = sorted(world.state.operations)
    reader = Reader(world, "progress=true&object=a")
    quiet = Reader(world)
    await reader.chunks.get()
    await quiet.chunks.get()
    world.progress.put(of_b, 10.0)
    world.progress.put(of_a, 20.0, 9.0)
    world.progress.put(of_a, 41.5, 2.1, bytes_done=10, bytes_total=20, detail="copying memory")
    world.progress.put("op-of-nobody", 1.0)
    async with asyncio.timeout(5):
        frame = (await reader.chunks.get()).decode()
    assert frame.startswith("event: progress\ndata: ")
    told = json.loads(frame.partition("data: ")[2])
    assert told["operation"] == of_a
    assert told["kind"] == "vm.create"
    assert told["detail"] == "copying memory"
    assert (told["progress"]["percent"], told["progress"]["bytes_total"]) == (41.5, 20)
    async with world.client() as client:
        shown = (await client.get(f"/api/v1/operations/{of_a}")).json()["progress"]
    assert shown == told["progress"]
    create(world, "c")
    assert (await quiet.events(1))[0]["data"]["name"] == "c"
    for each in (reader, quiet):
        each.leave()
        await each.task
    world.progress.put(of_a, 50.0)  # nobody reads any more


async def test_progress_needs_the_permission_to_read_operations(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROLES, "admin", frozenset({Permission.EVENTS_READ}))
    refused = Reader(world, "progress=true")
    await refused.task
    assert refused.status == 403


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


@pytest.mark.parametrize("query", ["since=yesterday", "last=5"])
async def test_a_bad_start_is_a_problem_and_no_stream(world: World, query: str) -> None:
    reader = Reader(world, query)
    await reader.task
    assert reader.status == 422


def _parse(chunk: bytes) -> list[dict[str, Any]]:
    events = []
    for block in chunk.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines and "event" not in lines:
            event: dict[str, Any] = json.loads(lines["data"])
            assert event["id"] == lines["id"]
            events.append(event)
    return events
