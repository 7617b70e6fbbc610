"""The scheduler's snapshot, kept: it follows the records by rereading only the nodes they touch.

Also the check that the applier repeats on its draft right before a VM is bound or permitted.
"""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.commands.draft import Draft
from controlplane.scheduler.moves import move_request
from controlplane.scheduler.place import explain
from controlplane.scheduler.request import SchedulerSettings, request_of
from controlplane.scheduler.snapshot import Snapshot, build_snapshot
from controlplane.sessions.hub import Hub
from controlplane.state import ClusterState
from shared.errors import StateConflict
from shared.model import Node, NodeState, Record, Vm, nodes_of


class KeptSnapshot:
    def __init__(self, state: ClusterState, hub: Hub, settings: SchedulerSettings) -> None:
        self._state = state
        self._hub = hub
        self._settings = settings
        self._dirty: set[str] = set()
        nodes = [self._as_trusted(stored.record) for stored in state.nodes.values()]
        vms = [stored.record for stored in state.vms.values()]
        self._snapshot = build_snapshot(nodes, vms, settings)
        state.observe(self._record_changed)
        hub.on_trust_change(self._dirty.add)

    def close(self) -> None:
        self._state.unobserve(self._record_changed)

    def current(self) -> Snapshot:
        """Return the cluster as the leader's memory has it now."""
        for node_id in sorted(self._dirty):
            stored = self._state.nodes.get(node_id)
            if stored is not None:
                vms = [vm.record for vm in self._state.vms_on(node_id)]
                self._snapshot = self._snapshot.with_node(self._as_trusted(stored.record), vms)
        self._dirty.clear()
        return self._snapshot

    def check(self, draft: Draft, vm: Vm, node_id: str) -> None:
        """Raise StateConflict unless the node can take the VM, as the draft leaves both."""
        node = self._as_trusted(draft.node(node_id))
        snapshot = build_snapshot([node], draft.vms_on(node_id), self._settings).without(vm)
        candidate = explain(snapshot, request_of(vm), node_id)
        if not candidate.fits:
            reasons = "; ".join(reason.message for reason in candidate.reasons)
            raise StateConflict(f"{node.name!r} cannot take {vm.name!r}: {reasons}")

    def check_move(self, draft: Draft, vm: Vm, node_id: str) -> None:
        """Raise StateConflict unless the node can take a VM that moves to it live."""
        assert vm.status.node is not None, "what moves is bound"
        source, node = draft.node(vm.status.node), self._as_trusted(draft.node(node_id))
        snapshot = build_snapshot([node], draft.vms_on(node_id), self._settings).without(vm)
        candidate = explain(snapshot, move_request(vm, source), node_id)
        if not candidate.fits:
            reasons = "; ".join(reason.message for reason in candidate.reasons)
            raise StateConflict(f"{node.name!r} cannot take {vm.name!r}: {reasons}")

    def _as_trusted(self, node: Node) -> Node:
        """A node that has not accepted this term takes nothing new, whatever its record says."""
        return node if self._hub.trusts(node.id) else replace(node, state=NodeState.SILENT)

    def _record_changed(self, before: Record | None, after: Record | None) -> None:
        for record in (before, after):
            if isinstance(record, Node):
                self._dirty.add(record.id)
            elif isinstance(record, Vm):
                self._dirty.update(nodes_of(record))
                if record.status.attempt is not None:
                    self._dirty.add(record.status.attempt.node)
