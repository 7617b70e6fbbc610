"""What a VM's description must satisfy beyond its types: every fault at once, with pointers.

Checked against the records as they are now. What no node could ever satisfy by being there (a name
that nobody has) is an error; what merely finds no room today is not: such a VM stays pending.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from controlplane.commands.vm_patch import repeated_groups
from controlplane.services.requests import NewVm
from controlplane.state import ClusterState
from shared.errors import FieldError, ValidationFailed
from shared.ids import looks_like_id
from shared.model import Power, VmSpec


class _Offered(Struct, frozen=True):
    """What at least one node has, of each kind."""

    artefacts: frozenset[str]
    pools: frozenset[str]
    networks: frozenset[str]


def check_new_vm(state: ClusterState, new: NewVm) -> None:
    """Raise ValidationFailed with every fault of a VM to make."""
    faults = (
        *_name(new.name),
        *_power(new.spec),
        *_duplicates(new.spec),
        *repeated_groups(new.spec.placement),
        *_known_to_a_node(state, new.spec),
    )
    if faults:
        raise ValidationFailed(faults)


def _name(name: str) -> Iterator[FieldError]:
    if looks_like_id(name):
        yield FieldError("/name", "bad_format", "looks like an id; a path takes either")


def _power(spec: VmSpec) -> Iterator[FieldError]:
    if spec.power is Power.UNKNOWN:
        yield FieldError("/spec/power", "not_allowed", "must be running, paused or stopped")


def _duplicates(spec: VmSpec) -> Iterator[FieldError]:
    disks = ((f"/spec/disks/{i}/name", disk.name) for i, disk in enumerate(spec.disks))
    yield from _repeated(disks, "is the name of another disk of this VM")
    macs = ((f"/spec/nics/{i}/mac", nic.mac) for i, nic in enumerate(spec.nics) if nic.mac)
    yield from _repeated(macs, "is the address of another NIC of this VM")


def _known_to_a_node(state: ClusterState, spec: VmSpec) -> Iterator[FieldError]:
    """Say nothing while no node has reported: then nothing is known to be missing."""
    offered = _offered(state)
    if offered is None:
        return
    yield from _missing("/spec/boot/kernel", spec.boot.kernel, offered.artefacts, "artefact")
    if spec.boot.initrd is not None:
        yield from _missing("/spec/boot/initrd", spec.boot.initrd, offered.artefacts, "artefact")
    for i, disk in enumerate(spec.disks):
        yield from _missing(f"/spec/disks/{i}/pool", disk.pool, offered.pools, "storage pool")
    for i, nic in enumerate(spec.nics):
        yield from _missing(f"/spec/nics/{i}/network", nic.network, offered.networks, "network")


def _offered(state: ClusterState) -> _Offered | None:
    inventories = [
        stored.record.inventory
        for stored in state.nodes.values()
        if stored.record.inventory is not None
    ]
    if not inventories:
        return None
    return _Offered(
        artefacts=frozenset(name for i in inventories for name in i.artefacts),
        pools=frozenset(pool.name for i in inventories for pool in i.pools),
        networks=frozenset(name for i in inventories for name in i.networks),
    )


def _missing(pointer: str, name: str, offered: frozenset[str], kind: str) -> Iterator[FieldError]:
    if name not in offered:
        yield FieldError(pointer, "not_found", f"no node has the {kind} {name!r}")


def _repeated(values: Iterable[tuple[str, str]], message: str) -> Iterator[FieldError]:
    seen: set[str] = set()
    for pointer, value in values:
        if value in seen:
            yield FieldError(pointer, "duplicate", f"{value!r} {message}")
        seen.add(value)
