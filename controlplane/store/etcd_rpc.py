"""The RPCs of one etcd member as a port, and the Structs that cross it.

``GrpcMember`` (etcd_grpc.py) speaks to a real member, ``ModelMember`` (model_member.py) to a model.
Whatever they raise is from the one error tree and says what is known of the effect:

- StoreUnavailable: the member certainly did not execute the call (it was never sent).
- OutcomeUnknown: everything else that is not an answer; the call may have been, or may yet be,
  executed. Reads may be repeated; a write must be such that a second execution does no harm.
- etcd's own refusals, which change nothing: Compacted, StoreFull, NotFound (a lease),
  ChangeTooLarge, and StoreError for the rest.
- WatchLost: a watch stream ended; whatever it did not deliver must be asked for again.

Nothing here retries, chooses a member or waits for longer than the deadline it is given.
"""

from __future__ import annotations

import enum
from typing import Protocol

from msgspec import Struct

from controlplane.store.port import KeyValue

# etcd's --max-txn-ops; it counts compares, successes and failures each for themselves.
TXN_OPS_MAX = 128


class Header(Struct, frozen=True):
    """Who answered, and up to where it had applied the log (``revision`` of the whole store)."""

    cluster_id: int
    member_id: int
    revision: int
    raft_term: int


class Target(enum.Enum):
    """What of a key is compared; all three are 0 for a key that does not exist."""

    VERSION = "version"
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"


class Compare(Struct, frozen=True):
    """Holds when the key's ``target`` equals ``value``."""

    key: str
    target: Target
    value: int


class RangeOp(Struct, frozen=True):
    """Read ``[key, range_end)``, or the one key without an end; 0 is no limit, newest revision.

    With ``keys_only`` every value is empty. ``mod_revision_min`` leaves out what was last written
    before that, but not from the count.
    """

    key: str
    range_end: str = ""
    limit: int = 0
    revision: int = 0
    keys_only: bool = False
    mod_revision_min: int = 0


class PutOp(Struct, frozen=True):
    key: str
    value: bytes
    lease: int = 0


class DeleteOp(Struct, frozen=True):
    key: str
    range_end: str = ""


Op = RangeOp | PutOp | DeleteOp


class Txn(Struct, frozen=True):
    compares: tuple[Compare, ...]
    success: tuple[Op, ...]
    failure: tuple[Op, ...] = ()


class Ranged(Struct, frozen=True):
    """``count`` is of all keys of the range, whatever was left out."""

    header: Header
    items: tuple[KeyValue, ...]
    more: bool
    count: int


class TxnDone(Struct, frozen=True):
    """``reads`` has one entry for each RangeOp of the branch that was taken, in order."""

    header: Header
    succeeded: bool
    reads: tuple[tuple[KeyValue, ...], ...]


class Compaction(Struct, frozen=True):
    header: Header


class Lease(Struct, frozen=True):
    """``ttl_s`` is 0 or less in an answer to a keep-alive when the lease is gone."""

    header: Header
    id: int
    ttl_s: float


class Revoked(Struct, frozen=True):
    header: Header


class Status(Struct, frozen=True):
    header: Header
    version: str
    leader_id: int
    db_size_bytes: int
    db_in_use_bytes: int


class Alarm(Struct, frozen=True):
    member_id: int
    name: str


class Alarms(Struct, frozen=True):
    header: Header
    alarms: tuple[Alarm, ...]


# The quota is used up: until it is disarmed etcd refuses what puts anything, and new leases.
NO_SPACE = "NOSPACE"


class Event(Struct, frozen=True):
    """A change of one key at ``kv.mod_revision``; a deletion has an empty value."""

    kv: KeyValue
    deleted: bool


class WatchStart(Struct, frozen=True):
    key: str
    range_end: str
    start_revision: int


class WatchAnswer(Struct, frozen=True):
    """One message of a watch stream: creation, progress (no events), events, or its end.

    A message with events holds complete revisions, in order. ``compact_revision`` is set when the
    watch ended because its start is gone.
    """

    header: Header
    events: tuple[Event, ...] = ()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    reason: str = ""


class WatchStream(Protocol):
    async def receive(self) -> WatchAnswer:
        """Return the next message, however long it takes. Raises WatchLost."""
        ...

    async def send_progress_request(self) -> None:
        """Ask for a message without events: the member's sign of life. Raises WatchLost."""
        ...

    async def close(self) -> None:
        """Give the stream up; a waiting ``receive`` raises WatchLost. Never raises."""
        ...


class MemberRpc(Protocol):
    """One member. Every call ends by its ``deadline_s`` at the latest."""

    @property
    def endpoint(self) -> str: ...

    async def range(self, request: RangeOp, deadline_s: float) -> Ranged:
        """Read linearizably, keys in order; ``more`` says that the limit cut the rest off."""
        ...

    async def txn(self, request: Txn, deadline_s: float) -> TxnDone: ...

    async def compact(self, revision: int, deadline_s: float, physical: bool = False) -> Compaction:
        """Forget versions below a revision; ``physical`` waits until their room is free.

        Raises Compacted when that was done before.
        """
        ...

    async def lease_grant(self, ttl_s: int, deadline_s: float) -> Lease:
        """Grant a lease; etcd raises a time to live below its minimum (about 2 s) to it."""
        ...

    async def lease_revoke(self, lease: int, deadline_s: float) -> Revoked:
        """End a lease and delete its keys. Raises NotFound."""
        ...

    async def lease_keep_alive(self, lease: int, deadline_s: float) -> Lease: ...

    async def status(self, deadline_s: float) -> Status:
        """Return what the member knows by itself; works without a quorum."""
        ...

    async def alarms(self, deadline_s: float) -> Alarms:
        """Return the alarms of all members; needs a quorum."""
        ...

    async def disarm(self, alarm: Alarm, deadline_s: float) -> None:
        """Take one alarm back. It comes again with the next write if its cause is still there."""
        ...

    async def defragment(self, deadline_s: float) -> None:
        """Give the room that is free in the member's database back; it answers nobody meanwhile."""
        ...

    async def watch(self, request: WatchStart, deadline_s: float) -> WatchStream:
        """Open a watch; the deadline is for opening it, not for the stream."""
        ...

    async def close(self) -> None: ...


def prefix_end(prefix: str) -> str:
    """Return the first key after all keys with the prefix, as etcd's ranges want it."""
    assert "" < prefix[-1:] < "\x7f", "prefixes are not empty and end in ASCII"
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
