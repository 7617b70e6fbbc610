"""How tasks and processes end: together, in order, and never silently."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

Work = Coroutine[Any, Any, Any]


async def until_one_ends(*work: Work) -> None:
    """Run all of it until the first one ends, then cancel the others and wait for them.

    Re-raises what the first failed one raised; a cancellation from outside ends all.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
            raise end


async def run_until_asked_to_stop(*work: Work, on_hangup: Callable[[], None] | None = None) -> None:
    """Run all of it until SIGTERM or SIGINT, then cancel it; what dies by itself kills the rest.

    ``on_hangup`` is called for each SIGHUP, which otherwise ends the process. Raises what one of
    them raised; RuntimeError when one that should run for ever came to an end.
    """
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    if on_hangup is not None:
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    await until_one_ends(asked.wait(), *work)
    if not asked.is_set():
        raise RuntimeError("a task that should run for ever came to an end")
