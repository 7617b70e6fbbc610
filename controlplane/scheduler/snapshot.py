"""The cluster as the scheduler sees it: one immutable view, and cheap copies with one change.

A change copies the node it touches and the table of nodes, never the records. Nothing here
decides; nothing here is ever changed in place. Pure: no I/O, no clock, no logging.

What counts as taken on a node:

- A VM takes CPU and memory of the node it is bound to while it should run or pause, even if it does
  not yet (it may start at any moment), and until its attempt has ended when it should not (it may
  still run). An open attempt also counts on the attempt's own node, should that be another.
- A VM that is stopped for good takes nothing but the space of its disks. Its memory may be given
  away, so starting it again is a placement that asks anew whether it fits.
- Disks count in full, as what they may grow to, on the node that the VM is bound to.
- A VM on the move takes all of that on both of its nodes, from the moment a generation was given
  out for the second one until the first one has nothing left of it.
- A VM belongs to its groups on a node exactly where it takes CPU and memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from controlplane.scheduler.request import (
    GroupKey,
    Load,
    PlacementRequest,
    SchedulerSettings,
    disks_by_pool,
    load_of_request,
    memberships_of,
    memory_needed_mib,
)
from shared.model import (
    AttemptState,
    Labels,
    MigrationFacts,
    Node,
    NodeState,
    PoolFacts,
    Power,
    Vm,
)


class PoolView(Struct, frozen=True):
    """A storage pool in GiB: ``promised`` is what the disks of bound VMs may grow to."""

    capacity_gib: float
    reported_free_gib: float
    promised_gib: int = 0

    @property
    def free_gib(self) -> float:
        """What may still be promised.

        Disks are thin: the reported figure does not see what they have yet to grow to, and the
        promised one does not see foreign files. The smaller of the two holds.
        """
        return min(self.reported_free_gib, self.capacity_gib - self.promised_gib)


class GroupCount(Struct, frozen=True):
    """How many VMs of a group run on a node, and how many of them hard-repel the others."""

    members: int = 0
    repelling: int = 0


class NodeView(Struct, frozen=True, kw_only=True):
    """One node. ``known`` is False for a node that has not yet reported what it has.

    ``cpus`` are the node's own; ``vcpus_limit`` and ``memory_limit_mib`` are what VMs may take of
    it, after overcommit and reserve.
    """

    id: str
    name: str
    labels: Labels = {}
    state: NodeState = NodeState.SILENT
    cordoned: bool = False
    cordon_reason: str = ""
    known: bool = False
    cpus: int = 0
    vcpus_limit: int = 0
    memory_limit_mib: int = 0
    allocated_vcpus: int = 0
    allocated_memory_mib: int = 0
    networks: frozenset[str] = frozenset()
    artefacts: frozenset[str] = frozenset()
    pools: dict[str, PoolView] = {}
    groups: dict[GroupKey, GroupCount] = {}
    shared_pools: frozenset[str] = frozenset()
    virtualization: str = ""
    qemu: str = ""
    migration: MigrationFacts | None = None

    @property
    def free_vcpus(self) -> int:
        return self.vcpus_limit - self.allocated_vcpus

    @property
    def free_memory_mib(self) -> int:
        return self.memory_limit_mib - self.allocated_memory_mib

    def members(self, group: GroupKey) -> int:
        count = self.groups.get(group)
        return 0 if count is None else count.members


class Snapshot(Struct, frozen=True):
    """All nodes by id, and how many VMs of each group run anywhere."""

    settings: SchedulerSettings
    nodes: dict[str, NodeView]
    group_members: dict[GroupKey, int]

    def with_placement(self, request: PlacementRequest, node_id: str) -> Snapshot:
        """Return the cluster after ``request`` was placed on a node; raises KeyError for none."""
        return self._loaded({node_id: load_of_request(request)}, sign=1)

    def without(self, vm: Vm) -> Snapshot:
        """Return the cluster without what ``vm`` takes: where it could go if it were placed anew.

        A request for a VM that counts already must be planned on this, or it counts twice.
        """
        return self._loaded(loads_of(vm), sign=-1)

    def with_node(self, node: Node, vms: Iterable[Vm]) -> Snapshot:
        """Return the cluster with one node read anew; ``vms`` are all those that may count there.

        This is how a snapshot that is kept follows the records: once per changed node.
        """
        view = _node_view(node, vms, self.settings)
        before = self.nodes.get(node.id)
        members = dict(self.group_members)
        if before is not None:
            _add_members(members, before, sign=-1)
        _add_members(members, view, sign=1)
        return replace(self, nodes={**self.nodes, node.id: view}, group_members=members)

    def _loaded(self, loads: dict[str, Load], sign: int) -> Snapshot:
        nodes = dict(self.nodes)
        members = dict(self.group_members)
        for node_id, load in loads.items():
            if sign < 0 and node_id not in nodes:
                continue  # the node was removed, and what ran there with it
            nodes[node_id] = _with_load(nodes[node_id], load, sign)
            for group in load.groups:
                members[group] = members.get(group, 0) + sign
        return replace(self, nodes=nodes, group_members=members)


def build_snapshot(
    nodes: Iterable[Node], vms: Iterable[Vm], settings: SchedulerSettings
) -> Snapshot:
    """Build the view of a whole cluster; VMs bound to nodes that are not given count nowhere."""
    loads: dict[str, list[Load]] = {}
    for vm in vms:
        for node_id, load in loads_of(vm).items():
            loads.setdefault(node_id, []).append(load)
    views: dict[str, NodeView] = {}
    members: dict[GroupKey, int] = {}
    for node in nodes:
        view = _loaded_view(node, loads.get(node.id, ()), settings)
        views[node.id] = view
        _add_members(members, view, sign=1)
    return Snapshot(settings, views, members)


def loads_of(vm: Vm) -> dict[str, Load]:
    """Return what ``vm`` takes, by node id, after the rule on top of this module."""
    status = vm.status
    attempt = status.attempt
    maybe_running = attempt is not None and attempt.state is not AttemptState.ENDED
    wanted = vm.spec.power is not Power.STOPPED and not vm.deleting
    loads: dict[str, Load] = {}
    if status.node is not None:
        loads[status.node] = Load(disks_gib=disks_by_pool(vm))
        if wanted or maybe_running:
            loads[status.node] = _running_load(vm, loads[status.node].disks_gib)
    if attempt is not None and maybe_running and attempt.node not in loads:
        loads[attempt.node] = _running_load(vm, {})
    claim = status.migration
    if claim is not None and claim.destination is not None and claim.generation:
        for node_id in (claim.source, claim.destination):
            loads.setdefault(node_id, _running_load(vm, disks_by_pool(vm, claim.copied)))
    for leftover in status.leftovers:
        loads.setdefault(leftover.node, _running_load(vm, disks_by_pool(vm, leftover.disks)))
    return loads


def _running_load(vm: Vm, disks_gib: dict[str, int]) -> Load:
    return Load(
        vcpus=vm.spec.vcpus,
        memory_mib=memory_needed_mib(vm.spec.memory_mib, vm.spec.vcpus),
        disks_gib=disks_gib,
        groups=memberships_of(vm),
    )


def _node_view(node: Node, vms: Iterable[Vm], settings: SchedulerSettings) -> NodeView:
    loads = [load for vm in vms for node_id, load in loads_of(vm).items() if node_id == node.id]
    return _loaded_view(node, loads, settings)


def _loaded_view(node: Node, loads: Iterable[Load], settings: SchedulerSettings) -> NodeView:
    """Sum ``loads`` up first, so that a node with many VMs is copied once."""
    vcpus = memory_mib = 0
    promised: dict[str, int] = {}
    groups: dict[GroupKey, GroupCount] = {}
    for load in loads:
        vcpus += load.vcpus
        memory_mib += load.memory_mib
        for pool, size_gib in load.disks_gib.items():
            promised[pool] = promised.get(pool, 0) + size_gib
        for group, repels in load.groups.items():
            groups[group] = _count(groups.get(group, GroupCount()), repels, sign=1)
    view = _empty_view(node, settings)
    return replace(
        view,
        allocated_vcpus=vcpus,
        allocated_memory_mib=memory_mib,
        pools=_with_promises(view.pools, promised, sign=1),
        groups=groups,
    )


def _empty_view(node: Node, settings: SchedulerSettings) -> NodeView:
    view = NodeView(
        id=node.id,
        name=node.name,
        labels=node.labels,
        state=node.state,
        cordoned=node.cordoned,
        cordon_reason=node.cordon_reason,
    )
    inventory = node.inventory
    if inventory is None:
        return view
    usable_mib = max(0, inventory.memory_mib - settings.memory_reserve_mib)
    return replace(
        view,
        known=True,
        cpus=inventory.cpus,
        vcpus_limit=int(inventory.cpus * settings.cpu_overcommit),
        memory_limit_mib=int(usable_mib * settings.memory_overcommit),
        networks=frozenset(inventory.networks),
        artefacts=frozenset(inventory.artefacts),
        pools={pool.name: _pool_view(pool) for pool in inventory.pools},
        shared_pools=frozenset(pool.name for pool in inventory.pools if pool.shared),
        virtualization=inventory.virtualization,
        qemu=inventory.versions.qemu,
        migration=inventory.migration,
    )


def _pool_view(pool: PoolFacts) -> PoolView:
    return PoolView(capacity_gib=pool.capacity_gib, reported_free_gib=pool.free_gib)


def _with_load(view: NodeView, load: Load, sign: int) -> NodeView:
    groups = view.groups
    if load.groups:
        groups = dict(groups)
        for group, repels in load.groups.items():
            count = _count(groups.pop(group, GroupCount()), repels, sign)
            if count.members > 0:
                groups[group] = count
    return replace(
        view,
        allocated_vcpus=view.allocated_vcpus + sign * load.vcpus,
        allocated_memory_mib=view.allocated_memory_mib + sign * load.memory_mib,
        pools=_with_promises(view.pools, load.disks_gib, sign),
        groups=groups,
    )


def _with_promises(
    pools: dict[str, PoolView], sizes_gib: dict[str, int], sign: int
) -> dict[str, PoolView]:
    if not sizes_gib:
        return pools
    changed = dict(pools)
    for name, size_gib in sizes_gib.items():
        pool = changed.get(name)
        if pool is not None:  # a pool that the node no longer reports has no room to account for
            changed[name] = replace(pool, promised_gib=pool.promised_gib + sign * size_gib)
    return changed


def _count(count: GroupCount, repels: bool, sign: int) -> GroupCount:
    return GroupCount(count.members + sign, count.repelling + sign * repels)


def _add_members(members: dict[GroupKey, int], view: NodeView, sign: int) -> None:
    for group, count in view.groups.items():
        members[group] = members.get(group, 0) + sign * count.members
