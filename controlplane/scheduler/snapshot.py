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
- A pool that nodes name as shared is one store: what is promised of it is the sum over all of them,
  each VM's disks once, on whichever of them the VM is, goes to or has left something.
- A VM on the move takes all of that on both of its nodes, from the moment a generation was given
  out for the second one until the first one has nothing left of it; where only files are left of
  it, these.
- A VM of which only a restored backup tells takes that on every node that may have it.
- A VM belongs to its groups on a node exactly where it takes CPU and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    """A node's storage pool in GiB: ``promised`` is what the disks of its VMs may grow to.

    Of a shared pool that is the node's part; the whole is ``Snapshot.promised_gib``.
    """

    capacity_gib: float
    reported_free_gib: float
    promised_gib: int = 0


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
    """All nodes by id, and what is counted over all of them.

    ``group_members``: how many VMs of each group run anywhere. ``shared_gib``: what is promised of
    each shared pool, by its name; kept as a sum, so that no candidate asks all nodes for it.
    """

    settings: SchedulerSettings
    nodes: dict[str, NodeView]
    group_members: dict[GroupKey, int]
    shared_gib: dict[str, int] = {}

    def promised_gib(self, node: NodeView, pool: str) -> int:
        """Return what is promised of a pool of a node: by all nodes that share it, if it is shared.

        Raises KeyError when the node has no such pool.
        """
        if pool in node.shared_pools:
            return self.shared_gib.get(pool, 0)
        return node.pools[pool].promised_gib

    def free_gib(self, node: NodeView, pool: str) -> float:
        """Return what may still be promised of a pool of a node. Raises KeyError for no such pool.

        Disks are thin: the reported figure does not see what they have yet to grow to, and the
        promised one does not see foreign files. The smaller of the two holds.
        """
        facts = node.pools[pool]
        return min(facts.reported_free_gib, facts.capacity_gib - self.promised_gib(node, pool))

    def with_placement(self, request: PlacementRequest, node_id: str) -> Snapshot:
        """Return the cluster after ``request`` was placed on a node; raises KeyError for none."""
        return self._loaded({node_id: load_of_request(request)}, sign=1)

    def without(self, vm: Vm) -> Snapshot:
        """Return the cluster without what ``vm`` takes: where it could go if it were placed anew.

        A request for a VM that counts already must be planned on this, or it counts twice.
        """
        return self._loaded(_counted_once(loads_of(vm), self.nodes), sign=-1)

    def with_node(self, node: Node, vms: Iterable[Vm]) -> Snapshot:
        """Return the cluster with one node read anew; ``vms`` are all those that may count there.

        This is how a snapshot that is kept follows the records: once per changed node. If another
        of a VM's nodes has come to share a pool, or shares it no longer, that is read anew as well.
        """
        empty = _empty_view(node, self.settings)
        before = self.nodes.get(node.id)
        nodes = {**self.nodes, node.id: empty}
        counted = (_counted_once(loads_of(vm), nodes) for vm in vms)
        view = nodes[node.id] = _with_loads(
            empty, [loads[node.id] for loads in counted if node.id in loads]
        )
        members, shared_gib = dict(self.group_members), dict(self.shared_gib)
        if before is not None:
            _add_members(members, before, sign=-1)
            _add_shared(shared_gib, before, sign=-1)
        _add_members(members, view, sign=1)
        _add_shared(shared_gib, view, sign=1)
        return replace(self, nodes=nodes, group_members=members, shared_gib=shared_gib)

    def without_node(self, node_id: str) -> Snapshot:
        """Return the cluster without a node that was removed, and what counted there."""
        nodes = dict(self.nodes)
        before = nodes.pop(node_id, None)
        if before is None:
            return self
        members, shared_gib = dict(self.group_members), dict(self.shared_gib)
        _add_members(members, before, sign=-1)
        _add_shared(shared_gib, before, sign=-1)
        return replace(self, nodes=nodes, group_members=members, shared_gib=shared_gib)

    def shared_gib_after(self, changes: Iterable[tuple[Vm | None, Vm | None]]) -> dict[str, int]:
        """Return what is promised of the shared pools after each (before, after) of ``changes``.

        Costs what the changes come to, whatever the size of the cluster.
        """
        sums = dict(self.shared_gib)
        for change in changes:
            for vm, sign in zip(change, (-1, 1), strict=True):
                if vm is None:
                    continue
                for node_id, load in _counted_once(loads_of(vm), self.nodes).items():
                    if node_id in self.nodes:
                        _add_shared_load(sums, self.nodes[node_id], load, sign)
        return sums

    def _loaded(self, loads: dict[str, Load], sign: int) -> Snapshot:
        nodes = dict(self.nodes)
        members, shared_gib = dict(self.group_members), dict(self.shared_gib)
        for node_id, load in loads.items():
            if sign < 0 and node_id not in nodes:
                continue  # the node was removed, and what ran there with it
            nodes[node_id] = _with_load(nodes[node_id], load, sign)
            _add_shared_load(shared_gib, nodes[node_id], load, sign)
            for group in load.groups:
                members[group] = members.get(group, 0) + sign
        return replace(self, nodes=nodes, group_members=members, shared_gib=shared_gib)


