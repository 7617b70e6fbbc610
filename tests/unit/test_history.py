"""A replica's copy of history: idempotent, ordered, filtered by tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from controlplane.store.history import (
    FORGET_MAX,
    PAGE_MAX,
    EntryFilter,
    EntryType,
    History,
    OperationFilter,
    Reach,
    kind_matches,
)
from shared.model import AuditRecord, Event, FinishedOperation, Operation
from shared.offload import inline
from tests.unit.core_world import BORN


def event(seq: int, kind: str = "vm.running", of: str = "vm-1", tenant: str = "default") -> Event:
    return Event(
        seq=seq, id=f"event-{seq}", kind=kind, object=of, tenant=tenant, at=BORN, by="leader"
    )


def finished(seq: int, of: str = "vm-1", tenant: str = "default") -> FinishedOperation:
    operation = Operation(
        id=f"op-{seq:04d}",
        kind="vm.start",
        target=of,
        tenant=tenant,
        by="user-1",
        created_at=BORN,
        updated_at=BORN,
        deadline_at=BORN,
    )
    return FinishedOperation(seq=seq, operation=operation)


@pytest.fixture
async def history() -> AsyncIterator[History]:
    made = History(None, inline)
    yield made
    await made.close()


async def test_what_is_appended_twice_is_there_once(history: History) -> None:
    entries = [event(1), event(2)]
    await history.append(entries)
    await history.append([*entries, event(3)])

    found = await history.entries(EntryFilter(tenant="default"))
    assert found == [event(1), event(2), event(3)]
    assert await history.copied_seq() == 3


async def test_events_are_filtered(history: History) -> None:
    await history.append(
        [
            event(1),
            event(2, kind="vm.crashed"),
            event(3, of="vm-2"),
            event(4, tenant="other"),
            AuditRecord(seq=5, id="audit-5", action="vm.start", object="vm-1", at=BORN, by="u"),
            finished(6),
            event(7),
        ]
    )

    async def seqs(**wanted: object) -> list[int]:
        chosen = EntryFilter(**{"tenant": "default", **wanted})  # type: ignore[arg-type]
        return [entry.seq for entry in await history.entries(chosen)]

    assert await seqs() == [1, 2, 3, 7]
    assert await seqs(since=2) == [3, 7]
    assert await seqs(until=2) == [1, 2]
    assert await seqs(objects=("vm-2",)) == [3]
    assert await seqs(objects=("vm-2", "vm-1", "vm-2")) == [1, 2, 3, 7]
    assert await seqs(objects=("vm-1",), kinds=("vm.crashed", "node.*")) == [2]
    assert await seqs(kinds=("vm.crashed",)) == [2]
    assert await seqs(kinds=("vm.running", "vm.*"), limit=3) == [1, 2, 3]
    assert await seqs(kinds=("vm.*",), since=1) == [2, 3, 7]
    assert await seqs(kinds=("v.*", "vm.cra.*", "node.*")) == []
    assert await seqs(type=EntryType.AUDIT) == [5]
    assert await seqs(type=EntryType.AUDIT, kinds=("vm.start",), objects=("vm-1",)) == [5]
    assert await seqs(type=EntryType.AUDIT, kinds=("vm.*",)) == [5]
    assert await seqs(limit=2) == [1, 2]
    assert await seqs(limit=2, newest=True) == [3, 7]
    assert await seqs(limit=2, newest=True, until=6) == [2, 3]
    assert await seqs(limit=2, newest=True, kinds=("vm.*",)) == [3, 7]
    assert await seqs(limit=2, newest=True, objects=("vm-1", "vm-2")) == [3, 7]
    assert await seqs(limit=1, newest=True, objects=("vm-1",), kinds=("vm.crashed",)) == [2]
    assert await seqs(limit=9, newest=True, since=1) == [2, 3, 7]
    assert await seqs(tenant="other") == [4]
    assert await seqs(tenant="nobody") == []


async def test_finished_operations_are_found_newest_first(history: History) -> None:
    await history.append(
        [finished(1), finished(2, of="vm-2"), finished(3), finished(4, tenant="other"), event(5)]
    )

    assert await history.operation("op-0002") == finished(2, of="vm-2").operation
    assert await history.operation("op-none") is None
    assert await history.operation("event-5") is None

    async def ids(**wanted: object) -> list[str]:
        chosen = OperationFilter(**{"tenant": "default", **wanted})  # type: ignore[arg-type]
        return [operation.id for operation in await history.operations(chosen)]

    assert await ids() == ["op-0003", "op-0002", "op-0001"]
    assert await ids(target="vm-1", before="op-0003") == ["op-0001"]
    assert await ids(until=2) == ["op-0002", "op-0001"]
    assert await ids(limit=2) == ["op-0003", "op-0002"]
    assert await ids(kinds=("vm.start",), limit=1) == ["op-0003"]
    assert await ids(kinds=("vm.*",), target="vm-2") == ["op-0002"]
    assert await ids(kinds=("vm.stop",)) == await ids(kinds=("node.*",)) == []


async def test_a_page_is_bounded(history: History) -> None:
    await history.append([event(seq) for seq in range(1, PAGE_MAX + 10)])

    found = await history.entries(EntryFilter(tenant="default", limit=10**6))
    assert len(found) == PAGE_MAX


async def test_the_copy_outlives_the_process(tmp_path: Path) -> None:
    first = History(tmp_path / "history.db", inline)
    assert await first.copied_seq() == 0
    await first.append([event(1), finished(2)])
    await first.close()
    second = History(tmp_path / "history.db", inline)

    assert await second.copied_seq() == 2
    assert await second.entries(EntryFilter(tenant="default")) == [event(1)]
    await second.close()


async def test_a_copy_knows_from_where_on_it_is_whole(tmp_path: Path) -> None:
    history = History(tmp_path / "history.db", inline)
    assert await history.reach() == Reach(1, 0)
    await history.append([event(1), event(2)])
    assert await history.reach() == Reach(1, 2)
    await history.append([event(5), event(6)])
    assert await history.reach() == Reach(5, 6)
    await history.append([event(6), event(7)])
    assert await history.reach() == Reach(5, 7)
    await history.close()
    again = History(tmp_path / "history.db", inline)
    assert await again.reach() == Reach(5, 7)
    await again.close()


async def test_a_copy_is_on_disk_before_it_counts(tmp_path: Path) -> None:
    """What was copied is trimmed from etcd: 2 is FULL, an fsync with each commit."""
    history = History(tmp_path / "history.db", inline)
    assert history._database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert history._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await history.close()


async def test_the_oldest_are_forgotten_up_to_the_first_that_is_younger(history: History) -> None:
    later = BORN + timedelta(days=1)
    old = finished(2)
    ended_late = replace(finished(4).operation, updated_at=later)
    audit = AuditRecord(seq=3, id="audit-3", action="vm.start", object="vm-1", at=BORN, by="u")
    young = replace(finished(4), operation=ended_late)
    await history.append([event(1), old, audit, young, event(5), event(6)])

    assert await history.forget(BORN, below=100) == 0
    assert await history.forget(later, below=3) == 2
    assert await history.operation(old.operation.id) is None
    assert await history.forget(later, below=100) == 1
    assert await history.forget(later, below=100) == 0, "an operation is as old as its end"
    assert await history.operation(young.operation.id) == ended_late
    assert [entry.seq for entry in await history.entries(EntryFilter(tenant="default"))] == [5, 6]


async def test_the_newest_entry_is_never_forgotten(history: History) -> None:
    for first in (1, FORGET_MAX + 1):
        await history.append([event(seq) for seq in range(first, first + FORGET_MAX)])
    long_after, last = BORN + timedelta(days=1000), 2 * FORGET_MAX

    forgotten = [await history.forget(long_after, below=10**6) for _ in range(3)]
    assert forgotten == [FORGET_MAX, FORGET_MAX - 1, 0]
    assert await history.copied_seq() == last
    assert await history.reach() == Reach(last, last)


async def test_what_is_forgotten_is_out_of_reach(tmp_path: Path) -> None:
    history = History(tmp_path / "history.db", inline)
    await history.append([event(1), event(2), event(5), event(6), event(7)])
    later = BORN + timedelta(days=1)
    asked: list[str] = []
    assert await history.reach() == Reach(5, 7)
    history._database.set_trace_callback(asked.append)
    for below, reach in ((3, Reach(5, 7)), (5, Reach(5, 7)), (6, Reach(6, 7))):
        await history.forget(later, below)
        assert await history.reach() == reach
    assert not [query for query in asked if "EXISTS" in query], "it does not look through all"
    await history.append([event(8)])
    assert await history.reach() == Reach(6, 8)
    await history.close()
    again = History(tmp_path / "history.db", inline)
    assert await again.reach() == Reach(6, 8)
    await again.forget(later, below=7)
    assert await again.reach() == Reach(7, 8)
    await again.close()


@pytest.mark.parametrize(
    "wanted",
    [
        EntryFilter(tenant="default", since=5, until=9),
        EntryFilter(tenant="default", kinds=("vm.running",)),
        EntryFilter(tenant="default", kinds=("vm.*", "node.*")),
        EntryFilter(tenant="default", objects=("vm-1", "vm-2"), kinds=("vm.*",)),
        EntryFilter(tenant="default", until=9, newest=True),
        EntryFilter(tenant="default", kinds=("vm.running",), until=9, newest=True),
        EntryFilter(tenant="default", kinds=("vm.*", "node.*"), until=9, newest=True),
        EntryFilter(tenant="default", objects=("vm-1", "vm-2"), until=9, newest=True),
        EntryFilter(tenant="default", objects=("vm-1",), kinds=("vm.*",), newest=True),
        EntryFilter(tenant="default", type=EntryType.AUDIT),
        EntryFilter(tenant="default", type=EntryType.AUDIT, kinds=("vm.start",)),
        EntryFilter(tenant="default", type=EntryType.AUDIT, objects=("vm-1",)),
        OperationFilter(tenant="default", until=9),
        OperationFilter(tenant="default", kinds=("vm.*",), before="op-0003"),
        OperationFilter(tenant="default", target="vm-1", kinds=("vm.start",)),
    ],
)
async def test_no_query_looks_at_what_it_does_not_return(
    history: History, wanted: EntryFilter | OperationFilter
) -> None:
    """SQLite says how it goes about each query: along an index, without sorting what it found."""
    await history.append([event(1), event(2, kind="vm.crashed"), event(3, kind="node.silent")])
    await history.append([finished(4), finished(5)])
    asked: list[str] = []
    database = history._database
    database.set_trace_callback(asked.append)
    if isinstance(wanted, EntryFilter):
        await history.entries(wanted)
    else:
        await history.operations(wanted)
    database.set_trace_callback(None)
    assert asked
    for query in asked:
        steps = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {query}")]
        inner = [step for step in steps if "history" in step]
        assert inner
        assert all(step.startswith("SEARCH history USING") for step in inner), steps
        by_kind = "kind = " in query and wanted.kinds
        whole = "USING INTEGER PRIMARY KEY" in " ".join(inner)
        assert not (by_kind and whole), steps


@pytest.mark.parametrize(
    ("kind", "terms", "matches"),
    [
        ("vm.running", (), True),
        ("vm.running", ("vm.running",), True),
        ("vm.running", ("node.ready", "vm.*"), True),
        ("vm.running", ("vm.run.*", "v.*", "vm"), False),
        ("vmx.running", ("vm.*",), False),
    ],
)
def test_kinds_are_named_or_lie_below_a_name(
    kind: str, terms: tuple[str, ...], matches: bool
) -> None:
    assert kind_matches(kind, terms) is matches
