"""What happens to the cluster's record about itself, its API keys and its history."""

from __future__ import annotations

from msgspec import Struct

from controlplane.commands.draft import Author, Draft
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


class TrimHistory(Struct, frozen=True, kw_only=True):
    """Deletes history that a majority of the replicas has copied."""

    seqs: tuple[int, ...]

    def decide(self, draft: Draft) -> None:
        assert len(self.seqs) <= TRIM_MAX, "the trimmer works in steps"
        draft.trim_history(list(self.seqs))
