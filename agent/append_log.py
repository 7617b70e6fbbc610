"""A file of MessagePack records that only grows, as a port: durable once ``append`` returns.

A record cut short by a crash at the end of the file is dropped: its append never returned. The
file is rewritten in one rename when it has grown well beyond what it says.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgpack

from shared.durable_files import sync_directory
from shared.errors import RecordUnreadable

# What one interrupted append can leave: records are a tenth of it. More is damage, not an end.
TORN_BYTES_MAX = 4096


class AppendLog(Protocol):
    def read(self) -> list[bytes]:
        """Return all records, oldest first."""
        ...

    def append(self, record: bytes) -> None:
        """Add a record; it survives a crash of the machine from now on."""
        ...

    def rewrite(self, records: Sequence[bytes]) -> None:
        """Replace everything, all or nothing."""
        ...


class FileLog:
    """One file; each record is a MessagePack pair of its CRC-32 and its bytes.

    Raises RecordUnreadable when a record in the middle is damaged: half of what was known must not
    be acted on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cut_torn_end()
        self._file = path.open("ab")

    def read(self) -> list[bytes]:
        return _records(self._path)[0]

    def append(self, record: bytes) -> None:
        self._file.write(_framed(record))
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def rewrite(self, records: Sequence[bytes]) -> None:
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            for record in records:
                file.write(_framed(record))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        sync_directory(self._path.parent)
        self._file.close()
        self._file = self._path.open("ab")

    def close(self) -> None:
        self._file.close()

    def _cut_torn_end(self) -> None:
        """Forget a record that a crash cut short, so that the next append follows a whole one."""
        if not self._path.exists():
            self._path.touch(mode=0o600)
            sync_directory(self._path.parent)
            return
        whole_bytes = _records(self._path)[1]
        if whole_bytes < self._path.stat().st_size:
            with self._path.open("r+b") as file:
                file.truncate(whole_bytes)
                os.fsync(file.fileno())


class MemoryLog:
    """The same in memory; it outlives the agent that writes it, as a disk does."""

    def __init__(self) -> None:
        self._records: list[bytes] = []

    def read(self) -> list[bytes]:
        return list(self._records)

    def append(self, record: bytes) -> None:
        self._records.append(record)

    def rewrite(self, records: Sequence[bytes]) -> None:
        self._records = list(records)


def _framed(record: bytes) -> bytes:
    framed: bytes = msgpack.packb((zlib.crc32(record), record))
    return framed


def _records(path: Path) -> tuple[list[bytes], int]:
    """Return the whole records of a file and how many bytes they take.

    What a crash leaves behind them is cut short, or zeros that were never written. Raises
    RecordUnreadable for anything else.
    """
    records: list[bytes] = []
    whole_bytes = 0
    data = path.read_bytes()
    unpacker = msgpack.Unpacker(use_list=False)
    unpacker.feed(data)
    try:
        for framed in unpacker:
            record = _unframed(framed)
            if record is None:
                break
            records.append(record)
            whole_bytes = unpacker.tell()
        else:
            if len(data) - whole_bytes <= TORN_BYTES_MAX:
                return records, whole_bytes
    except (ValueError, msgpack.UnpackException):
        pass
    if data[whole_bytes:].strip(b"\0"):
        raise RecordUnreadable(f"{path} is damaged after {whole_bytes} of {len(data)} bytes")
    return records, whole_bytes


def _unframed(framed: object) -> bytes | None:
    """Return a record whose checksum fits, else None."""
    if not isinstance(framed, tuple) or len(framed) != 2:
        return None
    checksum, record = framed
    if not isinstance(record, bytes) or checksum != zlib.crc32(record):
        return None
    return record
