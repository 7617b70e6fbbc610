"""How a reconciler runs: on a timer, and on every change or not; one pass at a time, never retrying
inside.

A pass that fails is logged, once, and the next one comes by itself.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from controlplane.state import Changes
from shared.errors import LeadershipLost, NovacronError, StateConflict

log = logging.getLogger(__name__)

# After a failed pass the next change must not drive a busy loop.
PAUSE_AFTER_FAILURE_S = 1.0


class Reconciler(Protocol):
    name: str
    period_s: float

    async def reconcile(self) -> None:
        """Bring what is closer to what should be, a bounded step at a time."""
        ...


async def run(reconciler: Reconciler, changes: Changes) -> None:
    """Run passes until cancelled. Raises LeadershipLost."""
    while True:
        # Waiting begins before the pass: a change that comes during it leads to another one.
        changed = changes.next()
        try:
            await _pass(reconciler)
            await asyncio.wait([changed], timeout=reconciler.period_s)
        finally:
            changed.cancel()


async def run_periodically(reconciler: Reconciler) -> None:
    """Run a pass once in a period, whatever changes, until cancelled. Raises LeadershipLost."""
    while True:
        await _pass(reconciler)
        await asyncio.sleep(reconciler.period_s)


async def _pass(reconciler: Reconciler) -> None:
    try:
        await reconciler.reconcile()
    except LeadershipLost:
        raise
    except StateConflict as moved_on:
        log.info("%s: %s", reconciler.name, moved_on)
    except NovacronError as error:
        log.warning("%s: the pass failed: %s", reconciler.name, error)
        await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
