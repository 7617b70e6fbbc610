"""The queue that is every VM's lock."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from agent.workqueue import WorkQueue
from tests.sim.virtual_loop import run_virtual


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


async def waits(queue: WorkQueue) -> bool:
    """Return whether nothing can be taken now."""
    try:
        async with asyncio.timeout(0.01):
            key = await queue.take()
    except TimeoutError:
        return True
    queue.done(key)
    return False


async def test_a_key_is_queued_once() -> None:
    queue = WorkQueue()
    for key in ("a", "b", "a"):
        queue.add(key)

    assert [await queue.take(), await queue.take()] == ["a", "b"]
    assert await waits(queue)


async def test_a_key_added_while_it_is_worked_on_comes_back_afterwards() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert await queue.take() == "a"
    queue.add("a")
    queue.add("a")
    assert await waits(queue), "one worker per key"
    queue.done("a")

    assert await queue.take() == "a"
    queue.done("a")
    assert await waits(queue)


def test_many_workers_never_share_a_key_and_miss_nothing() -> None:
    async def main() -> None:
        queue = WorkQueue()
        working: set[str] = set()
        latest = dict.fromkeys("abc", 0)
        seen = dict.fromkeys("abc", 0)

        async def work() -> None:
            while True:
                key = await queue.take()
                assert key not in working
                working.add(key)
                seen[key] = latest[key]
                await asyncio.sleep(0.3)
                working.discard(key)
                queue.done(key)

        workers = [asyncio.ensure_future(work()) for _ in range(4)]
        for turn in range(60):
            key = "abc"[turn % 3]
            latest[key] += 1
            queue.add(key)
            await asyncio.sleep(0.05)
        await asyncio.sleep(5)
        assert seen == latest
        for worker in workers:
            worker.cancel()
        ends = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)

    virtual(main())


def test_of_several_delays_the_earliest_counts() -> None:
    async def main() -> None:
        queue, loop = WorkQueue(), asyncio.get_running_loop()
        for delay_s in (9, 3, 6):
            queue.add_after("a", delay_s)
        await queue.take()
        assert loop.time() == 3
        queue.done("a")
        queue.add_after("a", 1)
        queue.close()
        assert await waits(queue)

    virtual(main())


async def test_what_is_touched_in_a_block_is_known_at_its_end() -> None:
    queue = WorkQueue()
    for key in ("before", "during"):
        queue.add(key)
    await queue.take()
    with queue.touched() as touched:
        queue.done("before")
        queue.done(await queue.take())
    queue.add("after")
    await queue.take()

    assert touched == {"before", "during"}


async def test_what_is_worked_on_now_is_waited_for_and_nothing_that_comes_later() -> None:
    queue = WorkQueue()
    await queue.finished()
    for key in ("now", "later"):
        queue.add(key)
    assert await queue.take() == "now"
    finished = asyncio.ensure_future(queue.finished())
    await asyncio.sleep(0)
    assert await queue.take() == "later"
    await asyncio.sleep(0)
    assert not finished.done()
    queue.add("now")
    queue.done("now")
    await finished
