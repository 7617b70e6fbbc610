"""Drains in the simulated cluster whose VMs fail, crash, are cancelled, or leave something behind.

In each a drain has to do what can be done, to tell what it waits for, and to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from controlplane.sagas.drain import QUIET_BEFORE_TOLD, RETRY_FIRST
from controlplane.services.drains import drain_node, plan_drain
from controlplane.services.migrations import migrate_vm
from controlplane.services.nodes import get_node, set_cordon
from controlplane.services.operations import cancel_operation, get_operation
from controlplane.services.requests import CordonOrder, DrainOrder, MigrateOrder
from controlplane.services.views import OperationView
from controlplane.services.vms import act_on_vm, delete_vm, get_vm
from shared.errors import HypervisorError
from shared.model import DiskSpec, ObservedPower, Operation, OperationState, Power
from shared.moves import DrainJournal
from shared.states import VmAction
from tests.sim.bench import ADMIN, Bench, run
from tests.sim.ledger import DeleteAsked
from tests.sim.node import SimNode

LOCAL = (DiskSpec(name="root", size_gib=1),)
# Longer than all tries and back-offs of a drain, and far from its deadline of a day.
END_LIMIT_S = 900.0
Call = Callable[..., Awaitable[None]]


class Drain:
    """A drain that is under way, and its journal as a user sees it."""

    def __init__(self, bench: Bench, asked: OperationView) -> None:
        self._bench = bench
        self.asked = asked

    async def seen(self) -> OperationView:
        return await get_operation(self._bench.cluster.context(), ADMIN, self.asked.id, 0)

    async def journal(self) -> DrainJournal:
        details = (await self.seen()).details
        assert isinstance(details, DrainJournal)
        return details

    async def left(self) -> dict[str, str]:
        return {each.name: each.reason for each in (await self.journal()).left}

    async def until(self, holds: Callable[[DrainJournal], bool], limit_s: float = 300) -> None:
        async with asyncio.timeout(limit_s):
            while not holds(await self.journal()):  # noqa: ASYNC110 - it is in a record
                await asyncio.sleep(0.05)

    async def cancel(self) -> OperationView:
        await cancel_operation(self._bench.cluster.context(), ADMIN, self.asked.id)
        return await self.ended()

    async def ended(self) -> OperationView:
        return await self._bench.ended(self.asked, END_LIMIT_S)


async def begin(bench: Bench, node_name: str) -> Drain:
    return Drain(bench, await drain_node(bench.cluster.context(), ADMIN, node_name, DrainOrder()))


async def home_of(bench: Bench) -> str:
    home = await bench.where()
    assert home is not None
    return home


def replace_call(node: SimNode, name: str, call: Call) -> Callable[[], None]:
    """Have libvirt on a node do something else; return how to have it do as before."""
    driver: Any = node.libvirtd._driver
    setattr(driver, name, call)
    return lambda: delattr(driver, name)


async def refuse(*args: object, **options: object) -> None:
    raise HypervisorError("the pool refuses")


async def refuse_late(*args: object, **options: object) -> None:
    await asyncio.sleep(2 * RETRY_FIRST.total_seconds())
    raise HypervisorError("the pool refuses")


def test_what_has_left_but_is_not_swept_holds_up_nothing_and_is_told() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        for number in range(7):
            await bench.create_on(home, f"app-{number}", ("default",), Power.RUNNING)
        repair = replace_call(bench.cluster.nodes[home], "delete_volume", refuse)
        drain = await begin(bench, home)
        await bench.until(lambda: home not in bench.places().values(), END_LIMIT_S)
        await drain.until(lambda journal: len(journal.left) == 8)
        assert all("moved; what is left" in reason for reason in (await drain.left()).values())
        told_at = (await drain.seen()).updated_at
        await asyncio.sleep(5 * QUIET_BEFORE_TOLD.total_seconds())
        assert (await drain.seen()).updated_at == told_at, "it is written down once"
        assert (await drain.cancel()).state is OperationState.CANCELLED
        assert not (await get_node(bench.cluster.context(), ADMIN, home)).cordoned
        repair()
        await bench.settled()

    run(story)


def test_a_destination_whose_libvirtd_hangs_holds_up_nothing_else_and_is_told_of() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        home = await home_of(bench)
        hangs, open_one = (name for name in bench.cluster.nodes if name != home)
        context = bench.cluster.context()
        for number in range(3):
            await bench.create_on(home, f"app-{number}", (), Power.RUNNING)
        await set_cordon(context, ADMIN, open_one, CordonOrder(), cordoned=True)
        drain = await begin(bench, home)
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        await set_cordon(context, ADMIN, open_one, CordonOrder(), cordoned=False)
        bench.cluster.nodes[hangs].libvirtd.go_away()
        await bench.until(lambda: list(bench.places().values()).count(open_one) == 2)
        await drain.until(lambda journal: len(journal.left) == 2)
        assert all("libvirtd" in reason for reason in (await drain.left()).values())
        bench.cluster.nodes[hangs].libvirtd.come_back()
        ended = await drain.ended()
        assert ended.state is OperationState.SUCCEEDED, ended.error
        await bench.settled()

    run(story, nodes=3)


def test_a_node_with_something_left_of_a_vm_is_not_given_it_anew() -> None:
    """Without a disk the VM is bound to no node once a drain has let go of it."""

    async def story(bench: Bench) -> None:
        await bench.start()
        home = await home_of(bench)
        (away,) = (name for name in bench.cluster.nodes if name != home)
        context = bench.cluster.context()
        node = bench.cluster.nodes[away]

        async def slow(*args: object) -> None:
            await asyncio.sleep(1000)

        replace_call(node, "delete_console_log", slow)
        moved = await migrate_vm(context, ADMIN, "web-1", MigrateOrder())
        await asyncio.sleep(5)
        node.lose_power()
        assert (await bench.ended(moved, 240)).state is OperationState.FAILED
        (vm,) = bench.judge.ledger.vms.values()
        assert [left.arrival for left in vm.status.leftovers] == [True]
        await bench.ended(await act_on_vm(context, ADMIN, "web-1", VmAction.STOP))
        assert (await (await begin(bench, home)).ended()).state is OperationState.SUCCEEDED
        start = await act_on_vm(context, ADMIN, "web-1", VmAction.START)
        node.boot()
        repair = replace_call(node, "delete_console_log", refuse)
        await asyncio.sleep(60)
        assert await bench.where() is None, "what is left there is swept first"
        repair()
        assert (await bench.ended(start)).state is OperationState.SUCCEEDED
        await bench.settled()

    run(story)


def test_what_only_passes_through_is_not_written_down() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        home = await home_of(bench)
        for number in range(6):
            await bench.create_on(home, f"rest-{number}", (), Power.STOPPED)
        told = []

        def note(before: object, after: object) -> None:
            record = getattr(after, "record", after)
            if isinstance(record, Operation) and isinstance(record.saga, DrainJournal):
                told.append(record.saga.left)

        bench.cluster.context().state.observe(note)
        ended = await (await begin(bench, home)).ended()
        assert ended.state is OperationState.SUCCEEDED
        assert told
        assert not any(told)
        await bench.settled()

    run(story)


def test_a_drain_tells_which_node_it_waits_for_and_goes_on_once_it_is_back() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        home = await home_of(bench)
        (away,) = (name for name in bench.cluster.nodes if name != home)
        drain = await begin(bench, home)
        await bench.until(lambda: bench.on_the_move() == ["web-1"], look_s=0.01)
        bench.cluster.nodes[away].lose_power()
        await drain.until(lambda journal: bool(journal.left))
        waits = f"its migration waits for node {away}, which is away"
        assert await drain.left() == {"web-1": waits}
        bench.cluster.nodes[away].boot()
        assert (await drain.ended()).state is OperationState.SUCCEEDED
        await bench.settled()

    run(story)


def test_a_drain_tells_of_a_vm_that_is_being_deleted() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        repair = replace_call(bench.cluster.nodes[home], "delete_volume", refuse)
        context = bench.cluster.context()
        bench.cluster.observe(DeleteAsked((await get_vm(context, ADMIN, "web-1")).id))
        await delete_vm(context, ADMIN, "web-1")
        drain = await begin(bench, home)
        await drain.until(lambda journal: bool(journal.left))
        assert await drain.left() == {"web-1": "it is being deleted"}
        repair()
        assert (await drain.ended()).state is OperationState.SUCCEEDED
        await bench.settled()

    run(story)


def test_what_a_user_has_cancelled_is_not_begun_again() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        (away,) = (node for name, node in bench.cluster.nodes.items() if name != home)
        replace_call(away, "ensure_volume", refuse_late)
        drain = await begin(bench, home)
        await drain.until(lambda journal: bool(journal.tries))
        (attempt,) = (await drain.journal()).tries
        # Longer than the back-off: it must not count from the request.
        await asyncio.sleep(1.5 * RETRY_FIRST.total_seconds())
        await cancel_operation(bench.cluster.context(), ADMIN, attempt.operation)
        ended = await drain.ended()
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert [each.message for each in ended.error.errors] == ["cancelled by admin"]
        assert isinstance(ended.details, DrainJournal)
        (tried,) = ended.details.tries
        assert (tried.operation, tried.count) == (attempt.operation, 1)
        assert (tried.code, tried.detail) == ("cancelled", "cancelled by admin")
        assert await bench.where() == home
        await bench.settled()

    run(story)


def test_how_a_migration_ended_is_remembered_longer_than_history_is() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        await bench.create_on(home, "gone", ("default",), Power.STOPPED)
        repair = replace_call(bench.cluster.nodes[home], "delete_volume", refuse)
        context = bench.cluster.context()
        bench.cluster.observe(DeleteAsked((await get_vm(context, ADMIN, "gone")).id))
        await delete_vm(context, ADMIN, "gone")
        drain = await begin(bench, home)
        await bench.until(lambda: bench.on_the_move() == ["web-1"], look_s=0.01)
        (attempt,) = (await drain.journal()).tries
        await cancel_operation(context, ADMIN, attempt.operation)
        await drain.until(lambda journal: len(journal.left) == 2)
        context.state.history.clear()
        await asyncio.sleep(5 * RETRY_FIRST.total_seconds())
        assert (await drain.left())["web-1"] == "cancelled by admin"
        assert (await drain.journal()).tries[0].count == 1
        repair()
        assert (await drain.ended()).state is OperationState.FAILED
        await bench.settled()

    run(story)


def test_what_failed_is_tried_again_some_time_after_it_has_ended() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        (away,) = (node for name, node in bench.cluster.nodes.items() if name != home)
        repair = replace_call(away, "ensure_volume", refuse_late)
        drain = await begin(bench, home)
        await drain.until(lambda journal: any(each.ended_at for each in journal.tries))
        (first,) = (await drain.journal()).tries
        assert first.ended_at is not None
        assert first.ended_at - first.at > RETRY_FIRST
        repair()
        await drain.until(lambda journal: journal.tries[0].count == 2)
        (second,) = (await drain.journal()).tries
        assert second.at - first.ended_at >= RETRY_FIRST
        assert (await drain.ended()).state is OperationState.SUCCEEDED
        await bench.settled()

    run(story)


def test_a_guest_that_has_just_crashed_is_moved_once_it_runs_again() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        (domain,) = bench.cluster.nodes[home].state.domains.values()
        domain.end(ObservedPower.CRASHED)
        await bench.until(
            lambda: all(vm.status.crashes for vm in bench.judge.ledger.vms.values()), look_s=0.01
        )
        ended = await (await begin(bench, home)).ended()
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert await bench.where() != home
        await bench.settled()

    run(story)


def test_a_guest_that_never_stays_up_does_not_hold_a_drain_until_its_deadline() -> None:
    async def story(bench: Bench) -> None:
        await bench.start(disks=LOCAL)
        home = await home_of(bench)
        repair = replace_call(bench.cluster.nodes[home], "start", refuse)
        (domain,) = bench.cluster.nodes[home].state.domains.values()
        domain.end(ObservedPower.CRASHED)
        await bench.until(
            lambda: all(vm.status.crashes for vm in bench.judge.ledger.vms.values()), look_s=0.01
        )
        drain = await begin(bench, home)
        ended = await drain.ended()
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert "does not stay up" in ended.error.errors[0].message
        assert ended.updated_at - ended.created_at < timedelta(minutes=3)
        repair()
        await bench.settled(END_LIMIT_S)

    run(story)


def test_a_drain_empties_a_node_and_tells_beforehand() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        node_name = await bench.where()
        assert node_name is not None
        context = bench.cluster.context()
        for number, disks in enumerate(((), ("shared",), ("default",))):
            await bench.create_on(node_name, f"rest-{number}", disks, Power.STOPPED)
        plan = await plan_drain(context, ADMIN, node_name, DrainOrder())
        assert {v.vm_name: v.action for v in plan.vms} == {
            "web-1": "migrate",
            "rest-0": "release",
            "rest-1": "release",
            "rest-2": "stay",
        }
        assert plan.blocked == 1
        ended = await bench.ended(await drain_node(context, ADMIN, node_name, DrainOrder()))
        assert ended.state is OperationState.FAILED
        assert ended.error is not None
        assert (ended.error.code, len(ended.error.errors)) == ("drain_incomplete", 1)
        assert (await get_node(context, ADMIN, node_name)).cordoned, "it stays closed"
        left = await get_vm(context, ADMIN, "rest-2")
        bench.cluster.observe(DeleteAsked(left.id))
        await bench.ended(await delete_vm(context, ADMIN, "rest-2"))
        ended = await bench.ended(await drain_node(context, ADMIN, node_name, DrainOrder()))
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert (await get_node(context, ADMIN, node_name)).allocated.vms == 0
        await bench.settled()

    run(story)


def test_a_drain_whose_destination_is_gone_moves_the_rest_and_can_be_cancelled() -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        home = await bench.where()
        assert home is not None
        context = bench.cluster.context()
        gone, away = (name for name in bench.cluster.nodes if name != home)
        await set_cordon(context, ADMIN, away, CordonOrder(), cordoned=True)
        for number in range(3):
            await bench.create_on(home, f"app-{number}", (), Power.RUNNING, others=(gone,))
        stuck = await drain_node(context, ADMIN, home, DrainOrder())
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        bench.cluster.nodes[gone].lose_power()
        await set_cordon(context, ADMIN, away, CordonOrder(), cordoned=False)
        await bench.until(lambda: sum(w == away for w in bench.places().values()) == 2)
        # Of the first two nobody can tell where they are.
        await bench.until(lambda: len(bench.on_the_move()) == 2)
        await cancel_operation(context, ADMIN, stuck.id)
        assert (await bench.ended(stuck)).state is OperationState.CANCELLED
        assert len(bench.on_the_move()) == 2
        assert not (await get_node(context, ADMIN, home)).cordoned
        bench.cluster.nodes[gone].boot()
        await bench.settled()
        assert sorted(bench.places().values()) == sorted([home, home, away, away])

    run(story, nodes=3)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.004])
def test_a_new_leader_that_has_heard_nobody_yet_gives_up_no_drain(after_s: float) -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        node_name = await bench.where()
        assert node_name is not None
        await bench.create_on(node_name, "rests", ("shared",), Power.STOPPED)
        context = bench.cluster.context()
        bench.cluster.observe(DeleteAsked((await get_vm(context, ADMIN, "web-1")).id))
        await bench.ended(await delete_vm(context, ADMIN, "web-1"))
        operation = await drain_node(context, ADMIN, node_name, DrainOrder())
        await asyncio.sleep(after_s)
        (replica,) = bench.cluster.replicas.values()
        replica.crash()
        replica.start()
        await bench.cluster.until_ready()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.SUCCEEDED, ended.error
        await bench.settled()

    run(story)
