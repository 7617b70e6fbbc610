"""Filters: each says of one node why it cannot take a request, or None.

A filter is a function ``(request, node, context) -> Reason | None`` that looks at nothing else. A
reason is a code of a closed enum, a sentence and, where it is about an amount, the two figures. The
one tuple FILTERS names them all, in the order in which the fast path tries them. Pure.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from controlplane.scheduler.request import GroupKey, PlacementRequest, memory_needed_mib
from controlplane.scheduler.snapshot import NodeView, Snapshot
from shared.model import NodeState


class ReasonCode(enum.StrEnum):
    """Why a node cannot take a VM; also the ``reason`` label of the rejections metric."""

    BOUND_ELSEWHERE = "bound_elsewhere"
    NODE_SILENT = "node_silent"
    NODE_STATE_UNKNOWN = "node_state_unknown"
    CORDONED = "cordoned"
    NO_INVENTORY = "no_inventory"
    INSUFFICIENT_MEMORY = "insufficient_memory"
    TOO_MANY_VCPUS = "too_many_vcpus"
    INSUFFICIENT_CPU = "insufficient_cpu"
    NODE_LABELS = "node_labels"
    MISSING_NETWORK = "missing_network"
    MISSING_ARTEFACT = "missing_artefact"
    MISSING_POOL = "missing_pool"
    INSUFFICIENT_DISK = "insufficient_disk"
    AFFINITY = "affinity"
    ANTI_AFFINITY = "anti_affinity"
    RUNS_HERE = "runs_here"
    CANNOT_MIGRATE = "cannot_migrate"
    LEFT_BEHIND = "left_behind"
    OTHER_VIRTUALIZATION = "other_virtualization"
    OLDER_QEMU = "older_qemu"
    POOL_NOT_SHARED = "pool_not_shared"


class Reason(Struct, frozen=True, omit_defaults=True):
    """Why one node cannot take one request; ``needed`` and ``free`` are amounts of ``unit``."""

    code: ReasonCode
    message: str
    needed: float | None = None
    free: float | None = None
    unit: str = ""


class Context(Struct, frozen=True):
    """What every node is asked with, worked out once per request."""

    snapshot: Snapshot
    memory_needed_mib: int

    def group(self, request: PlacementRequest, name: str) -> GroupKey:
        return (request.tenant, name)


Check = Callable[[PlacementRequest, NodeView, Context], Reason | None]


class Filter(NamedTuple):
    """A check, and which requests it can refuse at all (the fast path leaves it out for others)."""

    check: Check
    concerns: Callable[[PlacementRequest], bool]


def context_of(snapshot: Snapshot, request: PlacementRequest) -> Context:
    return Context(snapshot, memory_needed_mib(request.memory_mib, request.vcpus))


def bound_elsewhere(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """A VM's disks are files of one node, and it runs where they are."""
    if request.bound_to is None or request.bound_to == node.id:
        return None
    holder = context.snapshot.nodes.get(request.bound_to)
    where = request.bound_to if holder is None else f"node {holder.name}"
    return Reason(ReasonCode.BOUND_ELSEWHERE, f"the VM is bound to {where}, which holds its disks")


