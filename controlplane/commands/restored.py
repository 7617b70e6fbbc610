"""What a restored cluster holds back, and until when: until the nodes have told what they have."""

from __future__ import annotations

from controlplane.commands.draft import Draft
from shared.errors import StateConflict
from shared.model import Cluster, Node, Vm
from shared.protocol import VmReport

# A VM's condition, False: what is not known of it since a restore.
RECOVERED = "Recovered"
RECOVERING = (
    "the cluster was restored from a backup: nothing is started before its nodes have told what "
    "runs on them (novacron cluster status)"
)


def is_recovering(cluster: Cluster | None) -> bool:
    """Whether nothing may be started, bound or moved yet, because only a backup tells what runs."""
    return cluster is not None and cluster.restored is not None and cluster.restored.recovering


def must_tell(cluster: Cluster | None, node: Node) -> bool:
    """Whether a node has not told yet, since etcd was restored, what it has.

    Also of one that is new: it may have joined after the backup, and have guests.
    """
    if cluster is None or cluster.restored is None:
        return False
    return node.recovery.told != cluster.epoch


def check_recovered(draft: Draft, vm: Vm) -> None:
    """Raise StateConflict while a guest of the VM may run that no record tells of.

    A new VM waits as well: how full the nodes are is not known.
    """
    if is_recovering(draft.cluster()):
        raise StateConflict(RECOVERING)
    if vm.status.unproven is not None:
        raise StateConflict(f"where {vm.name!r} runs is not known since the cluster was restored")


def is_of_before_restore(draft: Draft, report: VmReport) -> bool:
    """Whether a report answers a leader of before the restore: it is of another world."""
    cluster = draft.cluster()
    return cluster is not None and 0 < report.epoch < cluster.epoch
