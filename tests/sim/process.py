"""A process of the simulated cluster: the tasks that run in it, its pauses, and its death.

Death is kill -9: from that moment nothing the process does has an effect (every port asks
``check`` before and after a call), and then its tasks are cancelled. While it is paused, as by
SIGSTOP, nothing of it runs, its sockets stay open, and its clock goes on; afterwards it finds all
that came due meanwhile. A task belongs to the process in whose context it was made. Work that
outlives its process (a request on the wire, a call that libvirtd already has) runs ``outside`` of
any, and so does what a machine's kernel and the network do for it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, Unpack

from tests.sim.clocks import HostClock
from tests.sim.virtual_loop import OWNER, VirtualLoop

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class Process:
    """``host`` is the machine it runs on: partitions are between hosts, and so are clocks.

    ``missed_events``: a watch of its has left something out, and nothing has told it so.
    """

    def __init__(self, host: str, incarnation: str, clock: HostClock | None = None) -> None:
        self.host = host
        self.incarnation = incarnation
        self.clock = clock or HostClock()
        self.stopped: deque[asyncio.Handle] | None = None
        self._context = contextvars.copy_context()
        self._context.run(OWNER.set, self)
        self.alive = True
        self.powered = True
        self.missed_events = False
        self.die_in: int | None = None
        self.steps_left: int | None = None
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._at_death: list[Callable[[], None]] = []
        self._runs = asyncio.Event()
        self._runs.set()

    @property
    def task_count(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run ``work`` in this process."""
        context = self._context.copy()
        task = asyncio.get_running_loop().create_task(work, name=name, context=context)
        self.adopt(task)
        return task

    def call_soon(self, callback: Callable[[Unpack[Arguments]], object], *args: *Arguments) -> None:
        """Call something in this process, once it runs."""
        asyncio.get_running_loop().call_soon(callback, *args, context=self._context.copy())

    def adopt(self, task: asyncio.Task[Any]) -> None:
        if task not in self._tasks:
            self._tasks[task] = None
            task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def at_death(self, callback: Callable[[], None]) -> None:
        self._at_death.append(callback)

    async def alive_until(self, effects: int) -> None:
        """Die before or after one of the next effects, and return then."""
        self.die_in = effects
        await self._death()

    async def alive_for(self, steps: int) -> None:
        """Die at one of the next awaits, whatever it awaits there, and return then."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop), "real processes are killed from outside"
        loop.count_steps(self, steps)
        await self._death()

    def out_of_steps(self) -> None:
        self.kill()

    async def _death(self) -> None:
        died = asyncio.Event()
        self.at_death(died.set)
        if self.alive:
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
        self.resume()
        self.alive = False
        self.powered = not power_loss
        for callback in self._at_death:
            callback()
        for task in list(self._tasks):
            task.cancel()

    def pause(self) -> None:
        """Stop as by SIGSTOP, unless it is dead."""
        loop = asyncio.get_running_loop()
        if self.alive and isinstance(loop, VirtualLoop):
            self._runs.clear()
            loop.stop_owner(self)

    def resume(self) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(loop, VirtualLoop):
            self._runs.set()
            loop.continue_owner(self)

    async def runs(self) -> None:
        """Wait until it is not paused."""
        await self._runs.wait()

    async def gone(self) -> None:
        """Wait until all of its tasks have ended."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))


def current() -> Process | None:
    """Return the process in which the caller runs."""
    owner = OWNER.get()
    assert owner is None or isinstance(owner, Process), "only processes own what runs"
    return owner


def adopt_by_context(task: asyncio.Task[Any]) -> None:
    """Give a new task to the process in whose context it is made."""
    process = current()
    if process is not None:
        process.adopt(task)


def outside(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Run ``work`` in no process: it goes on when whoever asked for it is dead, or paused."""
    return asyncio.get_running_loop().create_task(work, name=name, context=nowhere())


def nowhere() -> contextvars.Context:
    """Return the context in which what belongs to no process runs."""
    context = contextvars.copy_context()
    context.run(OWNER.set, None)
    return context


def later(
    delay_s: float, callback: Callable[[Unpack[Arguments]], object], *args: *Arguments
) -> asyncio.TimerHandle:
    """Call something after a while of the simulation's time, in no process."""
    loop = asyncio.get_running_loop()
    return nowhere().run(lambda: loop.call_later(delay_s, callback, *args))


def never_mind(task: asyncio.Task[Any]) -> None:
    """Look at a task's end for whoever gave it up, so that nobody warns of it."""
    if not task.cancelled():
        task.exception()
