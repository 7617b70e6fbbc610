"""What replicas ask each other, and what they answer: one request, one answer.

A request goes to the leader (``Submit``, ``AskNode``, ``Exchange``) or to any replica
(``ReadFigures``, ``ReadHistory``). What a peer cannot do it says as a problem.
"""

from __future__ import annotations

import hashlib

from msgspec import Struct

from controlplane.commands.forwarded import Forwardable
from controlplane.commands.terms import Expected, RequestKey
from controlplane.telemetry.progress import ProgressFrame
from controlplane.telemetry.windows import Rates, Series
from shared.codec import unpack
from shared.errors import RecordUnreadable
from shared.model import HistoryEntry, Problem
from shared.protocol import Query

PEER_METHOD = "/novacron.Replicas/Call"

# Entries of history in one segment: well below gRPC's 4 MiB at 430 bytes each.
SEGMENT_MAX = 1_000
# Objects whose figures are asked for at once: the largest page of a list.
OBJECTS_MAX = 1_000


class Submit(Struct, frozen=True, kw_only=True, tag="submit"):
    """Commit a client's command on its terms; refuse it when that has not begun by ``limit_s``."""

    command: Forwardable
    key: RequestKey | None = None
    expected: Expected | None = None
    limit_s: float


class AskNode(Struct, frozen=True, kw_only=True, tag="ask_node"):
    """Ask a node's agent, whose session the leader has."""

    node_id: str
    query: Query


class Exchange(Struct, frozen=True, kw_only=True, tag="exchange"):
    """A follower tells how far its copy of history is, and asks for what only the leader knows.

    ``agents_seen`` names the list of agents that it has already.
    """

    replica: str
    copied_seq: int
    agents_seen: str = ""


class ReadFigures(Struct, frozen=True, kw_only=True, tag="read_figures"):
    """Ask for what agents have sent this replica of nodes and VMs: the latest, or all there is."""

    objects: tuple[str, ...]
    whole: bool = False


class ReadHistory(Struct, frozen=True, kw_only=True, tag="read_history"):
    """Ask for entries of history in (``after``, ``until``]."""

    after: int
    until: int


class Submitted(Struct, frozen=True, kw_only=True, tag="submitted"):
    """What a command decided; the leader's memory had come to ``revision`` by then."""

    result: str
    replayed: bool
    revision: int


class NodeAnswered(Struct, frozen=True, kw_only=True, tag="node_answered"):
    data: bytes


class AgentList(Struct, frozen=True, kw_only=True):
    """The versions of the agents in session, by node id; ``name`` is another after each change."""

    name: str = ""
    versions: dict[str, str] = {}


class Exchanged(Struct, frozen=True, kw_only=True, tag="exchanged"):
    """The latest progress of what is under way; ``agents`` is None when the asker has them."""

    progress: tuple[ProgressFrame, ...]
    agents: AgentList | None = None


class FiguresRead(Struct, frozen=True, kw_only=True, tag="figures_read"):
    """By object id; what nobody has sent here is left out."""

    latest: dict[str, Rates] = {}
    series: dict[str, Series] = {}


class Segment(Struct, frozen=True, kw_only=True, tag="segment"):
    """Entries in order without a gap, packed, and the SHA-256 of that."""

    packed: bytes
    sha256: bytes

    def entries(self) -> tuple[HistoryEntry, ...]:
        """Raises RecordUnreadable for what is not as it was sent."""
        if hashlib.sha256(self.packed).digest() != self.sha256:
            raise RecordUnreadable("a segment of history is not as its checksum says")
        found: tuple[HistoryEntry, ...] = unpack(self.packed, tuple[HistoryEntry, ...])
        return found


class PeerRefused(Struct, frozen=True, kw_only=True, tag="refused"):
    """Why not; the peer's memory had come to ``revision`` by then, if it says so."""

    problem: Problem
    revision: int = 0


PeerRequest = Submit | AskNode | Exchange | ReadFigures | ReadHistory
PeerAnswer = Submitted | NodeAnswered | Exchanged | FiguresRead | Segment | PeerRefused
