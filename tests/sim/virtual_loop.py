"""An asyncio loop without threads, sockets or waiting: its clock jumps to the next timer.

Owns the order of everything: with the same seed and the same code, the same callbacks run in the
same order. So tasks hash by their number (``asyncio.wait`` and ``TaskGroup`` keep them in sets),
timers that are due together run in the order they were set, and whatever would bring another order
in (a thread, a file descriptor) is refused.

Whoever a callback's context belongs to (``OWNER``) has a clock of its own, and can be stopped: what
is his is then kept, and runs once he goes on.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, Protocol, TypeVar, TypeVarTuple, Unpack, cast

from tests.sim.clocks import HostClock

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

# Turns of the loop while the clock stands still; a whole cluster starts with a few thousand.
STEPS_AT_ONE_TIME_MAX = 200_000
# Cancelled timers are swept once so many of them are half of all.
CANCELLED_TIMERS_MIN = 200


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: what is waited for can never come."""


class BusyLoop(RuntimeError):
    """Something keeps the loop running without ever letting time pass."""


class Owner(Protocol):
    """Whose callbacks these are; ``stopped`` keeps them while it does not run.

    ``steps_left``: before so many more of them are run, it is told that there are no more.
    """

    clock: HostClock
    stopped: deque[asyncio.Handle] | None
    steps_left: int | None

    def out_of_steps(self) -> None: ...


OWNER: contextvars.ContextVar[Owner | None] = contextvars.ContextVar("owner", default=None)


class NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number, so that sets of tasks have one order."""

    def __init__(self, number: int, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Timer(asyncio.TimerHandle):
    """``when`` is by the clock of the owner who has set it; ``waits`` until it is due."""

    __slots__ = ("owner", "waits")
    owner: Owner | None
    waits: bool


TaskMade = Callable[[asyncio.Task[Any]], None]


class VirtualLoop(asyncio.BaseEventLoop):
    """``on_task`` is told of each task, in the context of whoever made it."""

    def __init__(self, on_task: TaskMade | None = None) -> None:
        super().__init__()
        self._now_s = 0.0
        self._tasks_made = 0
        self._timers_set = 0
        self._timers_cancelled = 0
        self._steps = 0
        self._on_task = on_task
        self._clocks_differ = False
        self._watched = 0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, _Timer]] = []
        self.set_task_factory(cast("Any", self._make_task))

    def time(self) -> float:
        """Return the caller's own time in seconds; outside of any owner, the simulation's."""
        if self._clocks_differ:
            owner = OWNER.get()
            if owner is not None:
                return owner.clock.own_s(self._now_s)
        return self._now_s

    def true_time(self) -> float:
        """Return the simulation's time in seconds since the loop was made."""
        return self._now_s

    def change_rate(self, clock: HostClock, rate: float) -> None:
        """Let a clock run faster or slower from now on; its timers follow it."""
        self._clocks_differ = True
        clock.run_at(rate, self._now_s)
        self._timers = [
            (
                clock.true_s(timer.when())
                if timer.owner is not None and timer.owner.clock is clock
                else due_s,
                number,
                timer,
            )
            for due_s, number, timer in self._timers
        ]
        heapq.heapify(self._timers)

    def stop_owner(self, owner: Owner) -> None:
        """Run nothing of an owner from now on; what comes due is kept, in order."""
        if owner.stopped is None:
            owner.stopped = deque()
            self._watched += 1

    def continue_owner(self, owner: Owner) -> None:
        if owner.stopped is not None:
            self._ready.extend(owner.stopped)
            owner.stopped = None
            self._watched -= 1

    def count_steps(self, owner: Owner, steps: int) -> None:
        """Tell an owner when so many of his callbacks have been run: at any await of his."""
        if owner.steps_left is None:
            owner.steps_left = steps
            self._watched += 1

    def call_soon(
        self,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
        owner = OWNER.get()
        timer.owner = owner
        due_s = owner.clock.true_s(when) if self._clocks_differ and owner is not None else when
        self._timers_set += 1
        timer.waits = True
        heapq.heappush(self._timers, (due_s, self._timers_set, timer))
        return timer

    def run_in_executor(self, executor: object, func: object, *args: object) -> NoReturn:
        raise RuntimeError("threads are forbidden under the virtual clock")

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Only asyncio's own hooks call this, from this very thread."""
        return self.call_soon(callback, *args, context=context)

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Coroutine[Any, Any, Any],
        context: contextvars.Context | None = None,
        **options: Any,
    ) -> asyncio.Task[Any]:
        self._tasks_made += 1
        task = NumberedTask(self._tasks_made, coro, loop=loop, context=context, **options)
        if self._on_task is not None:
            if context is None:
                self._on_task(task)
            else:
                context.run(self._on_task, task)
        return task

    # What BaseEventLoop asks of its subclasses, and its one turn, which here waits for nothing.

    def _run_once(self) -> None:
        ready = self._ready
        if not ready:
            self._jump()
        self._steps += 1
        if self._steps > STEPS_AT_ONE_TIME_MAX:
            self._steps = 0
            raise BusyLoop(f"{STEPS_AT_ONE_TIME_MAX} turns, and it is still {self._now_s} s")
        while self._timers and self._timers[0][0] <= self._now_s:
            ready.append(self._pop_timer())
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled() or (self._watched and self._keep(handle)):
                continue
            handle._run()

    def _jump(self) -> None:
        """Let time pass until the next timer."""
        while self._timers and self._timers[0][2].cancelled():
            self._pop_timer()
        if not self._timers:
            raise Deadlock("deadlock: nothing is ready and nothing is scheduled")
        if self._timers[0][0] > self._now_s:
            self._now_s = self._timers[0][0]
            self._steps = 0

    def _pop_timer(self) -> _Timer:
        timer = heapq.heappop(self._timers)[2]
        timer.waits = False
        if timer.cancelled():
            self._timers_cancelled -= 1
        return timer

    def _keep(self, handle: asyncio.Handle) -> bool:
        """Keep a callback whose owner is stopped; count it, if its owner's are counted."""
        owner: Owner | None = cast("Any", handle)._context.get(OWNER)
        if owner is None:
            return False
        if owner.stopped is not None:
            owner.stopped.append(handle)
            return True
        if owner.steps_left is not None:
            owner.steps_left -= 1
            if owner.steps_left < 0:
                owner.steps_left = None
                self._watched -= 1
                owner.out_of_steps()
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        if not cast("_Timer", handle).waits:
            return
        self._timers_cancelled += 1
        if self._timers_cancelled > max(CANCELLED_TIMERS_MIN, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def _process_events(self, event_list: list[object]) -> None:
        assert not event_list, "nothing here waits for a file descriptor"

    def _write_to_self(self) -> None: ...


def true_time_s() -> float:
    """Return the simulation's time, whoever asks; on a real loop, that loop's."""
    loop = asyncio.get_running_loop()
    return loop.true_time() if isinstance(loop, VirtualLoop) else loop.time()


def run_virtual(main: Coroutine[Any, Any, T], on_task: TaskMade | None = None) -> T:
    """Run ``main`` to its end on a virtual loop; what it leaves running is cancelled."""
    loop = VirtualLoop(on_task)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            _cancel_all(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def _cancel_all(loop: VirtualLoop) -> None:
    left = sorted(asyncio.all_tasks(loop), key=hash)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
