"""What a VM asks of a node: the request that is placed, and the load it is once it is there.

Owns the rules that turn a VM's record into figures (memory overhead, group membership). Pure: no
I/O, no clock, no logging.
"""

from __future__ import annotations

from msgspec import Struct

from shared.model import GroupRule, Labels, PlacementSpec, Vm

GroupKey = tuple[str, str]

# What a VM's QEMU process takes besides the guest's memory. Fixed: QEMU 7.2 without a display has
# 36 MiB resident before the guest's first instruction (measured), and I/O buffers come on top.
# Per vCPU: a thread with its stack and KVM's state. Share: each 4 KiB page has an 8-byte entry in
# QEMU's page table and another in KVM's, together 1/256 of the guest's memory.
OVERHEAD_FIXED_MIB = 48
OVERHEAD_PER_VCPU_MIB = 4
OVERHEAD_MEMORY_DIVISOR = 256


class SchedulerSettings(Struct, frozen=True, kw_only=True):
    """How far nodes are filled.

    ``cpu_overcommit``: vCPUs per CPU; idle guests share well, and 4 leaves a busy one a quarter.
    ``memory_overcommit``: above 1 the node must be able to swap or share pages; memory that is
    promised twice and wanted twice kills guests, so the default promises it once.
    ``memory_reserve_mib``: held back on each node for its kernel, libvirtd, agent and page cache.
    """

    cpu_overcommit: float = 4.0
    memory_overcommit: float = 1.0
    memory_reserve_mib: int = 512


class Move(Struct, frozen=True, kw_only=True):
    """Where a VM that moves live comes from, and what that asks of its new node.

    ``able``: the source can take part.
    ``shared_gib`` is what its disks on shared storage have been promised, by pool: no new space.
    """

    source: str
    virtualization: str
    qemu: str
    tls: bool
    able: bool
    shared_gib: dict[str, int] = {}

    @property
    def shared_pools(self) -> tuple[str, ...]:
        return tuple(sorted(self.shared_gib))


class PlacementRequest(Struct, frozen=True, kw_only=True):
    """One VM to place.

    ``disks_gib`` is the space still to be made, by pool: nothing for a VM whose disks exist.
    ``bound_to`` is the id of the node that holds them, the only one on which it can run.
    ``left_behind`` are nodes that still hold something of the VM, to be swept.
    """

    vm_id: str
    tenant: str
    vcpus: int
    memory_mib: int
    artefacts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    disks_gib: dict[str, int] = {}
    node_labels: Labels = {}
    affinity: tuple[GroupRule, ...] = ()
    anti_affinity: tuple[GroupRule, ...] = ()
    bound_to: str | None = None
    left_behind: tuple[str, ...] = ()
    move: Move | None = None


class Load(Struct, frozen=True, kw_only=True, gc=False):
    """What one VM takes of one node; ``groups`` says of each group whether the VM hard-repels it.

    ``memory_mib`` includes the overhead.
    """

    vcpus: int = 0
    memory_mib: int = 0
    disks_gib: dict[str, int] = {}
    groups: dict[GroupKey, bool] = {}


def request_of(vm: Vm) -> PlacementRequest:
    """Return what ``vm`` asks for; one that is bound asks for its node, and for no new disks."""
    spec = vm.spec
    bound_to = vm.status.node
    boot = spec.boot
    return PlacementRequest(
        vm_id=vm.id,
        tenant=vm.tenant,
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        artefacts=(boot.kernel,) if boot.initrd is None else (boot.kernel, boot.initrd),
        networks=tuple(sorted({nic.network for nic in spec.nics})),
        disks_gib=disks_by_pool(vm) if bound_to is None else {},
        node_labels=spec.placement.node_labels,
        affinity=spec.placement.affinity,
        anti_affinity=spec.placement.anti_affinity,
        bound_to=bound_to,
        left_behind=tuple(leftover.node for leftover in vm.status.leftovers),
    )


def load_of_request(request: PlacementRequest) -> Load:
    """Return what the node gives away when ``request`` is placed on it.

    The disks that a move finds on shared storage are no new promise, but count from then on there:
    a move is planned without the VM, and so without them.
    """
    found_gib = {} if request.move is None else request.move.shared_gib
    return Load(
        vcpus=request.vcpus,
        memory_mib=memory_needed_mib(request.memory_mib, request.vcpus),
        disks_gib={**found_gib, **request.disks_gib},
        groups=memberships(request.tenant, request.affinity, request.anti_affinity),
    )


def memory_needed_mib(memory_mib: int, vcpus: int) -> int:
    """Return what a VM takes of its node's memory: the guest's and QEMU's own."""
    page_tables_mib = -(-memory_mib // OVERHEAD_MEMORY_DIVISOR)
    return memory_mib + OVERHEAD_FIXED_MIB + OVERHEAD_PER_VCPU_MIB * vcpus + page_tables_mib


def memberships(
    tenant: str, affinity: tuple[GroupRule, ...], anti_affinity: tuple[GroupRule, ...]
) -> dict[GroupKey, bool]:
    """Return the groups that a VM belongs to, each with whether a hard rule repels the others."""
    groups = {(tenant, rule.group): False for rule in affinity}
    for rule in anti_affinity:
        key = (tenant, rule.group)
        groups[key] = groups.get(key, False) or rule.hard
    return groups


def memberships_of(vm: Vm) -> dict[GroupKey, bool]:
    placement: PlacementSpec = vm.spec.placement
    return memberships(vm.tenant, placement.affinity, placement.anti_affinity)


def disks_by_pool(vm: Vm, names: tuple[str, ...] | None = None) -> dict[str, int]:
    """Return the GiB that a VM's disks, or those of them named, may grow to in each pool."""
    sizes: dict[str, int] = {}
    for disk in vm.spec.disks:
        if names is not None and disk.name not in names:
            continue
        sizes[disk.pool] = sizes.get(disk.pool, 0) + disk.size_gib
    return sizes
