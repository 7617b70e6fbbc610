"""What this replica does for its peers: commits as the leader, and tells what only it knows.

Every request gets an answer; what cannot be done is a problem. A peer has authenticated, authorized
and validated what it hands on, and its own certificate says that it is a replica of this cell.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from controlplane.commands.terms import OnTerms
from controlplane.sessions.leader_link import Here
from controlplane.sessions.peer_messages import (
    OBJECTS_MAX,
    SEGMENT_MAX,
    AgentList,
    AskNode,
    Exchange,
    Exchanged,
    FiguresRead,
    NodeAnswered,
    PeerAnswer,
    PeerRefused,
    PeerRequest,
    ReadFigures,
    ReadHistory,
    Segment,
    Submit,
    Submitted,
)
from controlplane.state import ClusterState
from controlplane.store.history import History
from controlplane.telemetry.progress import ProgressBoard
from controlplane.telemetry.windows import Windows
from shared.codec import pack
from shared.errors import Forbidden, NoLeader, NovacronError
from shared.problems import problem_of
from shared.tls import Identity, Role

log = logging.getLogger(__name__)


class CopiedByPeers:
    """How far each follower's copy of history is, as it last told; in memory only."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def tell(self, replica: str, seq: int) -> None:
        self._told[replica] = seq

    def by(self, replica: str) -> int:
        return self._told.get(replica, 0)


class PeerAnswers:
    def __init__(
        self,
        cell: str,
        here: Here,
        state: ClusterState,
        history: History,
        windows: Windows,
        progress: ProgressBoard,
        agents: Callable[[], AgentList],
    ) -> None:
        self._cell = cell
        self._here = here
        self._state = state
        self._history = history
        self._windows = windows
        self._progress = progress
        self._agents = agents
        self.copied = CopiedByPeers()

    async def answer(self, request: PeerRequest, identity: Identity) -> PeerAnswer:
        """Do what a peer asks for."""
        try:
            if identity.role is not Role.REPLICA or identity.cell != self._cell:
                raise Forbidden(f"{identity} is not a replica of cell {self._cell}")
            return await self._answer(request, identity)
        except NovacronError as error:
            return PeerRefused(problem=problem_of(error), revision=self._state.revision)

    async def _answer(self, request: PeerRequest, identity: Identity) -> PeerAnswer:
        if isinstance(request, Submit):
            return await self._submit(request)
        if isinstance(request, AskNode):
            data = await self._here.ask(request.node_id, request.query)
            return NodeAnswered(data=data)
        if isinstance(request, Exchange):
            return self._exchange(request, identity)
        if isinstance(request, ReadFigures):
            return self._figures(request)
        return await self._segment(request)

    async def _submit(self, order: Submit) -> Submitted:
        command = OnTerms(command=order.command, key=order.key, expected=order.expected)
        decided = await self._here.submit(command, order.limit_s)
        return Submitted(
            result=decided.result, replayed=decided.replayed, revision=self._state.revision
        )

    def _exchange(self, told: Exchange, identity: Identity) -> Exchanged:
        if not self._here.leads:
            raise NoLeader("this replica does not lead at present")
        if told.replica != identity.name:
            raise Forbidden(f"{identity.name} speaks for itself, not for {told.replica}")
        self.copied.tell(told.replica, told.copied_seq)
        agents = self._agents()
        known = agents.name == told.agents_seen
        return Exchanged(progress=self._progress.all(), agents=None if known else agents)

    def _figures(self, asked: ReadFigures) -> FiguresRead:
        objects = asked.objects[:OBJECTS_MAX]
        if asked.whole:
            found = {each: self._windows.series(each) for each in objects}
            return FiguresRead(series={k: v for k, v in found.items() if v is not None})
        latest = {each: self._windows.latest(each) for each in objects}
        return FiguresRead(latest={k: v for k, v in latest.items() if v is not None})

    async def _segment(self, asked: ReadHistory) -> Segment:
        entries = await self._history.segment(asked.after, asked.until, SEGMENT_MAX)
        packed = pack(entries)
        return Segment(packed=packed, sha256=hashlib.sha256(packed).digest())
