"""Ends attempts whose node has booted since: the one proof of a stop that needs no report."""

from __future__ import annotations

from controlplane.commands.attempts import EndAttempt
from controlplane.commands.draft import Author
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.model import is_moving


class EndLostAttempts:
    name = "boots"
    period_s = 10.0

    def __init__(self, applier: Applier, state: ClusterState) -> None:
        self._applier = applier
        self._state = state

    async def reconcile(self) -> None:
        for vm_id in self._state.lost_attempts():
            stored = self._state.vms.get(vm_id)
            if stored is None or is_moving(stored.record):
                continue  # whether it has moved before that, its migration finds out
            await self._applier.submit(EndAttempt(vm_id=vm_id, by=Author("leader")))
