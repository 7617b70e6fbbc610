"""Migrations that meet trouble of the guest, of a pool, of a node: the VM never pays for it."""

from __future__ import annotations

import asyncio
import logging

import pytest
from msgspec.structs import replace

from agent.reconciler import WORKERS
from agent.simulated_driver import SimulatedDriver
from agent.simulated_fabric import Travel
from agent.simulated_guest import HeldFor, SimulatedDomain
from controlplane.sagas.engine import TELL_WAIT_AFTER_S
from controlplane.services.migrations import migrate_vm
from controlplane.services.nodes import set_cordon
from controlplane.services.requests import CordonOrder, MigrateOrder, NewVm
from controlplane.services.vms import act_on_vm, create_vm
from shared.errors import HypervisorError
from shared.model import (
    BootSpec,
    DiskSpec,
    MigrationSpec,
    ObservedPower,
    OperationState,
    Power,
    Vm,
    VmPhase,
    VmSpec,
)
from shared.moves import MigrationStage
from shared.states import VmAction, vm_phase
from tests.sim.bench import ADMIN, Bench, run

LOCAL = (DiskSpec(name="root", size_gib=1),)


def vm_of(bench: Bench, name: str = "web-1") -> Vm:
    return next(vm for vm in bench.judge.ledger.vms.values() if vm.name == name)


def stage_of(bench: Bench) -> MigrationStage | None:
    claim = vm_of(bench).status.migration
    return None if claim is None else claim.stage


def guest(bench: Bench, node_name: str, vm: Vm) -> SimulatedDomain:
    return bench.cluster.nodes[node_name].state.domains[vm.domain_name]


def driver(bench: Bench, node_name: str) -> SimulatedDriver:
    return bench.cluster.nodes[node_name].libvirtd._driver


def keep_volumes(monkeypatch: pytest.MonkeyPatch, bench: Bench, node_name: str) -> None:
    """Have a node's pools refuse to delete anything, as one that has gone read-only."""

    async def refused(pool: str, volume: str) -> None:
        raise HypervisorError(f"cannot unlink {volume}: Read-only file system")

    monkeypatch.setattr(driver(bench, node_name), "delete_volume", refused)


async def ends_of(bench: Bench) -> tuple[str, str]:
    """Return the names of the node that the VM is on, and of the other one."""
    home = await bench.where()
    assert home is not None
    (away,) = (name for name in bench.cluster.nodes if name != home)
    return home, away


def test_a_guest_that_crashes_while_it_waits_for_a_slot_starts_again_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(bench: Bench) -> None:
        bench.cluster.fabric.times = replace(bench.cluster.fabric.times, transfer_s=200.0)
        await bench.start()
        home, _ = await ends_of(bench)
        for number in range(2):
            await bench.create_on(home, f"app-{number}", (), Power.RUNNING)
        context = bench.cluster.context()
        for name in ("app-0", "app-1"):
            await migrate_vm(context, ADMIN, name, MigrateOrder())
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        waiting = await bench.migrate()
        await asyncio.sleep(2 * TELL_WAIT_AFTER_S)
        told = [m for m in caplog.messages if f"{waiting.id}: step admit waits" in m]
        assert len(told) == 1, "what it waits for is told, once"
        assert "2 VMs are leaving" in told[0]
        assert stage_of(bench) is MigrationStage.REQUESTED
        guest(bench, home, vm_of(bench)).end(ObservedPower.CRASHED)
        ended = await bench.ended(waiting, wait_s=10)
        assert (ended.error and ended.error.code) == "guest_ended"
        await bench.until(lambda: vm_phase(vm_of(bench)) is VmPhase.RUNNING, limit_s=30)
        assert len(bench.on_the_move()) == 2
        await bench.settled(limit_s=400)

    with caplog.at_level(logging.INFO):
        run(story)


def test_a_reboot_that_was_accepted_comes_before_the_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        home, away = await ends_of(bench)
        context = bench.cluster.context()
        busy: list[str] = []
        done: list[str] = []
        start, reboot = driver(bench, home).start, driver(bench, home).reboot

        async def slow(name: str, generation: int) -> None:
            busy.append(name)
            await asyncio.sleep(3)
            await start(name, generation)

        async def noted(name: str, generation: int) -> None:
            done.append(name)
            await reboot(name, generation)

        monkeypatch.setattr(driver(bench, home), "start", slow)
        monkeypatch.setattr(driver(bench, home), "reboot", noted)
        await set_cordon(context, ADMIN, away, CordonOrder(), cordoned=True)
        spec = VmSpec(vcpus=1, memory_mib=64, boot=BootSpec(kernel="tiny-kernel"))
        for number in range(WORKERS):
            await create_vm(context, ADMIN, NewVm(name=f"app-{number}", spec=spec))
        await bench.until(lambda: len(busy) == WORKERS)
        await set_cordon(context, ADMIN, away, CordonOrder(), cordoned=False)
        asked = await act_on_vm(context, ADMIN, "web-1", VmAction.REBOOT)
        moved = await bench.ended(await bench.migrate())
        assert moved.state is OperationState.SUCCEEDED, moved.error
        assert (await bench.ended(asked)).state is OperationState.SUCCEEDED
        assert done == [vm_of(bench).domain_name]
        assert await bench.where() == away
        await bench.settled()

    run(story)