def build_snapshot(
    nodes: Iterable[Node], vms: Iterable[Vm], settings: SchedulerSettings
) -> Snapshot:
    """Build the view of a whole cluster; VMs bound to nodes that are not given count nowhere."""
    views = {node.id: _empty_view(node, settings) for node in nodes}
    loads: dict[str, list[Load]] = {}
    for vm in vms:
        for node_id, load in _counted_once(loads_of(vm), views).items():
            loads.setdefault(node_id, []).append(load)
    members: dict[GroupKey, int] = {}
    shared_gib: dict[str, int] = {}
    for node_id, empty in views.items():
        view = views[node_id] = _with_loads(empty, loads.get(node_id, ()))
        _add_members(members, view, sign=1)
        _add_shared(shared_gib, view, sign=1)
    return Snapshot(settings, views, members, shared_gib)


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
    for node_id in () if status.unproven is None else status.unproven.nodes:
        loads[node_id] = _running_load(vm, disks_by_pool(vm))
    for leftover in status.leftovers:
        disks_gib = disks_by_pool(vm, leftover.disks)
        load = Load(disks_gib=disks_gib) if leftover.empty else _running_load(vm, disks_gib)
        loads.setdefault(leftover.node, load)
    return loads


def _running_load(vm: Vm, disks_gib: dict[str, int]) -> Load:
    return Load(
        vcpus=vm.spec.vcpus,
        memory_mib=memory_needed_mib(vm.spec.memory_mib, vm.spec.vcpus),
        disks_gib=disks_gib,
        groups=memberships_of(vm),
    )


def _counted_once(loads: dict[str, Load], nodes: Mapping[str, NodeView]) -> dict[str, Load]:
    """Return one VM's loads without the disks that an earlier node counts in the same shared pool.

    Whoever is asked to copy a disk does not share its pool; but an agent's setting may change while
    a VM is on the move or left something behind, and then both ends' files are one.
    """
    if len(loads) == 1:
        return loads
    counted_gib: dict[str, int] = {}
    counted: dict[str, Load] = {}
    for node_id, load in loads.items():
        disks_gib = dict(load.disks_gib)
        shared = nodes[node_id].shared_pools if node_id in nodes else frozenset()
        for pool in shared & disks_gib.keys():
            before_gib = counted_gib.get(pool, 0)
            counted_gib[pool] = max(before_gib, disks_gib[pool])
            disks_gib[pool] = counted_gib[pool] - before_gib
        counted[node_id] = replace(load, disks_gib=disks_gib)
    return counted


def _with_loads(view: NodeView, loads: Iterable[Load]) -> NodeView:
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


def _add_shared(sums_gib: dict[str, int], view: NodeView, sign: int) -> None:
    for name in view.shared_pools:
        _add_gib(sums_gib, name, sign * view.pools[name].promised_gib)


def _add_shared_load(sums_gib: dict[str, int], view: NodeView, load: Load, sign: int) -> None:
    for name, size_gib in load.disks_gib.items():
        if name in view.shared_pools:
            _add_gib(sums_gib, name, sign * size_gib)


def _add_gib(sums_gib: dict[str, int], name: str, size_gib: int) -> None:
    """Keep no sum of nothing, so that equal clusters have equal snapshots, however made."""
    sum_gib = sums_gib.pop(name, 0) + size_gib
    if sum_gib:
        sums_gib[name] = sum_gib
