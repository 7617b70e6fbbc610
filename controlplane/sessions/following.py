"""A follower's regular word with the leader: how far its copy of history is, and what only the
leader knows.

What it learns is for people: progress of long operations, and which agents are in session. It is as
old as the period, and lost with the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from controlplane.sessions.leader_link import PeerCall
from controlplane.sessions.peer_messages import AgentList, Exchange, Exchanged
from controlplane.telemetry.progress import ProgressBoard
from shared.errors import NovacronError

log = logging.getLogger(__name__)

# Progress on a screen moves once a second.
PERIOD_S = 1.0


class Following:
    """``agents`` is what the leader last told; empty while there is none."""

    def __init__(
        self,
        name: str,
        leader_address: Callable[[], str | None],
        copied_seq: Callable[[], int],
        progress: ProgressBoard,
        call: PeerCall,
        period_s: float = PERIOD_S,
    ) -> None:
        self._name = name
        self._period_s = period_s
        self._leader_address = leader_address
        self._copied_seq = copied_seq
        self._progress = progress
        self._call = call
        self.agents = AgentList()

    async def run(self) -> None:
        """Exchange what is known with whoever leads, for ever."""
        while True:
            await asyncio.sleep(self._period_s)
            address = self._leader_address()
            if address is None:
                continue
            try:
                await self._exchange(address)
            except NovacronError as error:
                log.debug("no exchange with the leader at %s: %s", address, error)

    async def _exchange(self, address: str) -> None:
        told = Exchange(
            replica=self._name, copied_seq=self._copied_seq(), agents_seen=self.agents.name
        )
        answer = await self._call(address, told, self._period_s)
        if not isinstance(answer, Exchanged):
            return
        for frame in answer.progress:
            self._progress.take(frame)
        if answer.agents is not None:
            self.agents = answer.agents
