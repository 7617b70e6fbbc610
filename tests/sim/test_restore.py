"""A backup restored after the loss of etcd: no guest is stopped for it, none runs twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from controlplane.backup.restoration import NUMBERS_PER_S
from controlplane.commands.draft import Author
from controlplane.commands.recovery import DeclareGone
from controlplane.services.events import list_events
from controlplane.services.migrations import migrate_vm
from controlplane.services.requests import EventQuery, MigrateOrder, NewVm
from controlplane.services.vms import act_on_vm, create_vm, get_vm
from shared.errors import StaleTerm
from shared.model import (
    BootSpec,
    DiskSpec,
    MigrationSpec,
    NodeState,
    OperationState,
    Power,
    Vm,
    VmPhase,
    VmSpec,
    attempt_generation,
    condition,
)
from shared.states import VmAction, vm_phase
from tests.sim.bench import ADMIN, Bench, run
from tests.sim.disaster import Disaster
from tests.sim.ledger import Ended, SimEvent
from tests.sim.node import SimNode

ROOT = (DiskSpec(name="root", size_gib=1),)
Story = Callable[[Bench, Disaster], Awaitable[None]]


def play(story: Story, nodes: int = 3) -> None:
    async def main(bench: Bench) -> None:
        await story(bench, Disaster(bench))

    run(main, nodes)


class Guests:
    """Watches that no agent ends a guest; what has moved, libvirt ends where it was."""

    def __init__(self, bench: Bench) -> None:
        self.ended: list[str] = []
        cluster = bench.cluster
        observe = cluster._observer
        assert observe is not None

        def watch(event: SimEvent) -> None:
            if isinstance(event, Ended) and event.by_agent:
                self.ended.append(event.vm_id)
            observe(event)

        cluster._observer = watch


async def create(bench: Bench, name: str, **spec: object) -> str:
    boot = BootSpec(kernel="tiny-kernel")
    wanted = VmSpec(vcpus=1, memory_mib=256, boot=boot, **spec)  # type: ignore[arg-type]
    operation = await create_vm(bench.cluster.context(), ADMIN, NewVm(name=name, spec=wanted))
    ended = await bench.ended(operation)
    assert ended.state is OperationState.SUCCEEDED, ended.error
    return operation.target


def vm(bench: Bench, vm_id: str) -> Vm:
    return bench.judge.ledger.vms[vm_id]


def replace_agent(node: SimNode, *, is_previous: bool) -> None:
    node.crash_agent()
    node.is_previous = is_previous
    node.start_agent()


def runs_on(bench: Bench, vm_id: str) -> dict[str, int]:
    """Return on which nodes a VM's guest really is, and under which generation."""
    found = {node.name: node.found() for node in bench.cluster.nodes.values()}
    return {name: each.running[vm_id] for name, each in found.items() if vm_id in each.running}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_what_happened_since_the_backup_is_found_again_in_whatever_order_nodes_come(
    order: tuple[int, ...],
) -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        moved = await bench.start(disks=ROOT)
        stays = await create(bench, "stays", disks=ROOT)
        deleted = await create(bench, "deleted", disks=ROOT)
        stopped = await create(bench, "stopped", disks=ROOT)
        rests = await create(bench, "rests", disks=ROOT)
        await bench.ended(await act_on_vm(bench.cluster.context(), ADMIN, "rests", VmAction.STOP))
        backup = await disaster.back_up()

        await bench.ended(await bench.migrate())
        place = await bench.where()
        await disaster.delete("deleted")
        context = bench.cluster.context()
        await bench.ended(await act_on_vm(context, ADMIN, "stopped", VmAction.STOP))
        await bench.ended(await act_on_vm(context, ADMIN, "rests", VmAction.START))
        new = await create(bench, "new", disks=ROOT)
        before = {each: runs_on(bench, each) for each in (moved, stays, rests, new)}
        assert [list(each) for each in before.values() if len(each) != 1] == []

        guests = Guests(bench)
        nodes = list(bench.cluster.nodes.values())
        for node in nodes:
            node.crash_agent()
        await disaster.strike(backup)
        for position in order:
            await asyncio.sleep(7)
            assert disaster.recovering()
            nodes[position].start_agent()
        await disaster.until_recovered()
        await bench.until(lambda: vm_phase(vm(bench, stopped)) is VmPhase.RUNNING)

        assert guests.ended == []
        assert {each: runs_on(bench, each) for each in before} == before
        assert await bench.where() == place
        assert vm(bench, rests).spec.power is Power.RUNNING
        found = vm(bench, deleted)
        assert (found.spec.power, runs_on(bench, deleted)) == (Power.STOPPED, {})
        doubt = condition(found, "Recovered")
        assert doubt is not None
        assert doubt.reason == "not_found"
        status = await disaster.status()
        assert (status.unrecorded, status.unproven) == (1, 0)
        assert new not in bench.judge.ledger.vms
        # Its disk is gone: started by its user, it says so, and gets no empty one.
        start = await act_on_vm(bench.cluster.context(), ADMIN, "deleted", VmAction.START)
        ended = await bench.ended(start)
        assert ended.error is not None
        assert ended.error.code == "disk_missing"

    play(story)


