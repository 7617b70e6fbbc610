"""The virtual loop: time jumps, nothing waits, one order, no threads."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.sim.clocks import HostClock
from tests.sim.process import Process
from tests.sim.virtual_loop import BusyLoop, Deadlock, VirtualLoop, run_virtual, true_time_s


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


def test_timers_that_are_due_together_run_in_the_order_they_were_set() -> None:
    async def main() -> list[int]:
        ran: list[int] = []
        loop = asyncio.get_running_loop()
        timers = [loop.call_at(5.0, ran.append, number) for number in range(500)]
        for timer in timers[::2]:
            timer.cancel()
        await asyncio.sleep(6)
        return ran

    assert run_virtual(main()) == list(range(1, 500, 2))


def test_a_clock_that_runs_fast_shows_more_and_fires_earlier() -> None:
    async def main() -> list[tuple[float, float]]:
        seen: list[tuple[float, float]] = []
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        fast = Process("fast", "fast.1")

        async def sleep() -> None:
            for _ in range(2):
                await asyncio.sleep(110)
                seen.append((loop.time(), true_time_s()))

        loop.change_rate(fast.clock, 1.1)
        await fast.spawn(sleep(), "sleep")
        return seen

    for (own_s, true_s), passed in zip(run_virtual(main()), (1, 2), strict=True):
        assert own_s >= passed * 110
        assert true_s == pytest.approx(passed * 100)


def test_timers_follow_a_clock_whose_rate_changes() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        process = Process("drifting", "drifting.1")
        sleeping = process.spawn(asyncio.sleep(100), "sleep")
        await asyncio.sleep(50)
        loop.change_rate(process.clock, 0.5)
        await asyncio.sleep(20)
        loop.change_rate(process.clock, 1.0)
        await sleeping
        return loop.time()

    # 50 s, 10 in the next 20, and 40 more.
    assert run_virtual(main()) == pytest.approx(110)


def test_what_has_passed_stays_passed_when_a_clock_changes_its_rate() -> None:
    clock = HostClock()
    clock.run_at(2.0, 100.0)
    clock.run_at(0.5, 110.0)
    assert clock.own_s(110.0) == 120.0
    assert clock.own_s(112.0) == 121.0
    assert clock.own_s(clock.true_s(133.3)) >= 133.3
