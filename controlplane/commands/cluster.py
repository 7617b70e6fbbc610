"""What happens to the cluster's record about itself, its API keys, its history and its terms."""

from __future__ import annotations

from msgspec import Struct

from controlplane.commands.draft import Author, Draft
from shared.errors import StateConflict, Unavailable
from shared.model import ApiKey, Cluster

# One transaction holds 128 writes; the applier's own mark and other commands need room too.
TRIM_MAX = 100


class MakeCluster(Struct, frozen=True, kw_only=True):
    """Writes the cell's record and its first API key; does nothing once there is a cluster."""

    cluster: Cluster
    admin_key: ApiKey
    by: Author

    def decide(self, draft: Draft) -> None:
        if draft.cluster() is not None:
            return
        draft.put(self.cluster)
        draft.put(self.admin_key)
        draft.event("cluster.made", self.cluster.id, self.by, cell=self.cluster.cell)


class StepDown(Struct, frozen=True, kw_only=True, tag="step_down"):
    """Lets the leader give its term up; returns the cluster's id.

    ``term`` and ``leader`` are what the asker saw: whoever leads by the time that it arrives is
    not who was meant, and stays. Raises StateConflict, Unavailable.
    """

    term: str
    leader: str
    by: Author

    def decide(self, draft: Draft) -> str:
        cluster = draft.cluster()
        if cluster is None:
            raise Unavailable("the cluster's record is not made yet")
        if draft.term is not None and str(draft.term) != self.term:
            raise StateConflict(f"term {self.term} is over already: another one is {draft.term}")
        draft.audit("cluster.step_down", cluster.id, self.by)
        draft.event(
            "cluster.leader_stepped_down",
            cluster.id,
            self.by,
            replica=self.leader,
            term=self.term,
        )
        draft.give_up_term()
        return cluster.id


class RecordStoreRepair(Struct, frozen=True, kw_only=True, tag="record_store_repair"):
    """Writes down who repaired the store, and what that came to; returns the cluster's id."""

    before_bytes: int
    after_bytes: int
    skipped: tuple[str, ...]
    by: Author

    def decide(self, draft: Draft) -> str:
        cluster = draft.cluster()
        if cluster is None:
            raise Unavailable("the cluster's record is not made yet")
        draft.audit("cluster.repair_store", cluster.id, self.by)
        draft.event(
            "cluster.store_repaired",
            cluster.id,
            self.by,
            before_bytes=self.before_bytes,
            after_bytes=self.after_bytes,
            skipped=list(self.skipped),
        )
        return cluster.id


class TrimHistory(Struct, frozen=True, kw_only=True):
    """Deletes history that a majority of the replicas has copied."""

    seqs: tuple[int, ...]

    def decide(self, draft: Draft) -> None:
        assert len(self.seqs) <= TRIM_MAX, "the trimmer works in steps"
        draft.trim_history(list(self.seqs))
