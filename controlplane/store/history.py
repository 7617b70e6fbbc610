"""A replica's own copy of history, in SQLite: events, audit records, finished operations.

It is a projection: every entry was committed to etcd first, under a dense ``seq``, and is copied
from there. Losing the file loses nothing that another replica or etcd still has. Work runs through
the handed-in ``offload`` (one thread in production), never on the event loop. Whatever SQLite has
against it leaves here as ``Unavailable``: a projection that cannot be written is no reason to stop.
"""

from __future__ import annotations

import enum
import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import msgspec

from shared.codec import pack, unpack
from shared.errors import Unavailable
from shared.model import AuditRecord, FinishedOperation, HistoryEntry, Operation
from shared.offload import Offload

T = TypeVar("T")

# What one query may return; the API's pages are smaller.
PAGE_MAX = 1000
# Rows that go in one transaction. It takes about 10 ms, in which the thread answers nobody.
FORGET_MAX = 1000
# Only a person with a tool of SQLite's holds this file, and the thread answers nobody meanwhile.
BUSY_TIMEOUT_S = 1.0
# Ends a term that stands for all kinds that begin so: ``vm.*``.
ALL_BELOW = ".*"

# Each index answers one of the queries below in order, so that none sorts or looks at what it does
# not return; ``test_history`` asks SQLite whether that is so.
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
CREATE INDEX IF NOT EXISTS event_by_kind ON history (kind, seq) WHERE type = 'event';
CREATE INDEX IF NOT EXISTS audit_by_kind ON history (kind, seq) WHERE type = 'audit';
CREATE INDEX IF NOT EXISTS audit_by_seq ON history (seq) WHERE type = 'audit';
CREATE INDEX IF NOT EXISTS operation_by_kind ON history (kind, id) WHERE type = 'operation';
CREATE INDEX IF NOT EXISTS operation_by_target ON history (object, id) WHERE type = 'operation';
"""

# Primary result codes of SQLite that pass by themselves, or once there is room on the disk (a full
# one is an I/O error when the file is opened). A replica starts and serves in spite of them.
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another process holds it: end that",
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_IOERR: "see whether its disk is full or broken",
    sqlite3.SQLITE_CANTOPEN: "this replica's user must be able to read and write it",
    sqlite3.SQLITE_READONLY: "this replica's user must be able to read and write it",
}
_REMEDY_ELSE = (
    "with this replica stopped, move the file away: it is a copy, and what etcd still has is"
    " copied again"
)
_PRIMARY_CODE_MASK = 0xFF


class EntryType(enum.StrEnum):
    EVENT = "event"
    AUDIT = "audit"
    OPERATION = "operation"


class EntryFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which events or audit records: those in (``since``, ``until``] that match all parts given.

    ``kinds`` are names, or all below one (``vm.*``); an audit record's kind is its action.
    ``newest``: of more than ``limit``, the newest instead of the oldest.
    """

    type: EntryType = EntryType.EVENT
    tenant: str
    since: int = 0
    until: int | None = None
    objects: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    limit: int = 100
    newest: bool = False


class OperationFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which finished operations: with an id below ``before``, and ended by ``until``."""

    tenant: str
    target: str | None = None
    kinds: tuple[str, ...] = ()
    before: str | None = None
    until: int | None = None
    limit: int = 100


class Reach(msgspec.Struct, frozen=True):
    """From which ``seq`` to which a copy holds all of history; an empty one ends at 0."""

    first: int
    last: int


class History:
    """Every method raises Unavailable while SQLite cannot do what it is for."""

    def __init__(self, path: Path | None, offload: Offload) -> None:
        """Open the file, or a copy in memory when ``path`` is None.

        Raises Unavailable for a file that will never do; one that is locked, or has no room on its
        disk, is tried again with each piece of work.
        """
        self._offload = offload
        self._path = path
        self._dense_from: int | None = None
        self._is_prepared = False
        try:
            self._database = sqlite3.connect(
                path or ":memory:", timeout=BUSY_TIMEOUT_S, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            if _primary_code(error) not in _PASSING:
                self._database.close()
                raise self._unavailable(error) from error

    async def copied_seq(self) -> int:
        """Return up to which ``seq`` this copy is complete."""
        return await self._in_file(self._copied_seq)

    async def reach(self) -> Reach:
        """Return the newest part of history that this copy holds without a gap."""
        return await self._in_file(self._reach)

    async def append(self, entries: Sequence[HistoryEntry]) -> None:
        """Add entries, oldest first; those already there are left as they are."""
        rows = [_row(entry) for entry in entries]
        await self._in_file(lambda: self._append(rows))

    async def forget(self, before: datetime, below: int) -> int:
        """Delete the oldest entries, up to the first that is not of ``before``; tell how many.

        Those are ``FORGET_MAX`` at most, each with a ``seq`` under ``below``. The newest entry
        always stays: it tells up to where the copy is complete. The file does not shrink; what
        comes next takes the room.
        """
        return await self._in_file(lambda: self._forget(before, below))

    async def segment(self, after: int, until: int, limit: int) -> tuple[HistoryEntry, ...]:
        """Return the oldest in (``after``, ``until``], up to the first gap among them."""
        return await self._in_file(lambda: self._segment(after, until, limit))

    async def entries(self, wanted: EntryFilter) -> list[HistoryEntry]:
        """Return matching events or audit records, oldest first."""
        return await self._in_file(lambda: self._entries(wanted))

    async def operation(self, operation_id: str) -> Operation | None:
        entry = await self._in_file(lambda: self._by_id(operation_id))
        return entry.operation if isinstance(entry, FinishedOperation) else None

    async def operations(self, wanted: OperationFilter) -> list[Operation]:
        """Return matching operations, newest first."""
        entries = await self._in_file(lambda: self._operations(wanted))
        return [entry.operation for entry in entries if isinstance(entry, FinishedOperation)]

    async def bodies(self, after: int, until: int) -> list[tuple[int, bytes]]:
        """Return entries of ``seq`` in (``after``, ``until``] as they were packed, oldest first.

        At most ``PAGE_MAX`` of them.
        """
        query = "SELECT seq, body FROM history WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
        return await self._in_file(
            lambda: self._database.execute(query, (after, until, PAGE_MAX)).fetchall()
        )

    async def close(self) -> None:
        await self._offload(self._database.close)

    async def _in_file(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; the one place where SQLite's errors become ours."""

        def prepared() -> T:
            if not self._is_prepared:
                self._prepare()
            return work()

        try:
            return await self._offload(prepared)
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    def _prepare(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        # The leader trims from etcd what was copied, so a copy must outlive a loss of power:
        # NORMAL would leave the last commits to the kernel. It costs one fsync a batch.
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)
        self._is_prepared = True

    def _unavailable(self, error: sqlite3.Error) -> Unavailable:
        remedy = _REMEDIES.get(_primary_code(error), _REMEDY_ELSE)
        return Unavailable(
            f"the copy of history {self._path or 'in memory'} cannot be used: {error}; {remedy}"
        )

    def _copied_seq(self) -> int:
        (seq,) = self._database.execute("SELECT coalesce(max(seq), 0) FROM history").fetchone()
        return int(seq)

    def _reach(self) -> Reach:
        if self._dense_from is None:
            # Looks at every row, once in a process: a second where there are a million.
            found = self._database.execute(
                "SELECT seq FROM history AS here WHERE NOT EXISTS"
                " (SELECT 1 FROM history WHERE seq = here.seq - 1) ORDER BY seq DESC LIMIT 1"
            ).fetchone()
            self._dense_from = 1 if found is None else int(found[0])
        return Reach(self._dense_from, self._copied_seq())

    def _append(self, rows: list[tuple[object, ...]]) -> None:
        if rows and int(str(rows[0][0])) > self._copied_seq() + 1:
            self._dense_from = None
        with self._database:
            self._database.executemany(
                "INSERT OR IGNORE INTO history VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )

    def _segment(self, after: int, until: int, limit: int) -> tuple[HistoryEntry, ...]:
        rows = self._database.execute(
            "SELECT seq, body FROM history WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
            (after, until, limit),
        ).fetchall()
        dense = takewhile(lambda row: row[1][0] == rows[0][0] + row[0], enumerate(rows))
        return tuple(_entry(body) for _, (_, body) in dense)

    def _forget(self, before: datetime, below: int) -> int:
        oldest = self._database.execute(
            "SELECT seq, body FROM history WHERE seq < min(?, (SELECT max(seq) FROM history))"
            " ORDER BY seq LIMIT ?",
            (below, FORGET_MAX),
        ).fetchall()
        old = list(takewhile(lambda row: _time(_entry(row[1])) < before, oldest))
        if not old:
            return 0
        with self._database:
            self._database.execute("DELETE FROM history WHERE seq <= ?", (old[-1][0],))
        if self._dense_from is not None:
            (first,) = self._database.execute("SELECT min(seq) FROM history").fetchone()
            self._dense_from = max(self._dense_from, int(first))
        return len(old)

    def _entries(self, wanted: EntryFilter) -> list[HistoryEntry]:
        newest = wanted.newest
        query = _Query(wanted.type, wanted.tenant, "seq", wanted.limit, descending=newest)
        query.where("seq > ?", wanted.since)
        if wanted.until is not None:
            query.where("seq <= ?", wanted.until)
        kinds = self._kinds(wanted.type, wanted.kinds)
        if wanted.objects:
            query.any_of("object", wanted.objects)
            query.where_in("kind", kinds)
        else:
            query.any_of("kind", kinds)
        found = self._run(query)
        return found[::-1] if newest else found

    def _operations(self, wanted: OperationFilter) -> list[HistoryEntry]:
        query = _Query(EntryType.OPERATION, wanted.tenant, "id", wanted.limit, descending=True)
        # Both bounds of the id keep the walk down the index among operations.
        query.where("id >= ?", "op-")
        query.where("id < ?", "op." if wanted.before is None else wanted.before)
        if wanted.until is not None:
            query.where("seq <= ?", wanted.until)
        kinds = self._kinds(EntryType.OPERATION, wanted.kinds)
        if wanted.target is not None:
            query.any_of("object", (wanted.target,))
            query.where_in("kind", kinds)
        else:
            query.any_of("kind", kinds)
        return self._run(query)

    def _kinds(self, entry_type: EntryType, terms: Sequence[str]) -> tuple[str, ...] | None:
        """Return the kinds that terms stand for and that are there; None when all will do."""
        if not terms:
            return None
        found: dict[str, None] = {}
        for term in terms:
            if term.endswith(ALL_BELOW):
                found.update(dict.fromkeys(self._kinds_below(entry_type, term)))
            else:
                found[term] = None
        return tuple(found)

    def _kinds_below(self, entry_type: EntryType, term: str) -> list[str]:
        """Step from one kind to the next by the index: there are few kinds and many rows."""
        prefix = term.removesuffix("*")
        # The character after the dot ends what begins with the prefix.
        last, end = prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found: list[str] = []
        query = (
            f"SELECT min(kind) FROM history WHERE type = '{entry_type}' AND kind > ? AND kind < ?"
        )
        while True:
            (kind,) = self._database.execute(query, (last, end)).fetchone()
            if kind is None:
                return found
            found.append(kind)
            last = kind

    def _by_id(self, entry_id: str) -> HistoryEntry | None:
        found = self._database.execute(
            "SELECT body FROM history WHERE id = ? LIMIT 1", (entry_id,)
        ).fetchone()
        return None if found is None else _entry(found[0])

    def _run(self, query: _Query) -> list[HistoryEntry]:
        text, values = query.finished()
        return [] if not text else [_entry(b) for _, b in self._database.execute(text, values)]


class _Query:
    """One query, put together: a part for each value of ``any_of``, merged in order.

    A part each is what lets SQLite walk an index in order and stop at the limit; ``IN`` would make
    it read all matches and sort them.
    """

    def __init__(
        self,
        entry_type: EntryType,
        tenant: str,
        order: str,
        limit: int,
        *,
        descending: bool = False,
    ) -> None:
        # The type stands in the text: only so does SQLite see that a partial index will do.
        self._conditions = [f"type = '{entry_type}'", "tenant = ?"]
        self._values: list[object] = [tenant]
        self._order = f"ORDER BY {order} DESC" if descending else f"ORDER BY {order}"
        self._columns = f"{order}, body"
        self._limit = min(limit, PAGE_MAX)
        self._parts: tuple[str, Sequence[object]] | None = None

    def where(self, condition: str, value: object) -> None:
        self._conditions.append(condition)
        self._values.append(value)

    def where_in(self, column: str, values: Sequence[object] | None) -> None:
        """Let only these values of a column pass; None: all."""
        if values is not None:
            marks = ", ".join("?" * len(values))
            self._conditions.append(f"{column} IN ({marks})")
            self._values += values

    def any_of(self, column: str, values: Sequence[object] | None) -> None:
        """Walk along these values of a column, each by itself; None: along none."""
        if values is not None:
            self._parts = (column, tuple(dict.fromkeys(values)))

    def finished(self) -> tuple[str, list[object]]:
        """Return the text and its values; no text when nothing can match."""
        column, each = self._parts or ("", (None,))
        conditions = [*self._conditions, *([f"{column} = ?"] if column else [])]
        part = f"SELECT {self._columns} FROM history WHERE {' AND '.join(conditions)}"
        part = f"SELECT * FROM ({part} {self._order} LIMIT {self._limit})"
        values = [v for one in each for v in (*self._values, *([one] if column else []))]
        text = " UNION ALL ".join([part] * len(each))
        return (f"{text} {self._order} LIMIT {self._limit}" if text else ""), values


def kind_matches(kind: str, terms: Sequence[str]) -> bool:
    """Tell whether a kind is one of the terms, or below one; no terms let all pass."""
    if not terms or kind in terms:
        return True
    return any(t.endswith(ALL_BELOW) and kind.startswith(t.removesuffix("*")) for t in terms)


def _primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's result code without its details; 0 where Python itself refused."""
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE_MASK


def _time(entry: HistoryEntry) -> datetime:
    """Return when it happened; an operation, when it ended."""
    return entry.operation.updated_at if isinstance(entry, FinishedOperation) else entry.at


def _entry(body: bytes) -> HistoryEntry:
    return unpack(body, HistoryEntry)  # type: ignore[arg-type]


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