def test_while_a_node_is_away_nothing_of_the_backup_is_started_bound_or_moved() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        vm_id = await bench.start(disks=ROOT)
        crashed = await create(bench, "crashed", disks=ROOT)
        backup = await disaster.back_up()
        home = bench.cluster.nodes[await bench.where() or ""]
        away = next(node for node in bench.cluster.nodes.values() if node is not home)
        at = next(iter(runs_on(bench, crashed)))
        away.crash_agent()
        bench.cluster.nodes[at].state.guest_crashes(crashed)
        await disaster.strike(backup)
        await asyncio.sleep(300)
        assert disaster.recovering()
        assert (await disaster.status()).waits_for == tuple(
            sorted(node.name for node in bench.cluster.nodes.values())
        )
        assert runs_on(bench, crashed) == {}
        new = NewVm(
            name="new", spec=VmSpec(vcpus=1, memory_mib=256, boot=BootSpec(kernel="tiny-kernel"))
        )
        waits = await create_vm(bench.cluster.context(), ADMIN, new)
        await asyncio.sleep(30)
        assert runs_on(bench, waits.target) == {}

        away.start_agent()
        await disaster.until_recovered()
        await bench.settled()
        assert runs_on(bench, vm_id) == {home.name: attempt_generation(vm(bench, vm_id))}
        assert len(runs_on(bench, crashed)) == len(runs_on(bench, waits.target)) == 1

    play(story)


def test_a_node_that_never_comes_back_is_declared_gone_and_its_vms_wait_for_it() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        vm_id = await bench.start(disks=ROOT)
        backup = await disaster.back_up()
        home = bench.cluster.nodes[await bench.where() or ""]
        home.crash_agent()
        await disaster.strike(backup)
        ledger = bench.judge.ledger
        node = next(node for node in ledger.nodes.values() if node.name == home.name)
        await asyncio.sleep(60)
        submit = bench.cluster.context().submit
        await submit(DeclareGone(node_id=node.id, by=Author("admin")))
        await disaster.until_recovered()
        status = await disaster.status()
        assert (status.gone, status.unproven) == ((home.name,), 1)
        await create(bench, "new")
        await asyncio.sleep(300)
        assert runs_on(bench, vm_id) == {home.name: 1}

        # It was not gone: its guest goes on, and nothing was made of it elsewhere.
        home.start_agent()
        await bench.until(lambda: vm_phase(vm(bench, vm_id)) is VmPhase.RUNNING)
        assert runs_on(bench, vm_id) == {home.name: 1}
        await bench.settled()

    play(story)


@pytest.mark.parametrize("restored_after_s", [0.5, 60.0])
@pytest.mark.parametrize("strict", [False, True])
def test_a_guest_that_is_moved_while_etcd_is_lost_is_found_on_one_node(
    restored_after_s: float, strict: bool
) -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        times = bench.cluster.fabric.times
        bench.cluster.fabric.times = replace(times, transfer_s=20.0)
        vm_id = await bench.start(disks=ROOT, migration=MigrationSpec(strict=strict))
        backup = await disaster.back_up()
        await bench.migrate()
        await bench.until(lambda: bool(bench.on_the_move()))
        await asyncio.sleep(5)
        guests = Guests(bench)
        await disaster.lose_etcd()
        await asyncio.sleep(restored_after_s)
        await disaster.restore(backup)
        disaster.start_replicas()
        await disaster.until_recovered()
        await bench.until(lambda: vm_phase(vm(bench, vm_id)) is VmPhase.RUNNING)
        (home,) = runs_on(bench, vm_id)
        assert await bench.where() == home
        assert guests.ended == []
        assert vm(bench, vm_id).status.power_seen.value == "running"

    play(story, nodes=2)


def test_a_backup_made_in_the_middle_of_a_move_keeps_both_nodes_until_they_have_told() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        bench.cluster.fabric.times = replace(bench.cluster.fabric.times, transfer_s=20.0)
        vm_id = await bench.start(disks=ROOT)
        operation = await bench.migrate()
        await bench.until(lambda: bool(bench.on_the_move()))
        backup = await disaster.back_up()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.SUCCEEDED
        place = await bench.where()
        await disaster.strike(backup)
        await bench.until(lambda: disaster.told() is True)
        unproven = vm(bench, vm_id).status.unproven
        assert unproven is not None
        assert len(unproven.nodes) == 2
        assert bench.judge.ledger.finished[operation.id].error is not None
        await disaster.until_recovered()
        assert await bench.where() == place
        await bench.until(lambda: vm_phase(vm(bench, vm_id)) is VmPhase.RUNNING)

    play(story, nodes=2)


