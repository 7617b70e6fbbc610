"""Gives out start permits: to VMs that should run, are bound, and whose last attempt is over."""

from __future__ import annotations

from controlplane.commands.attempts import NotePlacement, PermitStart
from controlplane.commands.draft import Author
from controlplane.reconcilers.capacity import KeptSnapshot
from controlplane.sessions.hub import Hub
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.clock import Clock
from shared.errors import NotFound, StateConflict


class PermitStarts:
    name = "starts"
    # Back-off ends between changes too; a second late is soon enough.
    period_s = 1.0

    def __init__(
        self,
        applier: Applier,
        state: ClusterState,
        hub: Hub,
        capacity: KeptSnapshot,
        clock: Clock,
    ) -> None:
        self._applier = applier
        self._state = state
        self._hub = hub
        self._capacity = capacity
        self._clock = clock

    async def reconcile(self) -> None:
        for vm_id in self._state.vm_ids_to_start():
            if not self._is_due(vm_id):
                continue
            permit = PermitStart(vm_id=vm_id, by=Author("leader"), check=self._capacity.check)
            try:
                await self._applier.submit(permit)
            except NotFound:
                continue  # deleted meanwhile
            except StateConflict as conflict:
                await self._applier.submit(NotePlacement(vm_id=vm_id, message=str(conflict)))

    def _is_due(self, vm_id: str) -> bool:
        stored = self._state.vms.get(vm_id)
        if stored is None:
            return False
        status = stored.record.status
        held_back = status.not_before is not None and status.not_before > self._clock.now()
        return not held_back and status.node is not None and self._hub.trusts(status.node)
