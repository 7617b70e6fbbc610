"""Copies history into this replica's SQLite, trims what was copied from etcd, forgets what is old.

Nothing is trimmed that is not on a majority's disks, and nothing forgotten that etcd still has: the
order from one to the other is what keeps history without a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

from controlplane.commands.cluster import TRIM_MAX, TrimHistory
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from controlplane.store.history import FORGET_MAX, History
from shared.clock import Clock
from shared.model import HistoryEntry

# The newest entries stay in etcd: followers that lag a little find them there.
KEPT_IN_ETCD = 500
COPY_MAX = 1000
# At about 430 bytes an entry: a cluster with an entry a second comes to 1.1 GB.
KEPT_DAYS = 30


class PeerHistory(Protocol):
    """Segments of history that other replicas have."""

    async def segment(self, after: int, until: int) -> tuple[HistoryEntry, ...]:
        """Return entries in (``after``, ``until``], none when no peer has any.

        There is no gap among them. Raises Unavailable.
        """
        ...


class CopyHistory:
    """Runs on every replica, whoever leads.

    A replica that was away finds what etcd no longer has at its peers. What none of them has is
    left out, and the copy is complete again from there on.
    """

    name = "history copy"
    period_s = 5.0

    def __init__(self, state: ClusterState, history: History, peers: PeerHistory) -> None:
        self._state = state
        self._history = history
        self._peers = peers
        self.copied_seq = 0

    async def reconcile(self) -> None:
        if self.copied_seq == 0:
            self.copied_seq = await self._history.copied_seq()
        while missing := self._missing():
            if await self._filled_by_peers(missing[0]):
                continue
            await self._append([self._state.history[seq] for seq in missing])

    async def _filled_by_peers(self, first: int) -> bool:
        """Copy a part of what lies before ``first``, and is not in etcd, from a peer."""
        if self.copied_seq + 1 >= first:
            return False
        # Whatever is next: what peers have may begin far behind, after 30 days or after a restore.
        entries = await self._peers.segment(self.copied_seq, first - 1)
        await self._append(entries)
        return bool(entries)

    async def _append(self, entries: Sequence[HistoryEntry]) -> None:
        if entries:
            await self._history.append(entries)
            self.copied_seq = entries[-1].seq

    def _missing(self) -> list[int]:
        if self._state.last_seq <= self.copied_seq:
            return []
        return sorted(seq for seq in self._state.history if seq > self.copied_seq)[:COPY_MAX]


class TrimCopiedHistory:
    """Runs on the leader. With one replica its own copy is the majority's."""

    name = "history trim"
    period_s = 10.0

    def __init__(self, applier: Applier, state: ClusterState, copied: Callable[[], int]) -> None:
        """``copied`` tells up to which entry a majority of the replicas has a copy."""
        self._applier = applier
        self._state = state
        self._copied = copied

    async def reconcile(self) -> None:
        limit = min(self._copied(), self._state.last_seq - KEPT_IN_ETCD)
        while True:
            old = sorted(seq for seq in self._state.history if seq <= limit)[:TRIM_MAX]
            # Trimming each entry as it ages would double the number of commits.
            if len(old) < TRIM_MAX:
                return
            await self._applier.submit(TrimHistory(seqs=tuple(old)))


class ForgetHistory:
    """Runs on every replica, whoever leads."""

    name = "history retention"
    period_s = 3600.0

    def __init__(self, state: ClusterState, history: History, clock: Clock) -> None:
        self._state = state
        self._history = history
        self._clock = clock

    async def reconcile(self) -> None:
        before = self._clock.now() - timedelta(days=KEPT_DAYS)
        in_etcd = min(self._state.history, default=self._state.last_seq + 1)
        while await self._history.forget(before, below=in_etcd) == FORGET_MAX:
            pass
