"""The virtual loop: time jumps, nothing waits, one order, no threads."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.sim.virtual_loop import BusyLoop, Deadlock, run_virtual


def test_time_jumps_to_the_next_timer() -> None:
    async def main() -> float:
        await asyncio.sleep(24 * 3600)
        return asyncio.get_running_loop().time()

    began_s = time.process_time()
    assert run_virtual(main()) == 24 * 3600
    assert time.process_time() - began_s < 24 * 3600


def test_timers_fire_in_order_of_time() -> None:
    async def main() -> list[int]:
        done: list[int] = []

        async def after(seconds: int) -> None:
            await asyncio.sleep(seconds)
            done.append(seconds)

        await asyncio.gather(*(after(seconds) for seconds in (5, 1, 3)))
        return done

    assert run_virtual(main()) == [1, 3, 5]


def test_a_timeout_is_virtual_too() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 30


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run_virtual(main())


def test_a_loop_in_which_time_stands_still_is_found() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_soon(again)

        again()
        await asyncio.sleep(1)

    with pytest.raises(BusyLoop):
        run_virtual(main())


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(time.monotonic)

    with pytest.raises(RuntimeError, match="threads are forbidden"):
        run_virtual(main())


def test_sets_of_tasks_have_one_order() -> None:
    async def main() -> list[str]:
        tasks = {asyncio.ensure_future(asyncio.sleep(1)) for _ in range(50)}
        names = {task: str(number) for number, task in enumerate(tasks)}
        done, _ = await asyncio.wait(tasks)
        return [names[task] for task in done]

    assert run_virtual(main()) == run_virtual(main())


def test_what_is_left_running_is_cancelled() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(10**9)
        finally:
            ended.append("cancelled")

    async def main() -> None:
        background = asyncio.ensure_future(endless())
        await asyncio.sleep(1)
        assert not background.done()

    run_virtual(main())
    assert ended == ["cancelled"]
