"""What SQLite has against the copy of history is told, and ends nothing but the one attempt."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from controlplane.reconcilers import loop
from controlplane.reconcilers.history import CopyHistory
from controlplane.state import ClusterState
from controlplane.store import history as store
from controlplane.store.history import EntryFilter, History
from shared.errors import Unavailable
from shared.offload import inline
from tests.integration.replica_process import ROOT, Cell, ReplicaProcess, replica_command
from tests.sim.virtual_loop import run_virtual
from tests.unit.api_world import World
from tests.unit.lone_replica import NO_PEERS
from tests.unit.test_history import event

EVERYTHING = EntryFilter(tenant="default")
NOT_SQLITE = b"this was a file of history" * 1000
# Nobody listens there; none of these replicas comes so far as to ask.
NO_ETCD = ("127.0.0.1:1",)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite"


@contextmanager
def lock_held(file: Path) -> Iterator[None]:
    """Hold SQLite's write lock, as another process would."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def let_grow(history: History, *, pages: int) -> None:
    """Give the file so many pages more and no others, like a disk that is nearly full."""
    (now,) = history._database.execute("PRAGMA page_count").fetchone()
    history._database.execute(f"PRAGMA max_page_count = {now + pages}")


def broken(history: History) -> None:
    history._database.execute("DROP TABLE history")


async def test_a_full_disk_is_told_and_what_is_there_is_read(file: Path) -> None:
    history = History(file, inline)
    await history.append([event(1)])
    let_grow(history, pages=0)
    entries = [event(seq) for seq in range(2, 500)]
    with pytest.raises(Unavailable) as told:
        await history.append(entries)
    for part in (str(file), "disk is full", "make room"):
        assert part in str(told.value)
    assert await history.entries(EVERYTHING) == [event(1)]
    assert await history.copied_seq() == 1

    let_grow(history, pages=1000)
    await history.append(entries)
    assert await history.copied_seq() == 499
    await history.close()


async def test_a_held_lock_is_told_and_what_is_there_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.01)
    history = History(file, inline)
    await history.append([event(1)])
    with lock_held(file):
        with pytest.raises(Unavailable, match=f"{file} .*locked; another process holds it"):
            await history.append([event(2)])
        assert await history.entries(EVERYTHING) == [event(1)]
    await history.append([event(2)])
    assert await history.copied_seq() == 2
    await history.close()


async def test_a_file_that_cannot_be_prepared_yet_is_prepared_later(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.01)
    with lock_held(file):
        history = History(file, inline)
        with pytest.raises(Unavailable, match="locked"):
            await history.copied_seq()
    await history.append([event(1)])
    assert await history.entries(EVERYTHING) == [event(1)]
    assert history._database.execute("PRAGMA synchronous").fetchone() == (2,)
    await history.close()


def test_the_copy_is_tried_again_until_there_is_room(file: Path) -> None:
    async def main() -> None:
        state = ClusterState()
        history = History(file, inline)
        for seq in range(1, 500):
            state.put_history(event(seq))
        let_grow(history, pages=0)
        copy = CopyHistory(state, history, NO_PEERS)
        running = asyncio.ensure_future(loop.run(copy, state.changes))
        await asyncio.sleep(60)
        assert not running.done()
        assert copy.copied_seq == 0, "nothing is trimmed that is not on the disk"
        let_grow(history, pages=1000)
        await asyncio.sleep(10)
        assert copy.copied_seq == await history.copied_seq() == 499
        running.cancel()
        await history.close()

    run_virtual(main())


def test_a_file_that_will_never_do_is_told_at_start(file: Path) -> None:
    file.write_bytes(NOT_SQLITE)
    with pytest.raises(Unavailable, match=f"{file} .*not a database; .*move the file away"):
        History(file, inline)
    assert file.read_bytes() == NOT_SQLITE
    file.unlink()
    file.mkdir()
    with pytest.raises(Unavailable, match=f"{file} .*unable to open"):
        History(file, inline)


def test_a_replica_with_a_malformed_file_ends_with_one_line() -> None:
    with Cell(NO_ETCD) as cell:
        replica = ReplicaProcess(cell)
        replica.data_dir.mkdir()
        file = replica.data_dir / "history.sqlite"
        file.write_bytes(NOT_SQLITE)
        ended = subprocess.run(
            replica_command(replica.config_file),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},
            timeout=60,
        )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("novacron-controlplane: ")
    assert str(file) in line
    assert "move the file away" in line


@pytest.mark.parametrize("path", ["events", "audit-records", "operations", "operations/op-gone"])
async def test_a_route_of_history_answers_503_and_the_others_go_on(path: str) -> None:
    world = World()
    world.join("n1")
    await world.trim_history()
    broken(world.history)
    async with world.client() as client:
        answer = await client.get(f"/api/v1/{path}")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.json()["retryable"]
        assert "the copy of history" in answer.json()["detail"]
        assert "retry-after" in answer.headers
        assert (await client.get("/api/v1/nodes")).status_code == 200
