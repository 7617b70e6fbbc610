"""How much processes hold of what must stay within bounds.

The bounds are the product's own where it names one; the others are what the cluster's size makes
of "one for each VM" and "one for each node".
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.app import Agent
from agent.fence import REWRITE_FACTOR, REWRITE_RECORDS_MIN
from controlplane.app import ControlPlane
from controlplane.sessions.hub import QUERIES_PER_NODE_MAX
from controlplane.store.applier import WAITING_COMMANDS_MAX
from tests.sim.cluster import SimCluster
from tests.sim.ledger import Ledger, Measured

# A replica's loops, and for each node the tasks of its session, with some requests on top.
REPLICA_TASKS, TASKS_A_NODE = 80, 16
AGENT_TASKS = 60
# A VM's remains are known for as long as it takes to sweep them, or its node to hear of it.
REMAINS = 4


def sizes(cluster: SimCluster, ledger: Ledger) -> Iterator[Measured]:
    for replica in cluster.replicas.values():
        process, control_plane = replica.process, replica.control_plane
        if process is not None and control_plane is not None:
            tasks = REPLICA_TASKS + TASKS_A_NODE * len(cluster.nodes)
            yield Measured(process.incarnation, "tasks", process.task_count, tasks)
            yield from _of_leader(process.incarnation, control_plane, ledger)
    for node in cluster.nodes.values():
        if node.process is not None and node.agent is not None:
            incarnation = node.process.incarnation
            yield Measured(incarnation, "tasks", node.process.task_count, AGENT_TASKS)
            yield from _of_agent(incarnation, node.agent, ledger)


def _of_leader(incarnation: str, replica: ControlPlane, ledger: Ledger) -> Iterator[Measured]:
    hub, applier = replica.leader.hub, replica.leader._applier
    if hub is None or applier is None:
        return
    yield Measured(incarnation, "commands", len(applier._waiting), WAITING_COMMANDS_MAX)
    yield Measured(incarnation, "sessions", len(hub._sessions), len(ledger.nodes))
    for session in hub._sessions.values():
        yield Measured(incarnation, "queries", len(session.queries), QUERIES_PER_NODE_MAX)
        gone = session.sent.keys() - ledger.vms.keys()
        yield Measured(incarnation, "orders about VMs that are gone", len(gone), REMAINS)


def _of_agent(incarnation: str, agent: Agent, ledger: Ledger) -> Iterator[Measured]:
    known, vms = agent.fence._vms, ledger.vms.keys()
    yield Measured(incarnation, "VMs remembered", len(known.keys() - vms), REMAINS)
    orders = agent.reconciler._desired.keys() - vms
    yield Measured(incarnation, "orders about VMs that are gone", len(orders), REMAINS)
    kept = max(REWRITE_RECORDS_MIN, REWRITE_FACTOR * len(known)) + 1
    yield Measured(incarnation, "records in the log", agent.fence._records, kept)
