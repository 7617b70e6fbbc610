"""The scheduler's snapshot, kept: it follows the records by rereading only the nodes they touch.

Also the check that the applier repeats on its draft right before a VM is bound or permitted.
"""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.commands.draft import Draft
from controlplane.scheduler.moves import move_request, shared_pools
from controlplane.scheduler.place import explain
from controlplane.scheduler.request import PlacementRequest, SchedulerSettings, request_of
from controlplane.scheduler.snapshot import Snapshot, build_snapshot
from controlplane.sessions.hub import Hub
from controlplane.state import ClusterState
from shared.errors import StateConflict
from shared.model import Node, NodeState, Record, Vm, nodes_of
from shared.offload import Offload


class KeptSnapshot:
    def __init__(self, state: ClusterState, hub: Hub, settings: SchedulerSettings) -> None:
        self._state = state
        self._hub = hub
        self._settings = settings
        # Until it is built, and for every node whose records have changed since.
        self._dirty: set[str] = set(state.nodes)
        self._snapshot = build_snapshot((), (), settings)
        state.observe(self._record_changed)
        hub.on_trust_change(self._dirty.add)

    async def build(self, offload: Offload) -> None:
        """Read all nodes and VMs off the loop; what changes meanwhile is read again when needed."""
        self._dirty.clear()
        nodes = [self._as_trusted(stored.record) for stored in self._state.nodes.values()]
        vms = [stored.record for stored in self._state.vms.values()]
        self._snapshot = await offload(lambda: build_snapshot(nodes, vms, self._settings))

    def close(self) -> None:
        self._state.unobserve(self._record_changed)

    def current(self) -> Snapshot:
        """Return the cluster as the leader's memory has it now."""
        while self._dirty:
            dirty = sorted(self._dirty)
            self._dirty.clear()
            for node_id in dirty:
                stored = self._state.nodes.get(node_id)
                if stored is None:
                    self._snapshot = self._snapshot.without_node(node_id)
                else:
                    self._reread(self._as_trusted(stored.record))
        return self._snapshot

    def check(self, draft: Draft, vm: Vm, node_id: str) -> None:
        """Raise StateConflict unless the node can take the VM, as the draft leaves both."""
        self._check(draft, vm, node_id, request_of(vm))

    def check_move(self, draft: Draft, vm: Vm, node_id: str) -> None:
        """Raise StateConflict unless the node can take a VM that moves to it live."""
        assert vm.status.node is not None, "what moves is bound"
        self._check(draft, vm, node_id, move_request(vm, draft.node(vm.status.node)))

    def _check(self, draft: Draft, vm: Vm, node_id: str, request: PlacementRequest) -> None:
        node = self._as_trusted(draft.node(node_id))
        snapshot = build_snapshot([node], draft.vms_on(node_id), self._settings).without(vm)
        if request.disks_gib.keys() & snapshot.nodes[node_id].shared_pools:
            snapshot = replace(snapshot, shared_gib=self._shared_gib(draft, vm))
        candidate = explain(snapshot, request, node_id)
        if not candidate.fits:
            reasons = "; ".join(reason.message for reason in candidate.reasons)
            raise StateConflict(f"{node.name!r} cannot take {vm.name!r}: {reasons}")

    def _shared_gib(self, draft: Draft, vm: Vm) -> dict[str, int]:
        """Return what all but ``vm`` are promised of the shared pools, as the draft leaves them."""
        snapshot = self.current()
        for _, node in draft.changes_of(Node):
            if node is None:
                continue
            view = snapshot.nodes.get(node.id)
            if view is None or view.shared_pools != shared_pools(node):
                vms = [stored.record for stored in self._state.vms_on(node.id)]
                snapshot = snapshot.with_node(node, vms)
        return snapshot.shared_gib_after((*draft.changes_of(Vm), (vm, None)))

    def _reread(self, node: Node) -> None:
        before = self._snapshot.nodes.get(node.id)
        vms = [vm.record for vm in self._state.vms_on(node.id)]
        self._snapshot = self._snapshot.with_node(node, vms)
        if before is None or before.shared_pools != self._snapshot.nodes[node.id].shared_pools:
            # Which of its nodes counts a moving VM's disks goes by which of them share the pool.
            self._dirty.update(other for vm in vms for other in nodes_of(vm) if other != node.id)

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
