"""A world whose records are a restored backup's: what the tests of its recovery need."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from controlplane.commands.recovery import SettleVm
from controlplane.commands.whereabouts import Seen
from shared.model import Cluster, ObservedPower, Vm, nodes_of
from shared.moves import EndState
from shared.protocol import Sighting
from shared.restores import Restored, Unproven
from tests.unit.core_world import BORN, CELL, LEADER, CoreWorld

EPOCH = 1_800_000_000
FLOOR = 10**12
RUNNING, HELD, DOWN = EndState.RUNNING, EndState.HELD, EndState.DOWN
POWERS = {
    RUNNING: ObservedPower.RUNNING,
    HELD: ObservedPower.PAUSED,
    EndState.AWAY: ObservedPower.PAUSED,
    DOWN: ObservedPower.STOPPED,
}


class RestoredWorld(CoreWorld):
    """``n1`` and ``n2``; made as any other, then ``restore`` makes a backup of it the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.two = self.join("n2")

    def restore(self) -> None:
        cluster = Cluster(
            id="cluster-1",
            cell=CELL,
            epoch=EPOCH,
            created_at=BORN,
            restored=Restored(backup_at=BORN, at=BORN),
        )
        self.put(cluster)
        for vm in [stored.record for stored in self.state.vms.values()]:
            status = replace(vm.status, generation=FLOOR, unproven=Unproven(nodes=nodes_of(vm)))
            self.put(replace(vm, status=status))

    def put(self, record: Any) -> None:
        self.state.put(record, self.state.revision + 1)
        self.state.advanced(self.state.revision + 1)

    def seen(
        self, node: str, generation: int, end: EndState, *, departing: bool = False, **changes: Any
    ) -> Seen:
        node_id = self.node_id if node == "n1" else self.two
        sighting = Sighting(
            vm_id="",
            generation=generation,
            end=end,
            power=changes.get("power", POWERS.get(end, ObservedPower.UNKNOWN)),
            departing=departing,
        )
        boot_id = changes.get("boot_id", "boot-1")
        return Seen(node_id=node_id, node_name=node, boot_id=boot_id, sighting=sighting)

    def settle_command(self, vm_id: str, *seen: Seen, heard: tuple[str, ...] = ()) -> SettleVm:
        nodes = frozenset(heard or (self.node_id, self.two))
        return SettleVm(vm_id=vm_id, seen=seen, heard=nodes, by=LEADER)

    def settle(self, vm_id: str, *seen: Seen, heard: tuple[str, ...] = ()) -> Vm:
        self.apply(self.settle_command(vm_id, *seen, heard=heard))
        return self.vm(vm_id)
