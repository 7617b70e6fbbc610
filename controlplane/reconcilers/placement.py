"""Binds VMs that should run and have no node; says why when none fits."""

from __future__ import annotations

import asyncio
import logging

from controlplane.commands.attempts import BindVm, NotePlacement
from controlplane.commands.draft import Author
from controlplane.commands.restored import RECOVERING, is_recovering
from controlplane.reconcilers.capacity import KeptSnapshot
from controlplane.scheduler.place import plan
from controlplane.scheduler.request import request_of
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from controlplane.telemetry.exporter import Metrics
from shared.errors import NotFound, StateConflict
from shared.model import Vm

log = logging.getLogger(__name__)

# A pass is bounded, so that a storm of creates does not keep the loop from everything else.
PLACEMENTS_PER_PASS_MAX = 50


class PlaceVms:
    name = "placement"
    period_s = 5.0

    def __init__(
        self,
        applier: Applier,
        state: ClusterState,
        capacity: KeptSnapshot,
        metrics: Metrics,
    ) -> None:
        self._applier = applier
        self._state = state
        self._capacity = capacity
        self._metrics = metrics
        self._last_tried = ""

    async def reconcile(self) -> None:
        for vm_id in self._next_in_turn():
            stored = self._state.vms.get(vm_id)
            if stored is not None:
                await self._place(stored.record)

    def _next_in_turn(self) -> list[str]:
        """Take turns, so that VMs that fit nowhere do not starve the ones behind them."""
        waiting = self._state.vm_ids_to_place()
        turn = [vm_id for vm_id in waiting if vm_id > self._last_tried]
        chosen = (turn + waiting)[: min(PLACEMENTS_PER_PASS_MAX, len(waiting))]
        self._last_tried = chosen[-1] if chosen else ""
        return chosen

    async def _place(self, vm: Vm) -> None:
        if is_recovering(self._state.cluster()):
            await self._applier.submit(NotePlacement(vm_id=vm.id, message=RECOVERING))
            return
        began_s = asyncio.get_running_loop().time()
        decision = plan(self._capacity.current(), request_of(vm))
        self._metrics.placement(asyncio.get_running_loop().time() - began_s, decision.refusals)
        by = Author("leader")
        if decision.node is None:
            await self._applier.submit(NotePlacement(vm_id=vm.id, message=decision.summary()))
        else:
            bind = BindVm(vm_id=vm.id, node_id=decision.node, by=by, check=self._capacity.check)
            try:
                await self._applier.submit(bind)
            except (StateConflict, NotFound) as moved_on:
                # Its user or its node changed meanwhile: no reason to hold up those behind it.
                log.info("%s is not placed: %s", vm.name, moved_on)