def test_the_same_backup_restored_twice_reuses_no_generation() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        vm_id = await bench.start(disks=ROOT)
        backup = await disaster.back_up()
        epochs: list[int] = []
        for _ in range(2):
            epochs.append((await disaster.strike(backup)).cluster.epoch)
            await disaster.until_recovered()
            await bench.settled()
            # A guest that falls is started again, under a number that nobody had before.
            (home,) = runs_on(bench, vm_id)
            bench.cluster.nodes[home].state.guest_crashes(vm_id)
            await bench.until(lambda: bool(runs_on(bench, vm_id)))
            (generation,) = runs_on(bench, vm_id).values()
            assert generation == epochs[-1] * NUMBERS_PER_S + 1
            await bench.settled()
        assert epochs[0] < epochs[1]

    play(story)


def test_a_copy_of_history_that_is_ahead_of_the_backup_misses_nothing_of_after() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        await bench.start()
        backup = await disaster.back_up()
        for _ in range(20):
            for action in (VmAction.PAUSE, VmAction.RESUME):
                acted = await act_on_vm(bench.cluster.context(), ADMIN, "web-1", action)
                await bench.ended(acted)
        lost_seq = bench.judge.ledger.last_seq
        await asyncio.sleep(10)
        restoration = await disaster.strike(backup)
        await disaster.until_recovered()
        await create(bench, "new")
        first = restoration.mark.seq - restoration.ended - 1
        assert first > lost_seq
        history, state = bench.cluster.context().history, bench.cluster.context().state
        await bench.until(lambda: state.last_seq == bench.judge.ledger.last_seq)
        await asyncio.sleep(10)
        copied = [seq for seq, _ in await history.bodies(lost_seq, state.last_seq)]
        assert copied == list(range(first, state.last_seq + 1))
        assert await history.copied_seq() == state.last_seq
        told = await list_events(bench.cluster.context(), ADMIN, EventQuery(kind=("cluster.*",)))
        assert "cluster.restored" in {event.kind for event in told.items}

    play(story)


def test_an_agent_of_the_previous_release_is_waited_for_and_keeps_its_guests() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        vm_id = await bench.start(disks=ROOT)
        backup = await disaster.back_up()
        home = bench.cluster.nodes[await bench.where() or ""]
        replace_agent(home, is_previous=True)
        await bench.settled()
        # What it has of the VM is of a higher revision than any after the restore.
        for action in (VmAction.PAUSE, VmAction.RESUME) * 10:
            acted = await act_on_vm(bench.cluster.context(), ADMIN, "web-1", action)
            await bench.ended(acted)
        guests = Guests(bench)
        await disaster.strike(backup)
        await asyncio.sleep(300)
        assert disaster.recovering()
        assert runs_on(bench, vm_id) == {home.name: 1}

        replace_agent(home, is_previous=False)
        await disaster.until_recovered()
        await bench.settled()
        assert guests.ended == []
        assert runs_on(bench, vm_id) == {home.name: 1}
        await bench.ended(await bench.migrate())
        assert await bench.where() != home.name

    play(story)


def test_agents_refuse_whoever_leads_in_an_earlier_epoch() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        await bench.start()
        backup = await disaster.back_up()
        leading = bench.cluster.leading()
        assert leading is not None
        old = leading.leader.term
        assert old is not None
        await disaster.strike(backup)
        await disaster.until_recovered()
        for node in bench.cluster.nodes.values():
            assert node.agent is not None
            assert node.agent.fence.term > old
            with pytest.raises(StaleTerm):
                node.agent.fence.check_term(replace(old, revision=10**12))

    play(story)


def test_a_node_that_joined_after_the_backup_keeps_what_it_runs() -> None:
    async def story(bench: Bench, disaster: Disaster) -> None:
        late = bench.cluster.nodes["node-3"]
        late_start = late.start_agent
        late.start_agent = lambda: None  # type: ignore[method-assign]
        await bench.cluster.start()
        two = [name for name in bench.cluster.nodes if name != late.name]
        await bench.until(
            lambda: (
                {n.name for n in bench.judge.ledger.nodes.values() if n.state is NodeState.READY}
                == set(two)
            )
        )
        vm_id = await create(bench, "web-1", disks=ROOT)
        backup = await disaster.back_up()
        late.start_agent = late_start  # type: ignore[method-assign]
        late.start_agent()
        await bench.cluster.until_ready()
        order = MigrateOrder(destination=late.name)
        await bench.ended(await migrate_vm(bench.cluster.context(), ADMIN, "web-1", order))
        assert list(runs_on(bench, vm_id)) == [late.name]
        guests = Guests(bench)
        await disaster.strike(backup)
        await disaster.until_recovered()
        await bench.settled()
        assert list(runs_on(bench, vm_id)) == [late.name]
        assert await bench.where() == late.name
        assert guests.ended == []
        shown = await get_vm(bench.cluster.context(), ADMIN, "web-1")
        assert shown.status.phase is VmPhase.RUNNING

    play(story)
