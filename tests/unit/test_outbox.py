"""The outbox: order, numbers, acknowledgement, and what happens while nobody answers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import outbox as module
from agent.outbox import Outbox
from shared.model import Sample


def samples(count: int, at: float = 0.0) -> list[Sample]:
    return [Sample(object=f"vm-{i}", at=at) for i in range(count)]


def filled(batches: int, retention_batches: int = 30) -> Outbox:
    outbox = Outbox(batch_period_s=1.0, retention_s=float(retention_batches))
    for i in range(1, batches + 1):
        outbox.add(samples(2, at=float(i)))
        outbox.seal()
    return outbox


async def numbers(outbox: Outbox, count: int) -> list[int]:
    return [(await outbox.next_batch()).number for _ in range(count)]


def read_next(outbox: Outbox) -> int | None:
    """Return the number that ``next_batch`` answers at once, None if it would wait."""
    waiting = outbox.next_batch()
    try:
        waiting.send(None)
    except StopIteration as answer:
        return int(answer.value.number)
    waiting.close()
    return None


async def test_batches_come_in_order_and_once() -> None:
    outbox = filled(3)
    assert await numbers(outbox, 3) == [1, 2, 3]
    assert read_next(outbox) is None
    assert len(outbox) == 3, "handed out is not taken"


async def test_an_empty_batch_is_not_sent() -> None:
    outbox = filled(0)
    outbox.seal()
    assert len(outbox) == 0
    assert read_next(outbox) is None


async def test_the_reader_waits_for_the_next_batch() -> None:
    outbox = filled(0)
    reader = asyncio.create_task(outbox.next_batch())
    outbox.add(samples(1))
    await asyncio.sleep(0)
    assert not reader.done(), "the batch is still open"
    outbox.seal()
    assert (await reader).samples == tuple(samples(1))


async def test_acknowledgement_is_cumulative_and_never_runs_ahead() -> None:
    outbox = filled(5)
    await numbers(outbox, 3)
    outbox.acknowledge(2)
    assert len(outbox) == 3
    outbox.acknowledge(1)
    assert len(outbox) == 3
    outbox.acknowledge(99)
    assert len(outbox) == 2, "batches 4 and 5 were never handed out"
    assert await numbers(outbox, 2) == [4, 5]


async def test_after_a_rewind_what_was_not_acknowledged_comes_again() -> None:
    outbox = filled(4)
    await numbers(outbox, 3)
    outbox.acknowledge(1)
    outbox.rewind()
    assert await numbers(outbox, 3) == [2, 3, 4]
    outbox.rewind()
    outbox.acknowledge(4)
    assert len(outbox) == 3, "an answer of the connection before"


async def test_the_oldest_makes_room_and_is_counted() -> None:
    outbox = filled(7, retention_batches=3)
    assert (len(outbox), outbox.dropped) == (3, 8)
    batch = await outbox.next_batch()
    assert (batch.number, batch.dropped) == (5, 8)


async def test_dropping_what_was_handed_out_does_not_repeat_or_skip() -> None:
    outbox = filled(3, retention_batches=3)
    await numbers(outbox, 2)
    for _ in range(2):
        outbox.add(samples(1))
        outbox.seal()
    assert await numbers(outbox, 3) == [3, 4, 5]
    outbox.rewind()
    assert await numbers(outbox, 3) == [3, 4, 5]


async def test_samples_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES_MAX", 5)
    outbox = filled(4)
    assert (len(outbox), outbox.dropped) == (2, 4)


async def test_a_full_batch_is_sealed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SAMPLES_MAX", 3)
    outbox = filled(0)
    outbox.add(samples(7))
    outbox.seal()
    sizes = [len((await outbox.next_batch()).samples) for _ in range(3)]
    assert sizes == [3, 3, 1]


@given(st.lists(st.sampled_from(["fill", "fill", "read", "acknowledge", "rewind"]), max_size=60))
def test_nothing_is_lost_but_what_is_counted(steps: list[str]) -> None:
    """Whatever comes in whatever order: each sample is acknowledged, waiting or counted."""

    async def story() -> None:
        outbox = filled(0, retention_batches=4)
        read: list[int] = []
        made = taken = 0
        for step in steps:
            waiting = len(outbox)
            if step == "fill":
                made += 1
                outbox.add(samples(1))
                outbox.seal()
            elif step == "rewind":
                outbox.rewind()
                read = []
            elif step == "acknowledge":
                outbox.acknowledge(read[-1] if read else made)
                taken += waiting - len(outbox)
            elif (number := read_next(outbox)) is not None:
                read.append(number)
            assert made == taken + len(outbox) + outbox.dropped
            assert len(outbox) <= 4
            assert read == sorted(set(read)), "in order, none twice without a rewind"

    asyncio.run(story())