def node_state(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    if node.state is NodeState.READY:
        return None
    if node.state is NodeState.SILENT:
        return Reason(ReasonCode.NODE_SILENT, "the node's agent is not heard")
    return Reason(ReasonCode.NODE_STATE_UNKNOWN, "the node's state is not known")


def cordoned(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """A cordon keeps new VMs away; one that is bound to the node already may start again."""
    if not node.cordoned or request.bound_to == node.id:
        return None
    why = f": {node.cordon_reason}" if node.cordon_reason else ""
    return Reason(ReasonCode.CORDONED, f"the node is cordoned{why}")


def inventory(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """While this refuses, the filters about what a node has say nothing."""
    if node.known:
        return None
    return Reason(ReasonCode.NO_INVENTORY, "the node has not reported yet what it has")


def memory(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    needed_mib = context.memory_needed_mib
    if not node.known or needed_mib <= node.free_memory_mib:
        return None
    overhead_mib = needed_mib - request.memory_mib
    return Reason(
        ReasonCode.INSUFFICIENT_MEMORY,
        f"needs {needed_mib} MiB of memory ({request.memory_mib} and {overhead_mib} of overhead), "
        f"{node.free_memory_mib} of {node.memory_limit_mib} MiB are free",
        needed_mib,
        node.free_memory_mib,
        "MiB",
    )


def vcpu_count(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """CPUs are shared between VMs, not within one: its vCPUs would wait for each other's locks."""
    if not node.known or request.vcpus <= node.cpus:
        return None
    return Reason(
        ReasonCode.TOO_MANY_VCPUS,
        f"has {request.vcpus} vCPUs, the node has {node.cpus} CPUs",
        request.vcpus,
        node.cpus,
        "CPUs",
    )


def cpu(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    if not node.known or request.vcpus <= node.free_vcpus:
        return None
    overcommit = context.snapshot.settings.cpu_overcommit
    return Reason(
        ReasonCode.INSUFFICIENT_CPU,
        f"needs {request.vcpus} vCPUs, {node.free_vcpus} of {node.vcpus_limit} are free "
        f"({node.cpus} CPUs, {overcommit:g} vCPUs for each)",
        request.vcpus,
        node.free_vcpus,
        "vCPUs",
    )


def node_labels(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    missing = [
        f"{k}={v}" for k, v in sorted(request.node_labels.items()) if node.labels.get(k) != v
    ]
    if not missing:
        return None
    return Reason(ReasonCode.NODE_LABELS, f"the node does not carry {_listed('label', missing)}")


def networks(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    missing = [name for name in request.networks if name not in node.networks]
    if not missing or not node.known:
        return None
    return Reason(ReasonCode.MISSING_NETWORK, f"the node has no {_listed('network', missing)}")


def artefacts(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    missing = [name for name in request.artefacts if name not in node.artefacts]
    if not missing or not node.known:
        return None
    return Reason(ReasonCode.MISSING_ARTEFACT, f"the node has no {_listed('artefact', missing)}")


def pools(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    missing = [name for name in sorted(request.disks_gib) if name not in node.pools]
    if not missing or not node.known:
        return None
    return Reason(ReasonCode.MISSING_POOL, f"the node has no {_listed('storage pool', missing)}")


def disk_space(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """Name the first pool that is too small; a pool that is missing is another filter's."""
    for name, needed_gib in sorted(request.disks_gib.items()):
        if name not in node.pools:
            continue
        free_gib = context.snapshot.free_gib(node, name)
        if needed_gib <= free_gib:
            continue
        which = "shared pool" if name in node.shared_pools else "pool"
        return Reason(
            ReasonCode.INSUFFICIENT_DISK,
            f"needs {needed_gib} GiB in {which} {name}, {free_gib:.1f} of "
            f"{node.pools[name].capacity_gib:.1f} GiB may still be promised",
            needed_gib,
            free_gib,
            "GiB",
        )
    return None


def affinity(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """The first VM of a group may go anywhere; every other goes where one of it runs."""
    for rule in request.affinity:
        group = context.group(request, rule.group)
        if not rule.hard or node.members(group):
            continue
        elsewhere = context.snapshot.group_members.get(group, 0)
        if elsewhere:
            return Reason(
                ReasonCode.AFFINITY,
                f"none of the {elsewhere} VMs of group {rule.group} run on the node",
            )
    return None


def anti_affinity(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """Hard rules bind both sides: a VM with one refuses others, and others refuse to join it."""
    for rule in request.anti_affinity:
        members = node.members(context.group(request, rule.group))
        if rule.hard and members:
            return _repelled(rule.group, members)
    for rule in (*request.affinity, *request.anti_affinity):
        count = node.groups.get(context.group(request, rule.group))
        if count is not None and count.repelling:
            return _repelled(rule.group, count.repelling)
    return None


def runs_here(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    if request.move is None or request.move.source != node.id:
        return None
    return Reason(ReasonCode.RUNS_HERE, "the VM runs on this node")


def can_migrate(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """Both ends need an agent that relays, and agree about encryption."""
    move = request.move
    if move is None or not node.known or move.source == node.id:
        return None
    if not move.able:
        return Reason(ReasonCode.CANNOT_MIGRATE, "the VM's own node cannot migrate: old agent")
    if node.migration is None:
        return Reason(ReasonCode.CANNOT_MIGRATE, "the node cannot migrate: old agent")
    if node.migration.tls is not move.tls:
        which = "this node's" if move.tls else "the VM's own node's"
        return Reason(ReasonCode.CANNOT_MIGRATE, f"{which} QEMU has no certificates for TLS")
    return None


def left_behind(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    if node.id not in request.left_behind:
        return None
    return Reason(ReasonCode.LEFT_BEHIND, "the node still holds something of the VM, to be swept")


def virtualization(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    move = request.move
    if move is None or not node.known or node.virtualization == move.virtualization:
        return None
    return Reason(
        ReasonCode.OTHER_VIRTUALIZATION,
        f"the VM runs under {move.virtualization}, the node has {node.virtualization}",
    )


def qemu_version(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    """QEMU reads the state of older releases, not of newer ones."""
    move = request.move
    if move is None or not node.known or _version(node.qemu) >= _version(move.qemu):
        return None
    return Reason(
        ReasonCode.OLDER_QEMU, f"the VM runs in QEMU {move.qemu}, the node has {node.qemu}"
    )


def shared_pools(request: PlacementRequest, node: NodeView, context: Context) -> Reason | None:
    if request.move is None or not node.known:
        return None
    missing = [name for name in request.move.shared_pools if name not in node.shared_pools]
    if not missing:
        return None
    return Reason(
        ReasonCode.POOL_NOT_SHARED, f"the node does not share {_listed('storage pool', missing)}"
    )


def _version(text: str) -> tuple[int, ...]:
    """Return a version's numbers; what is no number counts as nothing."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:2])


def _repelled(group: str, members: int) -> Reason:
    vms = "a VM" if members == 1 else f"{members} VMs"
    return Reason(
        ReasonCode.ANTI_AFFINITY, f"{vms} of group {group}, which is to be kept apart, on the node"
    )


def _listed(what: str, names: list[str]) -> str:
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _always(request: PlacementRequest) -> bool:
    return True


def _moves(request: PlacementRequest) -> bool:
    return request.move is not None


# Cheap ones that refuse often come first. Reading on costs nothing but time: a plan asks them all.
FILTERS: tuple[Filter, ...] = (
    Filter(bound_elsewhere, lambda request: request.bound_to is not None),
    Filter(runs_here, _moves),
    Filter(node_state, _always),
    Filter(cordoned, _always),
    Filter(inventory, _always),
    Filter(memory, _always),
    Filter(cpu, _always),
    Filter(vcpu_count, _always),
    Filter(node_labels, lambda request: bool(request.node_labels)),
    Filter(networks, lambda request: bool(request.networks)),
    Filter(artefacts, lambda request: bool(request.artefacts)),
    Filter(pools, lambda request: bool(request.disks_gib)),
    Filter(disk_space, lambda request: bool(request.disks_gib)),
    Filter(can_migrate, _moves),
    Filter(left_behind, lambda request: bool(request.left_behind)),
    Filter(virtualization, _moves),
    Filter(qemu_version, _moves),
    Filter(shared_pools, _moves),
    Filter(affinity, lambda request: bool(request.affinity)),
    Filter(anti_affinity, lambda request: bool(request.affinity or request.anti_affinity)),
)
