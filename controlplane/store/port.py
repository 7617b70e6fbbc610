"""The store as the rest of the control plane sees it.

Every write of cluster state is ``commit`` under a fence. The few calls that cannot be fenced have
names of their own. Keys are text, values bytes; ``controlplane/store/keys.py`` knows what is where.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from msgspec import Struct

from shared.units import GIB

# What etcd takes for its --quota-backend-bytes when nobody says otherwise.
ETCD_QUOTA_BYTES = 2 * GIB
# What there is to say whenever etcd refuses for want of space (its alarm NOSPACE).
STORE_IS_FULL = (
    "the store is full: no change is taken, not even a stop or a deletion; guests run on, reads "
    "work, and whoever leads goes on leading. Make room with `novacron cluster repair-store`"
)


class KeyValue(Struct, frozen=True):
    """``version`` counts the key's writes since it was created."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0
    version: int = 0


class Listing(Struct, frozen=True):
    """Keys of a prefix at one revision, sorted by key; ``count`` is how many there are in all."""

    revision: int
    items: tuple[KeyValue, ...]
    count: int


class Put(Struct, frozen=True):
    key: str
    value: bytes


class Delete(Struct, frozen=True):
    key: str


Write = Put | Delete


class Fence(Struct, frozen=True):
    """What a commit compares: the leader key's create revision and the mark's mod revision."""

    leader_revision: int
    mark_revision: int


class Committed(Struct, frozen=True):
    revision: int


class NotCommitted(Struct, frozen=True):
    """The fence did not hold; the two keys are as the same transaction read them."""

    leader: KeyValue | None
    mark: KeyValue | None
    revision: int


class Campaign(Struct, frozen=True):
    """The leader key after a campaign: ours or another's."""

    leader: KeyValue
    revision: int


class WatchBatch(Struct, frozen=True):
    """Changes of one revision or more, complete up to ``revision``; a deletion has no value.

    A batch without changes says only that nothing was missed so far (progress).
    """

    revision: int
    puts: tuple[KeyValue, ...]
    deletes: tuple[str, ...]


class Room(enum.StrEnum):
    """What the store still takes: everything, all but new VMs, or nothing at all."""

    ENOUGH = "enough"
    SCARCE = "scarce"
    FULL = "full"


class MemberStatus(Struct, frozen=True):
    endpoint: str
    reachable: bool
    member_id: str = ""
    cluster_id: str = ""
    version: str = ""
    is_leader: bool = False
    db_size_bytes: int = 0
    db_in_use_bytes: int = 0
    revision: int = 0
    raft_term: int = 0
    alarms: tuple[str, ...] = ()
    problem: str = ""


class Store(Protocol):
    """Raises StoreUnavailable (nothing happened), OutcomeUnknown (read back), StoreFull."""

    async def list(
        self, prefix: str, *, revision_min: int = 0, keys_only: bool = False, changed_from: int = 0
    ) -> Listing:
        """Return a linearizable listing at one revision, read in pages, not older than asked.

        With ``keys_only`` every value is empty: what has changed is known by its revisions. What
        was last written before ``changed_from`` is counted only.
        """
        ...

    def scan(self, prefix: str) -> AsyncGenerator[Listing]:
        """Yield the same listing page by page: at one revision, none of it held in memory.

        Raises Compacted when the revision is gone before the last page.
        """
        ...

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        """Return one key, linearizably, or as it was at a revision. Raises Compacted."""
        ...

    async def commit(self, fence: Fence, writes: Sequence[Write]) -> Committed | NotCommitted:
        """Apply all writes in one transaction if the fence holds. At most 128, keys distinct."""
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchBatch]:
        """Yield all changes from a revision on, over member failures, without gap or repeat.

        Raises Compacted when the revision is gone.
        """
        ...

    # Not fenced, each for a reason of its own.

    async def campaign(self, value: bytes, lease: int) -> Campaign:
        """Put the leader key under the lease unless it exists; return the key as it then is.

        Under no lease (0) it stays until somebody resigns it: only a restore holds it so.
        """
        ...

    async def resign(self, leader_revision: int) -> bool:
        """Delete the leader key if that is its create revision; True when it was deleted."""
        ...

    async def grant_lease(self, ttl_s: int) -> int:
        """Return the id of a new lease."""
        ...

    async def renew_lease(self, lease: int) -> float:
        """Renew once and return the remaining time in seconds; 0 or less when it is gone."""
        ...

    async def revoke_lease(self, lease: int) -> None: ...

    async def register_replica(self, name: str, value: bytes, lease: int) -> None:
        """Put a replica's own registration under its lease."""
        ...

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        """Forget what keys were before a revision; ``physical`` waits until the room is free."""
        ...

    async def defragment(self, endpoint: str) -> None:
        """Give the free room of a member's database back; for seconds it answers nobody."""
        ...

    async def disarm(self) -> None:
        """Take the alarms of full members back; those of corrupt ones stay."""
        ...

    async def members(self) -> tuple[MemberStatus, ...]:
        """Return what each configured member says of itself; unreachable ones are included."""
        ...

    async def close(self) -> None: ...
