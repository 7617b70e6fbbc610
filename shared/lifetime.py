"""How a process ends: SIGTERM and SIGINT ask it to, a background task that dies makes it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


async def run_until_asked_to_stop(*tasks: Coroutine[Any, Any, None]) -> None:
    """Run all tasks until a signal comes, then cancel them; re-raises what killed one of them."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    running = [asyncio.ensure_future(task) for task in tasks]
    stop = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait([stop, *running], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stop, *running):
            task.cancel()
        ends = await asyncio.gather(*running, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
            raise end
    if not asked.is_set():
        raise RuntimeError("a task that should run for ever came to an end")