def test_a_destination_that_dies_while_it_makes_ready_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home, away = await ends_of(bench)
        make = driver(bench, away).ensure_volume

        async def slow(pool: str, volume: str, size_gib: int, **options: bool) -> None:
            await make(pool, volume, size_gib, **options)
            await asyncio.sleep(1000)

        monkeypatch.setattr(driver(bench, away), "ensure_volume", slow)
        operation = await bench.migrate()
        await bench.until(lambda: bool(bench.cluster.nodes[away].state.pools["default"]))
        assert stage_of(bench) is MigrationStage.PREPARE
        bench.cluster.nodes[away].lose_power()
        ended = await bench.ended(operation, wait_s=240)
        assert ended.state is OperationState.FAILED
        assert (stage_of(bench), await bench.where()) == (None, home)
        # Nobody was told to go there: what is left of it stands in nobody's way.
        guest(bench, home, vm_of(bench)).end(ObservedPower.CRASHED)
        await bench.until(lambda: vm_of(bench).status.crashes == 1)
        await bench.until(lambda: vm_phase(vm_of(bench)) is VmPhase.RUNNING, limit_s=30)
        (left,) = vm_of(bench).status.leftovers
        assert (left.empty, left.arrival, left.disks) == (True, True, ("root",))
        bench.cluster.nodes[away].boot()
        await bench.settled()
        assert bench.cluster.nodes[away].state.pools["default"] == {}

    run(story)


def test_a_destination_that_cannot_delete_a_copy_does_not_keep_the_guest_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home, away = await ends_of(bench)
        operation = await bench.migrate()
        there = bench.cluster.fabric.relays
        await bench.until(
            lambda: guest(bench, home, vm_of(bench)).held_for is HeldFor.SWITCH, look_s=0.001
        )
        keep_volumes(monkeypatch, bench, away)
        for relay in there.values():
            assert isinstance(relay.travel, Travel)
            relay.end()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.FAILED
        assert guest(bench, home, vm_of(bench)).power is ObservedPower.RUNNING
        assert [left.empty for left in vm_of(bench).status.leftovers] == [True]
        monkeypatch.undo()
        await bench.settled()
        assert bench.cluster.nodes[away].state.pools["default"] == {}

    run(story)


def test_a_guest_that_dies_while_its_copy_is_removed_keeps_its_own_disks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was whole on both nodes; once one has been told to remove it, the other's counts."""

    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL, migration=MigrationSpec(strict=True))
        home, away = await ends_of(bench)
        delete, may_go_on = driver(bench, away).delete_volume, asyncio.Event()

        async def slow(pool: str, volume: str) -> None:
            await may_go_on.wait()
            await delete(pool, volume)

        monkeypatch.setattr(driver(bench, away), "delete_volume", slow)
        operation = await bench.migrate()
        await bench.until(lambda: _has_arrived(bench), look_s=0.001)
        for relay in bench.cluster.fabric.relays.values():
            relay.end()
        domains = bench.cluster.nodes[away].state.domains
        await bench.until(lambda: stage_of(bench) is MigrationStage.CLEAN and not domains)
        guest(bench, home, vm_of(bench)).end(ObservedPower.CRASHED)
        await asyncio.sleep(20)
        may_go_on.set()
        assert (await bench.ended(operation)).state is OperationState.FAILED
        await bench.settled()
        assert await bench.where() == home
        assert vm_phase(vm_of(bench)) is VmPhase.RUNNING
        assert len(bench.cluster.nodes[home].state.pools["default"]) == 1
        assert bench.cluster.nodes[away].state.pools["default"] == {}

    run(story)


def _has_arrived(bench: Bench) -> bool:
    travels = [relay.travel for relay in bench.cluster.fabric.relays.values()]
    return any(travel is not None and travel.switched for travel in travels)


def test_a_source_that_cannot_delete_a_disk_keeps_no_guest_from_starting_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home, away = await ends_of(bench)
        keep_volumes(monkeypatch, bench, home)
        ended = await bench.ended(await bench.migrate())
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert [left.empty for left in vm_of(bench).status.leftovers] == [True]
        guest(bench, away, vm_of(bench)).end(ObservedPower.CRASHED)
        await bench.until(lambda: vm_of(bench).status.crashes == 1)
        await bench.until(lambda: vm_phase(vm_of(bench)) is VmPhase.RUNNING, limit_s=30)
        monkeypatch.undo()
        await bench.settled()
        assert bench.cluster.nodes[home].state.pools["default"] == {}

    run(story)


def test_a_silent_source_that_returns_and_cannot_delete_a_disk_is_known_to_be_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home, away = await ends_of(bench)
        operation = await bench.migrate()
        await bench.until(lambda: stage_of(bench) is MigrationStage.FINALIZE, look_s=0.001)
        bench.cluster.nodes[home].crash_agent()
        assert (await bench.ended(operation)).state is OperationState.SUCCEEDED
        assert [left.empty for left in vm_of(bench).status.leftovers] == [False]
        keep_volumes(monkeypatch, bench, home)
        bench.cluster.nodes[home].start_agent()
        await bench.until(lambda: [left.empty for left in vm_of(bench).status.leftovers] == [True])
        monkeypatch.undo()
        await bench.settled()
        assert await bench.where() == away

    run(story)


@pytest.mark.parametrize("after_s", [0.01, 0.05, 0.3])
def test_time_in_which_nobody_led_ends_no_step(after_s: float) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        operation = await bench.migrate()
        await asyncio.sleep(after_s)
        (replica,) = bench.cluster.replicas.values()
        replica.crash()
        await asyncio.sleep(200)
        replica.start()
        await bench.cluster.until_ready()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.SUCCEEDED, ended.error
        await bench.settled()

    run(story)
