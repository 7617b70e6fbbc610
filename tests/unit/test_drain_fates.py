"""What a drain makes of a VM at rest, by what its node's agent knows how to do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from msgspec.structs import replace

from controlplane.commands.attempts import RESTART_CAP
from controlplane.sagas.drain import (
    CRASHES_MAX,
    REASON_CHARS_MAX,
    RESTART_GRACE,
    Fate,
    FateKind,
    fate_at_rest,
    shortened,
)
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
        fate = fate_at_rest(replace(node, id=world.node_id), vm, snapshot, world.clock.now())
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


def crashed(crashes: int, after: timedelta) -> Fate | None:
    """Return what becomes of a VM with a local disk, so long after its restart came to be due."""
    world = CoreWorld()
    vm_id = world.running(disks=(DiskSpec(name="root", size_gib=1),))
    for _ in range(crashes - 1):
        world.report(vm_id, ObservedPower.CRASHED)
        world.permit(vm_id)
    world.report(vm_id, ObservedPower.CRASHED)
    vm = world.vm(vm_id)
    assert vm.status.crashes == crashes
    assert vm.status.not_before is not None
    node = replace(world.node(), inventory=ABLE)
    snapshot = build_snapshot([node], [vm], SchedulerSettings())
    return fate_at_rest(node, vm, snapshot, vm.status.not_before + after)


def test_one_that_is_about_to_be_restarted_is_waited_for() -> None:
    just_before = RESTART_GRACE - timedelta(seconds=1)
    for crashes in (1, CRASHES_MAX):
        for after in (-timedelta(seconds=1), just_before):
            fate = crashed(crashes, after)
            assert fate is not None
            assert (fate.kind, "once it runs again" in fate.reason) == (FateKind.WAIT, True)


def test_one_that_keeps_crashing_or_does_not_come_up_is_not_waited_for() -> None:
    for crashes, after in ((1, RESTART_GRACE), (CRASHES_MAX + 1, -RESTART_CAP)):
        fate = crashed(crashes, after)
        assert fate is not None
        assert (fate.kind, "does not stay up" in fate.reason) == (FateKind.STAY, True)


def test_a_long_reason_is_shortened_and_says_where_all_of_it_is() -> None:
    assert shortened("x" * REASON_CHARS_MAX, "op-1") == "x" * REASON_CHARS_MAX
    told = shortened("x" * 100_000, "op-1")
    assert len(told) < 2 * REASON_CHARS_MAX
    assert told.endswith("novacron op show op-1)")
