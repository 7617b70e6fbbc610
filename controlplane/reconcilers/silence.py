"""Says which nodes have fallen silent. Silence is not death: nothing starts elsewhere for it."""

from __future__ import annotations

import asyncio

from controlplane.commands.draft import Author
from controlplane.commands.nodes import SetNodeState
from controlplane.sessions.hub import Hub, HubSettings
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.model import NodeState


class NoteSilence:
    name = "silence"
    period_s = 1.0

    def __init__(
        self, applier: Applier, state: ClusterState, hub: Hub, settings: HubSettings
    ) -> None:
        self._applier = applier
        self._state = state
        self._hub = hub
        self._limit_s = settings.silence_limit_s
        # A new leader has heard nobody yet: every node gets the full limit from now.
        self._unheard_since: dict[str, float] = {}

    async def reconcile(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for node_id, stored in list(self._state.nodes.items()):
            if stored.record.state is NodeState.READY and self._is_silent(node_id, now_s):
                await self._applier.submit(
                    SetNodeState(node_id=node_id, state=NodeState.SILENT, by=Author("leader"))
                )
            elif stored.record.state is NodeState.SILENT and not self._is_silent(node_id, now_s):
                await self._hear_again(node_id)

    def _is_silent(self, node_id: str, now_s: float) -> bool:
        silent_s = self._hub.silent_for_s(node_id)
        if silent_s is not None:
            self._unheard_since.pop(node_id, None)
            return silent_s >= self._limit_s
        since_s = self._unheard_since.setdefault(node_id, now_s)
        return now_s - since_s >= self._limit_s

    async def _hear_again(self, node_id: str) -> None:
        """A session that paused and went on is heard again without a new greeting."""
        if self._hub.greeted(node_id):
            await self._applier.submit(
                SetNodeState(node_id=node_id, state=NodeState.READY, by=Author("leader"))
            )
