"""Forgets idempotency keys when their time is over, in steps that fit a transaction."""

from __future__ import annotations

from controlplane.commands.terms import FORGET_MAX, ForgetKeys, still_kept
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.clock import Clock


class ForgetOldKeys:
    """Looks at all keys: 10 ms where there are as many as there may be. Not for every change."""

    name = "idempotency keys"
    period_s = 60.0

    def __init__(self, applier: Applier, state: ClusterState, clock: Clock) -> None:
        self._applier = applier
        self._state = state
        self._clock = clock

    async def reconcile(self) -> None:
        now = self._clock.now()
        old = [
            record_id
            for record_id, stored in self._state.idempotency.items()
            if not still_kept(stored.record, now)
        ]
        for first in range(0, len(old), FORGET_MAX):
            await self._applier.submit(ForgetKeys(ids=tuple(old[first : first + FORGET_MAX])))
