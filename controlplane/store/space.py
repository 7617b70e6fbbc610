"""How much room the store has, as its members tell: looked at now and then, on every replica.

Full is etcd's alarm: nothing more is taken until the store is repaired. Scarce comes before that:
new VMs are refused, so that what the cluster cannot do without (stops, deletions, what agents
report) finds room for as long as possible. The repair is here too; it needs no leader, since there
may be none: without room there are no new leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from controlplane.store.etcd_rpc import NO_SPACE
from controlplane.store.port import STORE_IS_FULL, MemberStatus, Room, Store
from shared.errors import StateConflict, StoreUnavailable

log = logging.getLogger(__name__)

# Of the quota; what is left is room for some 100,000 changes at etcd's default of 2 GiB.
SCARCE_SHARE = 0.9

# How long a repair waits for members to free what is forgotten: ten seconds, where defragmenting
# each may take minutes. What is freed later is used again; only the file stays larger.
COMPACTED_LOOK_S, COMPACTED_LOOKS_MAX = 0.2, 50

# Told of: whether it is full, the quota, and by member its size and what of it is in use.
Observe = Callable[[bool, int, Mapping[str, tuple[int, int]]], None]


class Repaired(Struct, frozen=True):
    """The largest member before and after, and the members that did not answer."""

    before_bytes: int
    after_bytes: int
    skipped: tuple[str, ...]


class StoreSpace:
    """``quota_bytes`` is what etcd's members were started with."""

    name = "store space"
    period_s = 10.0

    def __init__(self, store: Store, quota_bytes: int, observe: Observe) -> None:
        self._store = store
        self._quota_bytes = quota_bytes
        self._observe = observe
        self._repairing = False
        self.room = Room.ENOUGH
        self.detail = ""

    async def reconcile(self) -> None:
        """Look how much room there is."""
        self._take(await self._store.members())

    async def repair(self) -> Repaired:
        """Compact, defragment one member after the other, and take the alarm back.

        etcd's leader comes last, so that it changes once at most. Raises StateConflict while a
        repair is under way here, and what the store raises; it may be done again at any time.
        """
        if self._repairing:
            raise StateConflict("the store is being repaired already: see `cluster members`")
        self._repairing = True
        try:
            return await self._repair()
        finally:
            self._repairing = False

    async def _repair(self) -> Repaired:
        before = await self._store.members()
        heard = [member for member in before if member.reachable]
        if not heard:
            raise StoreUnavailable("no etcd member answers")
        await self._store.compact(max(member.revision for member in heard), physical=True)
        await self._until_all_compacted()
        for member in sorted(heard, key=lambda member: member.is_leader):
            log.info("etcd member %s is defragmented", member.endpoint)
            await self._store.defragment(member.endpoint)
        await self._store.disarm()
        after = await self._store.members()
        self._take(after)
        skipped = tuple(member.endpoint for member in before if not member.reachable)
        return Repaired(_largest_bytes(before), _largest_bytes(after), skipped)

    async def _until_all_compacted(self) -> None:
        """Wait, for a while, until every member has freed what is forgotten.

        Only the one that was asked to compact tells when it has; the others do it in their own
        time, and one that is defragmented before stays as large as it was. They hold the same, so
        that about the same is in use.
        """
        for _ in range(COMPACTED_LOOKS_MAX):
            in_use = [m.db_in_use_bytes for m in await self._store.members() if m.reachable]
            if not in_use or max(in_use) <= 2 * min(in_use):
                return
            await asyncio.sleep(COMPACTED_LOOK_S)

    def _take(self, members: Sequence[MemberStatus]) -> None:
        heard = [member for member in members if member.reachable]
        if not heard:
            return  # what was known before is the best there is
        full = any(NO_SPACE in member.alarms for member in members)
        in_use = max(member.db_in_use_bytes for member in heard)
        before, self.room = self.room, self._room(full, in_use)
        self.detail = self._detail(in_use)
        if self.room is not before:
            log.warning("room in the store: %s; %s", self.room, self.detail)
        sizes = {m.endpoint: (m.db_size_bytes, m.db_in_use_bytes) for m in heard}
        self._observe(full, self._quota_bytes, sizes)

    def _room(self, full: bool, in_use_bytes: int) -> Room:
        if full:
            return Room.FULL
        scarce = in_use_bytes >= SCARCE_SHARE * self._quota_bytes
        return Room.SCARCE if scarce else Room.ENOUGH

    def _detail(self, in_use_bytes: int) -> str:
        if self.room is Room.FULL:
            return STORE_IS_FULL
        share = f"{in_use_bytes / self._quota_bytes:.0%} of the store's quota is in use"
        if self.room is Room.SCARCE:
            return (
                f"{share}: new VMs are refused, everything else goes on. Delete what is not needed,"
                " or start etcd with a larger quota"
            )
        return share


def _largest_bytes(members: Sequence[MemberStatus]) -> int:
    return max(member.db_size_bytes for member in members)
