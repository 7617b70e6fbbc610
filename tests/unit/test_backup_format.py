"""A backup's file is read whole and unchanged, or not at all."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.backup.format import (
    FRAME_BYTES_MAX,
    MAGIC,
    Entry,
    Frame,
    Header,
    Key,
    Reading,
    Summary,
    Writing,
)
from shared.errors import RecordUnreadable

HEADER = Header(
    cluster="cluster-1",
    cell="abc123",
    epoch=3,
    revision=1000,
    schema_level=2,
    release="0.2.0",
    made_at=datetime(2026, 11, 1, 12, 0, tzinfo=UTC),
)
KEYS = (("/novacron/applied", b"mark"), ("/novacron/state/vms/vm-1", b"\x00" * 300))
ENTRIES = (b"first", b"second", b"")


def a_file(
    keys: tuple[tuple[str, bytes], ...] = KEYS, entries: tuple[bytes, ...] = ENTRIES
) -> bytes:
    writing = Writing()
    pieces = [writing.header(HEADER)]
    pieces += [writing.key(key, value) for key, value in keys]
    pieces += [writing.entry(body) for body in entries]
    return b"".join((*pieces, writing.end()))


def read(data: bytes, step: int = 1 << 20) -> tuple[list[Frame], Summary]:
    reading = Reading()
    frames: list[Frame] = []
    for start in range(0, len(data), step):
        frames += reading.feed(data[start : start + step])
    return frames, reading.finished()


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_what_is_written_is_read(step: int) -> None:
    data = a_file()
    frames, summary = read(data, step)
    assert summary == Summary(HEADER, len(KEYS), len(ENTRIES), len(data))
    assert frames[0] == HEADER
    assert frames[1:-1] == [
        *(Key(key.encode(), value) for key, value in KEYS),
        *(Entry(body) for body in ENTRIES),
    ]


def test_an_empty_cluster_has_a_backup_too() -> None:
    assert read(a_file((), ()))[1].keys == 0


def test_a_key_that_is_no_text_comes_through() -> None:
    frames, _ = read(a_file((("/novacron/\udcff", b"x"),), ()))
    assert frames[1] == Key(b"/novacron/\xff", b"x")


def test_every_flipped_bit_is_seen() -> None:
    data = a_file()
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            with pytest.raises(RecordUnreadable):
                read(bytes(broken))


def test_every_cut_is_seen() -> None:
    data = a_file()
    for length in range(len(data)):
        with pytest.raises(RecordUnreadable):
            read(data[:length])


def test_what_follows_the_end_is_seen() -> None:
    for more in (b"\0", a_file(), MAGIC):
        with pytest.raises(RecordUnreadable, match="follows"):
            read(a_file() + more)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_piece_that_is_lost_repeated_or_moved_is_seen(data: st.DataObject) -> None:
    whole = a_file()
    first = data.draw(st.integers(0, len(whole) - 1))
    second = data.draw(st.integers(first + 1, len(whole)))
    piece = whole[first:second]
    for broken in (
        whole[:first] + whole[second:],
        whole[:second] + piece + whole[second:],
        whole[:first] + piece[::-1] + whole[second:],
        piece,
    ):
        if broken != whole:
            with pytest.raises(RecordUnreadable):
                read(broken)


@given(st.binary(max_size=200))
def test_anything_else_is_no_backup(data: bytes) -> None:
    with pytest.raises(RecordUnreadable):
        read(data)


def test_a_backup_of_a_later_form_says_so() -> None:
    with pytest.raises(RecordUnreadable, match="does not know"):
        read(a_file().replace(b"BACKUP 1", b"BACKUP 2"))


def test_a_part_that_is_too_large_is_not_waited_for() -> None:
    size = (FRAME_BYTES_MAX + 1).to_bytes(4, "big")
    with pytest.raises(RecordUnreadable, match="damaged"):
        read(MAGIC + size)


def test_a_whole_file_put_together_of_two_is_damaged() -> None:
    """Each frame is sound, and the counts are right: only the seal tells."""
    writing = Writing()
    other = writing.header(replace(HEADER, epoch=4)) + writing.key(*KEYS[0])
    mine = a_file(KEYS[:1], ())
    header = len(MAGIC) + 4 + int.from_bytes(mine[len(MAGIC) : len(MAGIC) + 4], "big")
    with pytest.raises(RecordUnreadable, match="checksum"):
        read(other[:header] + mine[header:])


def test_parts_out_of_order_are_damage() -> None:
    for pieces in (("entry", "key"), ("header",)):
        writing = Writing()
        made = [writing.header(HEADER)]
        for piece in pieces:
            if piece == "entry":
                made.append(writing.entry(b"e"))
            elif piece == "key":
                made.append(writing.key("/novacron/a", b""))
            else:
                made.append(writing.header(HEADER)[len(MAGIC) :])
        with pytest.raises(RecordUnreadable, match="order"):
            read(b"".join((*made, writing.end())))
