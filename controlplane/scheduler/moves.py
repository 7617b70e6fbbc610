"""What a running VM asks of a node that it is to move to: more than a new VM does.

Pure: no I/O, no clock, no logging.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from controlplane.scheduler.place import Plan, plan
from controlplane.scheduler.request import Move, PlacementRequest, disks_by_pool, request_of
from controlplane.scheduler.snapshot import Snapshot
from shared.model import Node, Vm


def move_request(vm: Vm, source: Node) -> PlacementRequest:
    """Return what ``vm`` asks for when it leaves ``source``; to be planned without the VM itself.

    Space is asked for the disks whose content moves along: those that are not on shared storage.
    """
    inventory = source.inventory
    shared = shared_pools(source)
    copied = tuple(disk.name for disk in vm.spec.disks if disk.pool not in shared)
    found = tuple(disk.name for disk in vm.spec.disks if disk.pool in shared)
    move = Move(
        source=source.id,
        virtualization="" if inventory is None else inventory.virtualization,
        qemu="" if inventory is None else inventory.versions.qemu,
        tls=inventory is not None and inventory.migration is not None and inventory.migration.tls,
        able=inventory is not None and inventory.migration is not None,
        shared_gib=disks_by_pool(vm, found),
    )
    return replace(request_of(vm), bound_to=None, disks_gib=disks_by_pool(vm, copied), move=move)


def plan_moves(snapshot: Snapshot, source: Node, vms: Iterable[Vm]) -> tuple[tuple[Vm, Plan], ...]:
    """Plan where each of ``vms`` would go from ``source``, each after those before it."""
    planned = []
    for vm in vms:
        request = move_request(vm, source)
        without = snapshot.without(vm)
        decision = plan(without, request)
        planned.append((vm, decision))
        if decision.node is not None:
            snapshot = without.with_placement(request, decision.node)
    return tuple(planned)


def copied_disks(vm: Vm, source: Node, destination: Node) -> tuple[str, ...]:
    """Return the disks whose content moves along: their pools are not shared by the two nodes."""
    shared = shared_pools(source) & shared_pools(destination)
    return tuple(disk.name for disk in vm.spec.disks if disk.pool not in shared)


def shared_pools(node: Node) -> frozenset[str]:
    if node.inventory is None:
        return frozenset()
    return frozenset(pool.name for pool in node.inventory.pools if pool.shared)
