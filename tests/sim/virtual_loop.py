"""An asyncio loop without threads, sockets or waiting: its clock jumps to the next timer.

Owns the order of everything: with the same seed and the same code, the same callbacks run in the
same order. So tasks hash by their number (``asyncio.wait`` and ``TaskGroup`` keep them in sets),
and whatever would bring another order in (a thread, a file descriptor) is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack, cast

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

# Callbacks that run while the clock stands still; a whole cluster starts with a few thousand.
STEPS_AT_ONE_TIME_MAX = 200_000


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: what is waited for can never come."""


class BusyLoop(RuntimeError):
    """Something keeps the loop running without ever letting time pass."""


class NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number, so that sets of tasks have one order."""

    def __init__(self, number: int, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


TaskMade = Callable[[asyncio.Task[Any]], None]


class VirtualLoop(asyncio.BaseEventLoop):
    """``on_task`` is told of each task, in the context of whoever made it."""

    def __init__(self, on_task: TaskMade | None = None) -> None:
        super().__init__()
        self._now_s = 0.0
        self._tasks_made = 0
        self._steps = 0
        self._on_task = on_task
        self._selector = _JumpingSelector(self)
        self.set_task_factory(cast("Any", self._make_task))

    def time(self) -> float:
        """Return the virtual time in seconds since the loop was made."""
        return self._now_s

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

    def jump(self, timeout_s: float | None) -> None:
        """Let time pass until the next timer; called when the loop would wait."""
        if timeout_s is None:
            raise Deadlock("deadlock: nothing is ready and nothing is scheduled")
        if timeout_s > 0:
            self._now_s += timeout_s
            self._steps = 0
            return
        self._steps += 1
        if self._steps > STEPS_AT_ONE_TIME_MAX:
            self._steps = 0
            raise BusyLoop(f"{STEPS_AT_ONE_TIME_MAX} steps, and it is still {self._now_s} s")

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

    # What BaseEventLoop asks of its subclasses.

    def _process_events(self, event_list: list[object]) -> None:
        assert not event_list, "nothing here waits for a file descriptor"

    def _write_to_self(self) -> None: ...


class _JumpingSelector:
    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout_s: float | None) -> list[object]:
        self._loop.jump(timeout_s)
        return []


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
