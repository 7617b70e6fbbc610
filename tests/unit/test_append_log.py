"""The file that only grows: torn ends, rewrites, and the model that tests put in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from agent.append_log import AppendLog, FileLog, MemoryLog

RECORDS = [b"one", b"", b"three" * 1000]


@pytest.fixture(params=["file", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AppendLog]:
    if request.param == "memory":
        yield MemoryLog()
        return
    file = FileLog(tmp_path / "state" / "fence")
    yield file
    file.close()


def test_records_come_back_in_order(log: AppendLog) -> None:
    for record in RECORDS:
        log.append(record)

    assert log.read() == RECORDS


def test_a_rewrite_replaces_everything_and_appends_go_on(log: AppendLog) -> None:
    for record in RECORDS:
        log.append(record)
    log.rewrite([b"kept"])
    log.append(b"new")

    assert log.read() == [b"kept", b"new"]


def test_records_outlive_the_process(tmp_path: Path) -> None:
    first = FileLog(tmp_path / "fence")
    for record in RECORDS:
        first.append(record)
    first.close()
    second = FileLog(tmp_path / "fence")
    second.append(b"later")
    second.close()

    third = FileLog(tmp_path / "fence")
    assert third.read() == [*RECORDS, b"later"]
    third.close()


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_record_cut_short_is_dropped_and_the_next_follows_a_whole_one(
    tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "fence"
    whole = msgpack.packb(b"whole")
    torn = msgpack.packb(b"torn by a crash")
    path.write_bytes(whole + torn[:cut])

    log = FileLog(path)
    assert log.read() == [b"whole"]
    log.append(b"next")
    log.close()

    assert path.read_bytes() == whole + msgpack.packb(b"next")


def test_a_rewrite_that_a_crash_cut_short_has_not_happened(tmp_path: Path) -> None:
    path = tmp_path / "fence"
    log = FileLog(path)
    log.append(b"whole")
    log.close()
    path.with_suffix(".new").write_bytes(b"half a rewr")

    log = FileLog(path)
    assert log.read() == [b"whole"]
    log.rewrite([b"kept"])
    assert log.read() == [b"kept"]
    log.close()


def test_the_file_is_its_owners_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "fence"
    FileLog(path).close()

    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
