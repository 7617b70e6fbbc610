"""What a drain makes of a VM at rest, by what its node's agent knows how to do."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from controlplane.sagas.drain import FateKind, fate_at_rest
from controlplane.scheduler.request import SchedulerSettings
from controlplane.scheduler.snapshot import build_snapshot
from shared.model import DiskSpec, MigrationFacts, Node, ObservedPower, Power
from shared.states import VmAction
from tests.unit.core_world import INVENTORY, CoreWorld

ABLE = replace(INVENTORY, migration=MigrationFacts(address="a", relay="a:1", tls=True))


def fates(node: Node, *powers: Power, **spec: Any) -> list[FateKind]:
    """Return what becomes of a VM on ``node`` that came to have each of these powers."""
    found = []
    for power in powers:
        world = CoreWorld()
        vm_id = world.running(**spec)
        if power is Power.STOPPED:
            world.act(vm_id, VmAction.STOP)
            world.report(vm_id, ObservedPower.STOPPED)
        vm = world.vm(vm_id)
        snapshot = build_snapshot([node], [vm], SchedulerSettings())
        fate = fate_at_rest(replace(node, id=world.node_id), vm, snapshot)
        found.append(FateKind.MOVE if fate is None else fate.kind)
    return found


def test_a_vm_at_rest_without_disks_is_let_go() -> None:
    node = replace(CoreWorld().node(), inventory=ABLE)
    assert fates(node, Power.STOPPED, Power.RUNNING) == [FateKind.RELEASE, FateKind.MOVE]


def test_one_with_a_disk_of_its_node_stays() -> None:
    node = replace(CoreWorld().node(), inventory=ABLE)
    disks = (DiskSpec(name="root", size_gib=1),)
    assert fates(node, Power.STOPPED, disks=disks) == [FateKind.STAY]


def test_an_agent_that_does_not_know_how_to_let_go_is_not_waited_for() -> None:
    for inventory in (INVENTORY, None):
        node = replace(CoreWorld().node(), inventory=inventory)
        assert fates(node, Power.STOPPED, Power.RUNNING) == [FateKind.STAY, FateKind.MOVE]
