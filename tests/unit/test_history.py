"""A replica's copy of history: idempotent, ordered, filtered by tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.store.history import PAGE_MAX, EventFilter, History
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

    found = await history.events(EventFilter(tenant="default"))
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
        chosen = EventFilter(**{"tenant": "default", **wanted})  # type: ignore[arg-type]
        return [entry.seq for entry in await history.events(chosen)]

    assert await seqs() == [1, 2, 3, 7]
    assert await seqs(since=2) == [3, 7]
    assert await seqs(object="vm-2") == [3]
    assert await seqs(kind="vm.crashed") == [2]
    assert await seqs(limit=2) == [1, 2]
    assert await seqs(tenant="other") == [4]
    assert await seqs(tenant="nobody") == []


async def test_finished_operations_are_found_newest_first(history: History) -> None:
    await history.append(
        [finished(1), finished(2, of="vm-2"), finished(3), finished(4, tenant="other"), event(5)]
    )

    assert await history.operation("op-0002") == finished(2, of="vm-2").operation
    assert await history.operation("op-none") is None
    assert await history.operation("event-5") is None
    found = await history.operations("default", None, 10)
    assert [operation.id for operation in found] == ["op-0003", "op-0002", "op-0001"]
    found = await history.operations("default", "vm-1", 10, before="op-0003")
    assert [operation.id for operation in found] == ["op-0001"]
    assert len(await history.operations("default", None, 2)) == 2


async def test_a_page_is_bounded(history: History) -> None:
    await history.append([event(seq) for seq in range(1, PAGE_MAX + 10)])

    found = await history.events(EventFilter(tenant="default", limit=10**6))
    assert len(found) == PAGE_MAX


async def test_the_copy_outlives_the_process(tmp_path: Path) -> None:
    first = History(tmp_path / "history.db", inline)
    assert await first.copied_seq() == 0
    await first.append([event(1), finished(2)])
    await first.close()
    second = History(tmp_path / "history.db", inline)

    assert await second.copied_seq() == 2
    assert await second.events(EventFilter(tenant="default")) == [event(1)]
    await second.close()
