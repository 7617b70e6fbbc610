"""The end of all faults: whatever is wrong is put right, whatever is down is started."""

from __future__ import annotations

from tests.sim.cluster import SimCluster
from tests.sim.faults.processes import start_agent, start_replica


def heal(cluster: SimCluster) -> None:
    """A follower whose watch has left something out does not find that by itself: it is restarted,
    as its operator would.
    """
    cluster.trace.note("heal")
    cluster.network.heal_all()
    cluster.etcd.heal()
    cluster.right_clocks()
    for replica in cluster.replicas.values():
        replica.slow_disk_s = None
        if replica.process is not None:
            replica.process.resume()
            if replica.process.missed_events:
                replica.crash()
        start_replica(replica)
    for node in cluster.nodes.values():
        node.slow_log_s = None
        if not node.powered:
            node.boot()
        node.libvirtd.recover()
        if node.process is not None:
            node.process.resume()
        start_agent(node)
