"""What must hold once everything is healed and has come to rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct

from controlplane.state import ClusterState
from shared.model import NodeState, Operation, Power, Vm, attempt_generation
from tests.sim.ledger import Ledger, attempt_is_open


class Found(Struct, frozen=True, kw_only=True):
    """What is really there on one node when everything has come to rest.

    ``running`` (also paused, by whomever) and ``defined`` are generations by VM id; ``volumes`` are
    names.
    """

    node: str
    running: dict[str, int]
    paused: tuple[str, ...]
    defined: dict[str, int]
    volumes: tuple[str, ...]
    shared_volumes: tuple[str, ...] = ()


def everything_settles(ledger: Ledger, nodes: Iterable[Found]) -> Iterator[str]:
    """I5, I24: No operation is open, every node is ready, and what is there is as recorded."""
    for operation in ledger.operations.values():
        yield f"{operation.id} ({operation.kind} of {operation.target}) is still open"
    for node in ledger.nodes.values():
        if node.state is not NodeState.READY:
            yield f"{node.name} is {node.state.value}"
    found = {node.node: node for node in nodes}
    for vm in ledger.vms.values():
        yield from _settled_vm(vm, ledger, found)
    for each in found.values():
        yield from nothing_is_left_over(ledger, each)


def nothing_is_left_over(ledger: Ledger, found: Found) -> Iterator[str]:
    """I8: No domain and no volume is on a node whose VM is not bound there."""
    here = {
        vm.id
        for vm in ledger.vms.values()
        if vm.status.node is not None and ledger.nodes[vm.status.node].name == found.node
    }
    for vm_id in found.defined:
        if vm_id not in here:
            yield f"{found.node} has a stray domain of {vm_id}"
    wanted = {
        f"{vm_id}-{disk.name}.qcow2" for vm_id in here for disk in ledger.vms[vm_id].spec.disks
    }
    for volume in found.volumes:
        if volume not in wanted:
            yield f"{found.node} has a stray volume {volume}"
    for volume in found.shared_volumes:
        if volume.rpartition("-")[0] not in ledger.vms:
            yield f"the shared pool has a stray volume {volume}"


def replicas_agree(ledger: Ledger, states: dict[str, ClusterState]) -> Iterator[str]:
    """I16: Every replica's memory is what etcd holds: nothing was dropped on the way."""
    for name, state in states.items():
        tables: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
            ("VMs", ledger.vms, state.vms),
            ("nodes", ledger.nodes, state.nodes),
            ("operations", ledger.operations, state.operations),
        )
        for what, stored, remembered in tables:
            if stored != {record_id: kept.record for record_id, kept in remembered.items()}:
                yield f"{name} remembers other {what} than etcd has"


def acknowledged_is_kept(
    ledger: Ledger, replica: str, found: dict[str, Operation | None]
) -> Iterator[str]:
    """I3: Every operation that a client was told of can be read at every replica, as it ended."""
    for operation_id in ledger.acknowledged:
        kept, ended = found.get(operation_id), ledger.finished.get(operation_id)
        if kept is None:
            yield f"{replica} does not know {operation_id}, which was acknowledged"
        elif ended is not None and kept.state is not ended.state:
            yield f"{replica} has {operation_id} as {kept.state.value}, not {ended.state.value}"


def _settled_vm(vm: Vm, ledger: Ledger, found: dict[str, Found]) -> Iterator[str]:
    node_id = vm.status.node
    node = None if node_id is None else found.get(ledger.nodes[node_id].name)
    running = None if node is None else node.running.get(vm.id)
    if vm.status.migration is not None:
        yield f"{vm.name} is still claimed by {vm.status.migration.operation}"
    for left in vm.status.leftovers:
        yield f"{left.node} may still hold generation {left.generation} of {vm.name}"
    if vm.deleting:
        yield f"{vm.name} is still being deleted"
    elif vm.spec.power is Power.STOPPED:
        if running is not None:
            yield f"{vm.name} is wanted stopped and runs"
        if attempt_is_open(vm):
            yield f"{vm.name} is wanted stopped, its attempt is open"
    elif running is None:
        yield f"{vm.name} is wanted {vm.spec.power.value} and does not run"
    elif running != attempt_generation(vm):
        yield f"{vm.name} runs as generation {running}, recorded is {attempt_generation(vm)}"
    elif node is not None and (vm.spec.power is Power.PAUSED) != (vm.id in node.paused):
        yield f"{vm.name} is wanted {vm.spec.power.value} and is not"
    elif vm.status.power_seen.value != vm.spec.power.value:
        yield f"{vm.name} is {vm.spec.power.value}, recorded is {vm.status.power_seen.value}"
