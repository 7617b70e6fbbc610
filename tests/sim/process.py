"""A process of the simulated cluster: the tasks that run in it, and its death.

Death is kill -9: from that moment nothing the process does has an effect (every port asks
``check`` before and after a call), and then its tasks are cancelled. A task belongs to the process
in whose context it was made. Work that outlives its process (a request on the wire, a call that
libvirtd already has) runs ``outside`` of any.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """``host`` is the machine it runs on: partitions are between hosts."""

    def __init__(self, host: str, incarnation: str) -> None:
        self.host = host
        self.incarnation = incarnation
        self.alive = True
        self.powered = True
        self.die_in: int | None = None
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._at_death: list[Callable[[], None]] = []

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run ``work`` in this process."""
        context = contextvars.copy_context()
        context.run(_CURRENT.set, self)
        task = asyncio.get_running_loop().create_task(work, name=name, context=context)
        self.adopt(task)
        return task

    def adopt(self, task: asyncio.Task[Any]) -> None:
        if task not in self._tasks:
            self._tasks[task] = None
            task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def at_death(self, callback: Callable[[], None]) -> None:
        self._at_death.append(callback)

    async def alive_until(self, effects: int) -> None:
        """Die before or after one of the next effects, and return then."""
        self.die_in = effects
        died = asyncio.Event()
        self.at_death(died.set)
        await died.wait()

    def check(self) -> None:
        """End the caller, as a process that is gone ends, unless this one lives.

        Called right before and after everything that has an effect: ``die_in`` of these from now
        the process dies.
        """
        if self.die_in is not None and self.alive:
            self.die_in -= 1
            if self.die_in <= 0:
                self.kill()
        if not self.alive:
            raise asyncio.CancelledError(f"the process {self.incarnation} is dead")

    def kill(self, *, power_loss: bool = False) -> None:
        """Die at once. Without power not even the kernel is there to close connections."""
        if not self.alive:
            return
        self.alive = False
        self.powered = not power_loss
        for callback in self._at_death:
            callback()
        for task in list(self._tasks):
            task.cancel()

    async def gone(self) -> None:
        """Wait until all of its tasks have ended."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))


def current() -> Process | None:
    """Return the process in which the caller runs."""
    return _CURRENT.get()


def adopt_by_context(task: asyncio.Task[Any]) -> None:
    """Give a new task to the process in whose context it is made."""
    process = _CURRENT.get()
    if process is not None:
        process.adopt(task)


def outside(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Run ``work`` in no process: it goes on when whoever asked for it is dead."""
    context = contextvars.copy_context()
    context.run(_CURRENT.set, None)
    return asyncio.get_running_loop().create_task(work, name=name, context=context)


def never_mind(task: asyncio.Task[Any]) -> None:
    """Look at a task's end for whoever gave it up, so that nobody warns of it."""
    if not task.cancelled():
        task.exception()
