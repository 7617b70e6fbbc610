"""The file that only grows: torn ends, rewrites, and the model that tests put in its place."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from agent.append_log import AppendLog, FileLog, MemoryLog
from shared.errors import RecordUnreadable


def framed(record: bytes) -> bytes:
    """Return a record as the file holds it."""
    packed: bytes = msgpack.packb((zlib.crc32(record), record))
    return packed


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
    whole, torn = framed(b"whole"), framed(b"torn by a crash")
    path.write_bytes(whole + torn[:cut])

    log = FileLog(path)
    assert log.read() == [b"whole"]
    log.append(b"next")
    log.close()

    assert path.read_bytes() == whole + framed(b"next")


def test_zeros_that_a_power_loss_left_at_the_end_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "fence"
    path.write_bytes(framed(b"whole") + bytes(5000))

    log = FileLog(path)
    assert log.read() == [b"whole"]
    log.append(b"next")
    assert log.read() == [b"whole", b"next"]
    log.close()


@pytest.mark.parametrize("damaged", [b"\x00", b"\xff", b"garbage"])
def test_a_damaged_record_before_whole_ones_is_refused(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "fence"
    path.write_bytes(framed(b"first") + damaged + framed(b"second"))

    with pytest.raises(RecordUnreadable):
        FileLog(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "fence"
    first = bytearray(framed(b"first"))
    first[-1] ^= 1
    path.write_bytes(bytes(first) + framed(b"second"))

    with pytest.raises(RecordUnreadable):
        FileLog(path)


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
