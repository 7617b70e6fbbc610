"""The file of a backup: a header, etcd's keys at one revision, history, and a seal over all of it.

    NOVACRON BACKUP 1 <newline>, then frames: four bytes of length, and that many of MessagePack
    Header · Key, Key, … · Entry, Entry, … · End (counts, and the SHA-256 of every byte before it)

Whatever reads a file goes through ``Reading``: nothing of it may be used before ``finished`` has
said that all of it is there and whole. Both go piece by piece, so that neither end of a connection
holds a backup in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime

from msgspec import Struct

from shared.codec import pack, unpack
from shared.errors import RecordUnreadable

MAGIC = b"NOVACRON BACKUP 1\n"
_KIND = b"NOVACRON BACKUP "
_LENGTH_BYTES = 4
# A value in etcd is at most 1.5 MiB, and so was every entry of history.
FRAME_BYTES_MAX = 4 * 1024 * 1024


class Header(Struct, frozen=True, kw_only=True, tag="header"):
    """Whose backup it is, and of when: ``revision`` is etcd's, in ``epoch``."""

    cluster: str
    cell: str
    epoch: int
    revision: int
    schema_level: int
    release: str
    made_at: datetime


class Key(Struct, frozen=True, tag="key"):
    key: bytes
    value: bytes


class Entry(Struct, frozen=True, tag="entry"):
    """One entry of history, as it was packed; oldest first."""

    body: bytes


class End(Struct, frozen=True, kw_only=True, tag="end"):
    keys: int
    entries: int
    sha256: bytes


Frame = Header | Key | Entry | End
_ORDER = {Header: 0, Key: 1, Entry: 2, End: 3}


class Summary(Struct, frozen=True):
    """What a whole and undamaged backup holds."""

    header: Header
    keys: int
    entries: int
    size_bytes: int


class Writing:
    """Makes the pieces of a file, in order: one header, keys, entries, the end."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._keys = 0
        self._entries = 0

    def header(self, header: Header) -> bytes:
        return self._sealed(MAGIC + _framed(header))

    def key(self, key: str, value: bytes) -> bytes:
        self._keys += 1
        # A foreign key below ours need not be text.
        return self._sealed(_framed(Key(key.encode("utf-8", "surrogateescape"), value)))

    def entry(self, body: bytes) -> bytes:
        self._entries += 1
        return self._sealed(_framed(Entry(body)))

    def end(self) -> bytes:
        return _framed(End(keys=self._keys, entries=self._entries, sha256=self._digest.digest()))

    def _sealed(self, piece: bytes) -> bytes:
        self._digest.update(piece)
        return piece


class Reading:
    """Takes a file piece by piece; every method raises RecordUnreadable for a damaged one."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._waiting = bytearray()
        self._began = False
        self._stage = 0
        self._counts = {Key: 0, Entry: 0}
        self._size_bytes = 0
        self._header: Header | None = None
        self._ended = False

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete by now."""
        self._waiting += piece
        self._size_bytes += len(piece)
        if not self._began:
            self._begin()
        while self._began and (frame := self._next()) is not None:
            yield frame

    def finished(self) -> Summary:
        """Return what the file holds, now that all of it has been fed."""
        if not self._began:
            self._begin(all_of_it=True)
        if not self._ended or self._header is None:
            raise RecordUnreadable(f"the backup is cut off after {self._size_bytes} bytes")
        return Summary(self._header, self._counts[Key], self._counts[Entry], self._size_bytes)

    def _begin(self, *, all_of_it: bool = False) -> None:
        start = bytes(self._waiting[: len(MAGIC)])
        if start == MAGIC:
            self._digest.update(MAGIC)
            del self._waiting[: len(MAGIC)]
            self._began = True
        elif len(start) == len(MAGIC) and start.startswith(_KIND):
            raise RecordUnreadable("the backup is of a form that this release does not know")
        elif all_of_it or not MAGIC.startswith(start):
            raise RecordUnreadable("the file is no backup of NovaCron")

    def _next(self) -> Frame | None:
        if self._ended:
            if self._waiting:
                raise RecordUnreadable("something follows the end of the backup")
            return None
        length = int.from_bytes(self._waiting[:_LENGTH_BYTES], "big")
        if length > FRAME_BYTES_MAX:
            raise RecordUnreadable(f"the backup is damaged: a part of it has {length} bytes")
        size = _LENGTH_BYTES + length
        if len(self._waiting) < size:
            return None
        piece = bytes(self._waiting[:size])
        del self._waiting[:size]
        frame: Frame = unpack(piece[_LENGTH_BYTES:], Frame)  # type: ignore[arg-type]
        self._check(frame)
        if not isinstance(frame, End):
            self._digest.update(piece)
        return frame

    def _check(self, frame: Frame) -> None:
        stage = _ORDER[type(frame)]
        if stage < self._stage or (stage == 0) is not (self._header is None):
            raise RecordUnreadable("the backup is damaged: its parts are out of order")
        self._stage = stage
        if isinstance(frame, Header):
            self._header = frame
        elif not isinstance(frame, End):
            self._counts[type(frame)] += 1
        else:
            self._seal(frame)

    def _seal(self, end: End) -> None:
        if (end.keys, end.entries) != (self._counts[Key], self._counts[Entry]):
            raise RecordUnreadable("the backup is damaged: something is missing in it")
        if end.sha256 != self._digest.digest():
            raise RecordUnreadable("the backup is damaged: its checksum does not fit")
        self._ended = True


def _framed(frame: Frame) -> bytes:
    packed = pack(frame)
    assert len(packed) <= FRAME_BYTES_MAX, "a frame has a bound"
    return len(packed).to_bytes(_LENGTH_BYTES, "big") + packed
