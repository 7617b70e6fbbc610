"""What the records say against what libvirt has: nothing may be missing, nothing left over.

Asks the API for records and each node's libvirtd, from outside its agent, for domains, disks and
console logs. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.cli.views import VmView
from tests.lab.api import LabApi
from tests.lab.cluster import Lab
from tests.lab.commands import run
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
        found += [f"{view.name}: {line}" for line in _on_node(lab.node(view.name), bound)]
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


def _on_node(node: LightNode, bound: Sequence[VmView]) -> list[str]:
    running = {vm.id for vm in bound if vm.status.phase in ("Running", "Paused")}
    disks = sorted(f"{vm.id}-{disk.name}.qcow2" for vm in bound for disk in vm.spec.disks)
    logs = sorted(f"{vm.id}{LOG_SUFFIX}" for vm in bound)
    compared = {
        "domains": (sorted(vm.id for vm in bound), _names(node, "--all")),
        "running domains": (sorted(running), _names(node)),
        "disks": (disks, volumes(node, "default")),
        "console logs": (logs, volumes(node, CONSOLE_POOL)),
    }
    for pool, path in POOLS.items():
        on_disk = sorted(p.name for p in node.inside(path).iterdir())
        compared[f"files of pool {pool}"] = (logs if pool == CONSOLE_POOL else disks, on_disk)
    return [
        f"{what}: recorded {recorded}, found {found}"
        for what, (recorded, found) in compared.items()
        if recorded != found
    ]


def _names(node: LightNode, *options: str) -> list[str]:
    return sorted(virsh(node, "list", "--name", *options).split())
