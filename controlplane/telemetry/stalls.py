"""Looks how late the event loop comes to what is due: whatever holds it up holds up everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# 20 looks a second cost 0.1 % of a CPU, and meet every stall that a client would notice.
LOOK_S = 0.05


async def watch_stalls(stalled: Callable[[float], None]) -> None:
    """Tell ``stalled`` of each look, with how many seconds late it came; for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LOOK_S
        await asyncio.sleep(LOOK_S)
        stalled(max(0.0, loop.time() - due_s))
