"""What the records say against what libvirt has: nothing may be missing, nothing left over.

Asks the API for records and each node's libvirtd, from outside its agent, for domains, disks and
console logs. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from controlplane.cli.views import VmView
from tests.lab.api import LabApi
from tests.lab.cluster import Lab
from tests.lab.commands import run
from tests.lab.layout import SHARED_POOL_DIR
from tests.lab.nodes import POOLS, LightNode

CONSOLE_POOL = "novacron-console"
LOG_SUFFIX = ".log"


def differences(lab: Lab, api: LabApi) -> list[str]:
    """Return, in a line each, where records and nodes disagree; empty when they agree.

    Meant for a cell at rest: with an operation under way the two differ for a while.
    """
    vms = api.vms()
    found = []
    for view in api.nodes():
        bound = [vm for vm in vms if vm.status.node == view.id]
        found += [f"{view.name}: {line}" for line in _on_node(lab.node(view.name), bound, vms)]
        found += [f"{view.name}: {line}" for line in _in_shared_pool(lab.node(view.name), vms)]
        if view.allocated.vms != len(bound):
            found.append(f"{view.name}: {view.allocated.vms} VMs counted, {len(bound)} bound")
        if view.inventory is None or view.state != "ready":
            found.append(f"{view.name}: {view.state}")
    return found


def virsh(node: LightNode, *arguments: str) -> str:
    return run("virsh", "-c", node.libvirt_uri, *arguments)


def volumes(node: LightNode, pool: str) -> list[str]:
    """Return the names of a pool's volumes, as they are on disk now."""
    virsh(node, "pool-refresh", pool)
    lines = virsh(node, "vol-list", pool).splitlines()[2:]
    return sorted(line.split()[0] for line in lines if line.strip())


def _on_node(node: LightNode, bound: Sequence[VmView], vms: Sequence[VmView]) -> list[str]:
    running = {vm.id for vm in bound if vm.status.phase in ("Running", "Paused")}
    disks = _disks(bound, "default")
    # A node keeps what a VM said there when that moves away.
    console_dir = node.inside(POOLS[CONSOLE_POOL])
    here = {vm.id for vm in bound}
    logs = [f"{vm.id}{LOG_SUFFIX}" for vm in vms]
    logs = sorted(
        log for log in logs if log.removesuffix(LOG_SUFFIX) in here or (console_dir / log).exists()
    )
    return _unequal(
        {
            "domains": (sorted(vm.id for vm in bound), _names(node, "--all")),
            "running domains": (sorted(running), _names(node)),
            "disks": (disks, volumes(node, "default")),
            "console logs": (logs, volumes(node, CONSOLE_POOL)),
            "files of pool default": (disks, _files(node.inside(POOLS["default"]))),
            f"files of pool {CONSOLE_POOL}": (logs, _files(console_dir)),
        }
    )


def _in_shared_pool(node: LightNode, vms: Sequence[VmView]) -> list[str]:
    """Compare what every node sees, whoever put it there."""
    disks = _disks(vms, "shared")
    return _unequal(
        {
            "shared disks": (disks, volumes(node, "shared")),
            "files of pool shared": (disks, _files(SHARED_POOL_DIR)),
        }
    )


def _disks(vms: Sequence[VmView], pool: str) -> list[str]:
    return sorted(
        f"{vm.id}-{disk.name}.qcow2" for vm in vms for disk in vm.spec.disks if disk.pool == pool
    )


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _unequal(compared: dict[str, tuple[list[str], list[str]]]) -> list[str]:
    return [
        f"{what}: recorded {recorded}, found {found}"
        for what, (recorded, found) in compared.items()
        if recorded != found
    ]


def _names(node: LightNode, *options: str) -> list[str]:
    return sorted(virsh(node, "list", "--name", *options).split())
