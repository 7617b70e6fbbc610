"""A replica's own copy of history, in SQLite: events, audit records, finished operations.

It is a projection: every entry was committed to etcd first, under a dense ``seq``, and is copied
from there. Losing the file loses nothing that another replica or etcd still has. Work runs through
the handed-in ``offload`` (one thread in production), never on the event loop.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from shared.codec import pack, unpack
from shared.model import AuditRecord, Event, FinishedOperation, HistoryEntry, Operation
from shared.offload import Offload

T = TypeVar("T")

# What one query may return; the API's pages are smaller.
PAGE_MAX = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS history (
    seq INTEGER PRIMARY KEY,
    type TEXT NOT NULL,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    object TEXT NOT NULL,
    tenant TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS history_by_object ON history (object, seq);
CREATE INDEX IF NOT EXISTS history_by_id ON history (id);
"""


class EventFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which events to return: those in (``since``, ``until``] that match all parts given."""

    tenant: str
    since: int = 0
    until: int | None = None
    object: str | None = None
    kind: str | None = None
    limit: int = 100


class History:
    def __init__(self, path: Path | None, offload: Offload) -> None:
        """Open the file, or a copy in memory when ``path`` is None."""
        self._offload = offload
        self._database = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        # A copy may lose its last moments: they are still in etcd, and are copied again.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)

    async def copied_seq(self) -> int:
        """Return up to which ``seq`` this copy is complete."""
        return await self._offload(self._copied_seq)

    async def append(self, entries: Sequence[HistoryEntry]) -> None:
        """Add entries; those already there are left as they are."""
        rows = [_row(entry) for entry in entries]
        await self._offload(lambda: self._append(rows))

    async def events(self, wanted: EventFilter) -> list[Event]:
        """Return matching events, oldest first."""
        bodies = await self._offload(lambda: self._events(wanted))
        return [entry for entry in bodies if isinstance(entry, Event)]

    async def operation(self, operation_id: str) -> Operation | None:
        entry = await self._offload(lambda: self._by_id(operation_id))
        return entry.operation if isinstance(entry, FinishedOperation) else None

    async def operations(
        self,
        tenant: str,
        target: str | None,
        limit: int,
        *,
        before: str | None = None,
        until: int | None = None,
    ) -> list[Operation]:
        """Return operations ended by ``until``, newest first: those with an id below ``before``."""
        entries = await self._offload(
            lambda: self._operations(tenant, target, limit, before, until)
        )
        return [entry.operation for entry in entries if isinstance(entry, FinishedOperation)]

    async def close(self) -> None:
        await self._offload(self._database.close)

    def _copied_seq(self) -> int:
        (seq,) = self._database.execute("SELECT coalesce(max(seq), 0) FROM history").fetchone()
        return int(seq)

    def _append(self, rows: list[tuple[object, ...]]) -> None:
        with self._database:
            self._database.executemany(
                "INSERT OR IGNORE INTO history VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )

    def _events(self, wanted: EventFilter) -> list[HistoryEntry]:
        conditions = ["type = 'event'", "tenant = ?", "seq > ?"]
        values: list[object] = [wanted.tenant, wanted.since]
        if wanted.until is not None:
            conditions.append("seq <= ?")
            values.append(wanted.until)
        if wanted.object is not None:
            conditions.append("object = ?")
            values.append(wanted.object)
        if wanted.kind is not None:
            conditions.append("kind = ?")
            values.append(wanted.kind)
        return self._select(
            f"SELECT body FROM history WHERE {' AND '.join(conditions)} ORDER BY seq LIMIT ?",
            [*values, min(wanted.limit, PAGE_MAX)],
        )

    def _operations(
        self,
        tenant: str,
        target: str | None,
        limit: int,
        before: str | None,
        until: int | None,
    ) -> list[HistoryEntry]:
        # Both bounds of the id keep the walk down the index among operations.
        condition = "id >= 'op-' AND id < ?"
        values: list[object] = ["op." if before is None else before]
        if target is not None:
            condition, values = condition + " AND object = ?", [*values, target]
        if until is not None:
            condition, values = condition + " AND seq <= ?", [*values, until]
        return self._select(
            f"SELECT body FROM history WHERE type = 'operation' AND tenant = ? AND {condition}"
            " ORDER BY id DESC LIMIT ?",
            [tenant, *values, min(limit, PAGE_MAX)],
        )

    def _by_id(self, entry_id: str) -> HistoryEntry | None:
        found = self._select("SELECT body FROM history WHERE id = ? LIMIT 1", [entry_id])
        return found[0] if found else None

    def _select(self, query: str, values: list[object]) -> list[HistoryEntry]:
        rows = self._database.execute(query, values).fetchall()
        return [unpack(body, HistoryEntry) for (body,) in rows]  # type: ignore[arg-type]


def _row(entry: HistoryEntry) -> tuple[object, ...]:
    body = pack(entry)
    if isinstance(entry, FinishedOperation):
        operation = entry.operation
        return (
            entry.seq,
            "operation",
            operation.id,
            operation.kind,
            operation.target,
            operation.tenant,
            body,
        )
    kind = entry.action if isinstance(entry, AuditRecord) else entry.kind
    table = "audit" if isinstance(entry, AuditRecord) else "event"
    return (entry.seq, table, entry.id, kind, entry.object, entry.tenant, body)
