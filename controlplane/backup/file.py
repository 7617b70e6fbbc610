"""A backup on disk: checked from end to end before anything of it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from controlplane.backup.format import Entry, Frame, Key, Reading, Summary
from shared.codec import unpack
from shared.model import HistoryEntry

PIECE_BYTES = 1024 * 1024
# Entries of history that are held at a time: a transaction of SQLite's each.
ENTRIES_AT_ONCE = 1000


class BackupFile:
    """Every method raises RecordUnreadable for a damaged file, OSError for one it cannot read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self) -> Summary:
        """Read all of it, and return what it holds."""
        reading = Reading()
        for _ in self._frames(reading):
            pass  # each is checked on its way
        return reading.finished()

    def keys(self) -> list[tuple[str, bytes]]:
        """Return what etcd had."""
        return [
            (frame.key.decode("utf-8", "surrogateescape"), frame.value)
            for frame in self._frames(Reading())
            if isinstance(frame, Key)
        ]

    def history(self) -> Iterator[list[HistoryEntry]]:
        """Yield the replica's copy of history, oldest first, some at a time."""
        some: list[HistoryEntry] = []
        for frame in self._frames(Reading()):
            if isinstance(frame, Entry):
                some.append(unpack(frame.body, HistoryEntry))  # type: ignore[arg-type]
            if len(some) == ENTRIES_AT_ONCE:
                yield some
                some = []
        if some:
            yield some

    def _frames(self, reading: Reading) -> Iterator[Frame]:
        with self._path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield from reading.feed(piece)
