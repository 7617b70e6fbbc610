"""What a history is: JSON lines, appended to while it happens; first its head, then the rest.

An attempt is one request and its answer. An operation is what a client wanted: one attempt, or more
where an attempt was answered that nothing was done, or where a key makes repeating safe. All times
are of one monotonic clock, in nanoseconds: ``invoked_ns`` is taken before a request is sent,
``returned_ns`` after its answer was read or given up. Only what was seen is written here, nothing
that was concluded from it.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

FORMAT = 1


class Kind(enum.Enum):
    """CONFIRM is a change to what is there already, on condition that it is (If-Match)."""

    CREATE = "create"
    CHANGE = "change"
    CONFIRM = "confirm"
    DELETE = "delete"
    GET = "get"
    LIST = "list"


WRITES = frozenset({Kind.CREATE, Kind.CHANGE, Kind.CONFIRM, Kind.DELETE})


class Outcome(enum.Enum):
    """DENIED: what is there does not allow it. NOT_DONE: the answer says that nothing was done.

    UNKNOWN: no answer, or one that says that it is unknown.
    """

    OK = "ok"
    DENIED = "denied"
    NOT_DONE = "not done"
    UNKNOWN = "unknown"


class Freshness(enum.Enum):
    """Which revision a request asks for at least (X-Novacron-Min-Revision).

    SESSION: what its client has seen before; LATEST: what any client has seen before.
    """

    ANY = "any"
    SESSION = "session"
    LATEST = "latest"


class Seen(Struct, frozen=True, kw_only=True):
    """A VM as an answer showed it: ``born`` and ``value`` are labels that the clients wrote.

    The first is written by whoever creates it and never changed, the second by every change.
    """

    name: str
    id: str
    born: str
    value: str
    etag: str


class Page(Struct, frozen=True, kw_only=True):
    """One page of a list: who was asked, and the list's revision in the answer."""

    replica: str
    revision: str
    seen: tuple[Seen, ...] = ()


class Attempt(Struct, frozen=True, kw_only=True, tag="attempt", omit_defaults=True):
    """One request and its answer, a walk through the pages of a list being one request.

    ``value`` is what it writes, and no other operation of the history does. ``revision`` is the
    answer's X-Novacron-Revision. ``operation_id`` and ``target`` are of the operation that a 202
    told of.
    """

    operation: int
    client: int
    kind: Kind
    name: str = ""
    value: str = ""
    if_match: str = ""
    key: str = ""
    freshness: Freshness = Freshness.ANY
    min_revision: str = ""
    replica: str
    invoked_ns: int
    returned_ns: int
    outcome: Outcome
    status: int = 0
    code: str = ""
    revision: str = ""
    seen: Seen | None = None
    pages: tuple[Page, ...] = ()
    operation_id: str = ""
    target: str = ""
    replayed: bool = False


class Fault(Struct, frozen=True, kw_only=True, tag="fault"):
    """What was done to which program, and until when it was not what it should be."""

    blow: str
    program: str
    pid: int
    began_ns: int
    ended_ns: int


class Head(Struct, frozen=True, kw_only=True, tag="head"):
    """``names`` are all VMs that the history's clients touch, and nobody else does."""

    format: int = FORMAT
    seed: int
    clients: int
    names: tuple[str, ...]
    replicas: tuple[str, ...]


class History(Struct, frozen=True, kw_only=True):
    head: Head
    attempts: tuple[Attempt, ...] = ()
    faults: tuple[Fault, ...] = ()


class HistoryLog:
    """Appends to one file, from any thread; each line is with the system once it was added."""

    def __init__(self, path: Path, head: Head) -> None:
        self._file = path.open("xb", buffering=0)
        self._lock = threading.Lock()
        self.add(head)

    def add(self, line: Head | Attempt | Fault) -> None:
        encoded = msgspec.json.encode(line) + b"\n"
        with self._lock:
            self._file.write(encoded)

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> History:
    """Return what a file holds; a last line that was cut off is left out.

    Raises ValueError for a file that is no history of this format.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    decoder = msgspec.json.Decoder(Head | Attempt | Fault)
    return history_of(decoder.decode(line) for line in lines)


def history_of(lines: Iterable[Head | Attempt | Fault]) -> History:
    """Put a history together. Raises ValueError unless a head of this format comes first."""
    head, *others = lines
    if not isinstance(head, Head) or head.format != FORMAT:
        raise ValueError(f"not a history of format {FORMAT}: it begins with {head}")
    return History(
        head=head,
        attempts=tuple(line for line in others if isinstance(line, Attempt)),
        faults=tuple(line for line in others if isinstance(line, Fault)),
    )
