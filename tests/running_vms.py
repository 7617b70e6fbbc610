"""Records of VMs that run, as a cell that has grown has them by the ten thousand."""

from __future__ import annotations

from datetime import datetime

from shared.ids import domain_uuid
from shared.model import (
    Attempt,
    AttemptState,
    BootSpec,
    DiskSpec,
    NicSpec,
    ObservedPower,
    Vm,
    VmSpec,
    VmStatus,
)


def typical_spec(vcpus: int) -> VmSpec:
    return VmSpec(
        vcpus=vcpus,
        memory_mib=2048,
        boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline="console=ttyS0"),
        disks=(DiskSpec(name="root", size_gib=20),),
        nics=(NicSpec(network="lan"),),
    )


def running_vm(vm_id: str, number: int, node_id: str, boot_id: str, at: datetime) -> Vm:
    """Return the record of a VM that runs in its first generation since ``at``."""
    return Vm(
        id=vm_id,
        name=f"load-{number}",
        labels={"tier": "gold", "team": f"t{number % 10}"},
        created_at=at,
        updated_at=at,
        spec=typical_spec(vcpus=1),
        domain_name=vm_id,
        domain_uuid=domain_uuid(vm_id),
        status=VmStatus(
            node=node_id,
            generation=1,
            attempt=Attempt(
                generation=1,
                node=node_id,
                boot_id=boot_id,
                state=AttemptState.RUNNING,
                permitted_at=at,
            ),
            power_seen=ObservedPower.RUNNING,
            has_run=True,
        ),
    )
