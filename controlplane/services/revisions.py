"""The opaque strings that tell clients how new something is.

Three kinds, told apart by their form, so that none can be taken for another: an object's revision
``epoch.revision``, the cluster's ``epoch.revision.seq`` (lists and ``X-Novacron-Revision``), and
an event's id ``e<epoch>.<seq>``. Events can be followed from either of the last two.
"""

from __future__ import annotations

import re

from msgspec import Struct

from controlplane.state import ClusterState
from shared.errors import FieldError, ValidationFailed

# 18 digits fit etcd's and SQLite's 64 bits.
_CLUSTER = re.compile(r"(?P<epoch>[0-9]{1,18})\.(?P<revision>[0-9]{1,18})\.(?P<seq>[0-9]{1,18})")
_EVENT = re.compile(r"e(?P<epoch>[0-9]{1,18})\.(?P<seq>[0-9]{1,18})")


class ClusterRevision(Struct, frozen=True):
    """A moment of the cluster: etcd's revision and the last ``seq`` of history given out by it."""

    epoch: int
    revision: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.revision}.{self.seq}"


def epoch_of(state: ClusterState) -> int:
    cluster = state.cluster()
    return 0 if cluster is None else cluster.epoch


def object_revision(epoch: int, revision: int) -> str:
    return f"{epoch}.{revision}" if revision else ""


def present(state: ClusterState) -> ClusterRevision:
    return ClusterRevision(epoch_of(state), state.revision, state.last_seq)


def cluster_revision(state: ClusterState) -> str:
    return str(present(state))


def event_id(epoch: int, seq: int) -> str:
    return f"e{epoch}.{seq}"


def parse_cluster_revision(text: str) -> ClusterRevision | None:
    match = _CLUSTER.fullmatch(text)
    if match is None:
        return None
    return ClusterRevision(int(match["epoch"]), int(match["revision"]), int(match["seq"]))


def seq_after(state: ClusterState, since: str, parameter: str) -> int:
    """Return the ``seq`` that an event's id or a list's revision stands for.

    Raises ValidationFailed, also for one of an earlier epoch: after a restore of etcd the numbers
    mean other events, and only a fresh list is a safe start.
    """
    match = _EVENT.fullmatch(since) or _CLUSTER.fullmatch(since)
    if match is None:
        message = "is neither an event's id nor a list's revision"
        raise ValidationFailed((FieldError(f"/{parameter}", "bad_format", message),))
    if int(match["epoch"]) != epoch_of(state):
        message = "is of before a restore of the cluster: list again, and follow from there"
        raise ValidationFailed((FieldError(f"/{parameter}", "expired", message),))
    return int(match["seq"])
