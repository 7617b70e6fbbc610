"""The end of all faults: whatever is wrong is put right, whatever is down is started."""

from __future__ import annotations

from tests.sim.cluster import SimCluster
from tests.sim.faults.processes import start_agent, start_replica


def heal(cluster: SimCluster) -> None:
    cluster.trace.note("heal")
    cluster.network.heal_all()
    cluster.etcd.heal()
    cluster.right_clocks()
    for replica in cluster.replicas.values():
        replica.slow_disk_s = None
        if replica.process is not None:
            replica.process.resume()
        start_replica(replica)
    for node in cluster.nodes.values():
        node.slow_log_s = None
        if not node.powered:
            node.boot()
        node.libvirtd.recover()
        if node.process is not None:
            node.process.resume()
        start_agent(node)
