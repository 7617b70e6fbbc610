"""Fails operations whose deadline has passed."""

from __future__ import annotations

from controlplane.commands.draft import Author
from controlplane.commands.operations import ExpireOperation
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.clock import Clock


class ExpireOperations:
    name = "deadlines"
    period_s = 5.0

    def __init__(self, applier: Applier, state: ClusterState, clock: Clock) -> None:
        self._applier = applier
        self._state = state
        self._clock = clock

    async def reconcile(self) -> None:
        now = self._clock.now()
        due = [
            operation_id
            for operation_id, stored in self._state.operations.items()
            if stored.record.deadline_at <= now
        ]
        for operation_id in due:
            await self._applier.submit(
                ExpireOperation(operation_id=operation_id, by=Author("leader"))
            )
