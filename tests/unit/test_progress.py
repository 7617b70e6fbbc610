"""Progress: the latest figure of each operation, bounded, whoever reads and however slowly."""

from __future__ import annotations

import pytest

from controlplane.telemetry import progress
from controlplane.telemetry.progress import ProgressBoard
from tests.unit.api_world import SteppedClock


@pytest.fixture
def board() -> ProgressBoard:
    return ProgressBoard(SteppedClock())


def test_the_latest_figure_counts(board: ProgressBoard) -> None:
    assert board.latest("op-1") is None
    board.put("op-1", 10.0)
    first = board.latest("op-1")
    board.put("op-1", 20.0, 3.5, bytes_done=1, bytes_total=2)
    last = board.latest("op-1")
    assert first is not None
    assert last is not None
    assert (first.percent, first.eta_s, first.bytes_done) == (10.0, None, None)
    assert (last.percent, last.eta_s, last.bytes_total) == (20.0, 3.5, 2)
    assert last.as_of > first.as_of
    board.forget("op-1")
    board.forget("op-1")
    assert board.latest("op-1") is None


def test_those_that_are_silent_longest_go_first(
    board: ProgressBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "OPERATIONS_MAX", 2)
    for operation in ("a", "b", "a", "c"):
        board.put(operation, 1.0)
    assert board.latest("b") is None
    assert board.latest("a") is not None
    assert board.latest("c") is not None


async def test_a_reader_takes_the_latest_of_each_and_waits_for_more(
    board: ProgressBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WAITING_MAX", 2)
    board.put("before", 1.0)
    reader, other = board.subscribe(), board.subscribe()
    for operation, percent in (("a", 1.0), ("b", 1.0), ("a", 2.0), ("c", 3.0)):
        board.put(operation, percent)
    await reader.wait()
    taken = [(frame.operation, frame.progress.percent) for frame in reader.take()]
    assert taken == [("a", 2.0), ("c", 3.0)]
    assert reader.take() == ()
    reader.close()
    reader.close()
    board.put("d", 1.0)
    assert reader.take() == ()
    assert [frame.operation for frame in other.take()] == ["c", "d"]
