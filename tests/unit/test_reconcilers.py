"""The leader's loops, one pass at a time, over commands applied in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import pytest
from msgspec.structs import replace

from controlplane.commands.attempts import PLACED, BindVm, EndAttempt, NotePlacement
from controlplane.commands.cluster import TRIM_MAX, TrimHistory
from controlplane.commands.draft import Command, Draft
from controlplane.reconcilers import loop
from controlplane.reconcilers.boots import EndLostAttempts
from controlplane.reconcilers.capacity import KeptSnapshot
from controlplane.reconcilers.deadlines import ExpireOperations
from controlplane.reconcilers.history import (
    KEPT_DAYS,
    KEPT_IN_ETCD,
    CopyHistory,
    ForgetHistory,
    TrimCopiedHistory,
)
from controlplane.reconcilers.placement import PLACEMENTS_PER_PASS_MAX, PlaceVms
from controlplane.reconcilers.silence import NoteSilence
from controlplane.reconcilers.starts import PermitStarts
from controlplane.scheduler.request import SchedulerSettings
from controlplane.sessions.hub import HubSettings
from controlplane.state import Changes, ClusterState
from controlplane.store.history import FORGET_MAX, History, Reach
from controlplane.telemetry.exporter import unscraped_metrics
from controlplane.telemetry.windows import Windows
from shared.errors import LeadershipLost, OutcomeUnknown, StateConflict
from shared.model import (
    AttemptState,
    DiskSpec,
    Event,
    NodeState,
    ObservedPower,
    OperationState,
    PoolFacts,
    Vm,
    VmPhase,
    condition,
)
from shared.moves import Leftover
from shared.offload import inline
from shared.states import VmAction, vm_phase
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN, INVENTORY, LEADER, CoreWorld, HandClock
from tests.unit.lone_replica import NO_PEERS

R = TypeVar("R")
SETTINGS = SchedulerSettings()


class Sessions:
    """What the reconcilers ask of the hub."""

    def __init__(self) -> None:
        self.silent: dict[str, float] = {}
        self._observers: list[Callable[[str], None]] = []

    def trusts(self, node_id: str) -> bool:
        return node_id in self.silent

    def greeted(self, node_id: str) -> bool:
        return node_id in self.silent

    def silent_for_s(self, node_id: str) -> float | None:
        return self.silent.get(node_id)

    def on_trust_change(self, observer: Callable[[str], None]) -> None:
        self._observers.append(observer)

    def connect(self, node_id: str) -> None:
        self.silent[node_id] = 0.0
        self._tell(node_id)

    def disconnect(self, node_id: str) -> None:
        del self.silent[node_id]
        self._tell(node_id)

    def _tell(self, node_id: str) -> None:
        for observer in self._observers:
            observer(node_id)


class Term:
    """A world with what a term has: an applier, sessions, a snapshot."""

    def __init__(self) -> None:
        self.world = CoreWorld()
        self.state = self.world.state
        self.sessions = Sessions()
        self.sessions.connect(self.world.node_id)
        self.applied: list[Command[Any]] = []
        self.before: Callable[[Command[Any]], None] = lambda command: None
        hub, applier = cast(Any, self.sessions), cast(Any, self)
        self.capacity = KeptSnapshot(self.state, hub, SETTINGS)
        self.place = PlaceVms(applier, self.state, self.capacity, unscraped_metrics(Windows()))
        self.starts = PermitStarts(applier, self.state, hub, self.capacity, self.world.clock)
        self.boots = EndLostAttempts(applier, self.state)
        self.deadlines = ExpireOperations(applier, self.state, self.world.clock)
        self.silence = NoteSilence(applier, self.state, hub, HubSettings(silence_limit_s=10))

    async def submit(self, command: Command[R]) -> R:
        self.before(command)
        self.applied.append(command)
        return self.world.apply(command)

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(command, kind) for command in self.applied)

    def phase(self, vm_id: str) -> VmPhase:
        return vm_phase(self.world.vm(vm_id))


async def test_a_vm_is_placed_then_permitted() -> None:
    term = Term()
    vm_id, _ = term.world.create()
    await term.starts.reconcile()
    assert term.applied == []
    await term.place.reconcile()
    assert term.world.vm(vm_id).status.node == term.world.node_id
    await term.starts.reconcile()
    await term.starts.reconcile()

    assert term.world.vm(vm_id).status.generation == 1
    assert term.phase(vm_id) is VmPhase.STARTING


async def test_nothing_is_placed_on_or_permitted_to_a_node_that_is_not_trusted() -> None:
    term = Term()
    bound, _ = term.world.create("bound")
    await term.place.reconcile()
    unbound, _ = term.world.create("unbound")
    term.sessions.disconnect(term.world.node_id)
    await term.place.reconcile()
    await term.starts.reconcile()
    assert term.world.vm(unbound).status.node is None
    assert term.world.vm(bound).status.generation == 0

    term.sessions.connect(term.world.node_id)
    await term.place.reconcile()
    await term.starts.reconcile()
    assert term.world.vm(unbound).status.generation == 1
    assert term.world.vm(bound).status.generation == 1


async def test_why_a_vm_fits_nowhere_is_written_once() -> None:
    term = Term()
    vm_id, _ = term.world.create(memory_mib=10**6)
    await term.place.reconcile()
    revision = term.state.vms[vm_id].revision
    await term.place.reconcile()

    placed = condition(term.world.vm(vm_id), PLACED)
    assert placed is not None
    assert (placed.status, placed.reason) == (False, "unschedulable")
    assert term.state.vms[vm_id].revision == revision


async def test_a_node_is_filled_and_not_overfilled() -> None:
    term = Term()
    vms = [term.world.create(f"vm-{n}", memory_mib=4096)[0] for n in range(6)]
    await term.place.reconcile()

    placed = [vm_id for vm_id in vms if term.world.vm(vm_id).status.node is not None]
    assert placed == vms[:3]


async def test_those_that_fit_nowhere_do_not_starve_the_ones_behind() -> None:
    term = Term()
    for number in range(PLACEMENTS_PER_PASS_MAX + 10):
        term.world.create(f"huge-{number}", memory_mib=10**6)
    small, _ = term.world.create("small")
    for _ in range(3):
        await term.place.reconcile()

    assert term.world.vm(small).status.node is not None


async def test_a_vm_that_changed_while_it_was_placed_does_not_hold_up_the_others() -> None:
    term = Term()
    first, second = term.world.create("first")[0], term.world.create("second")[0]

    def stopped_meanwhile(command: Command[Any]) -> None:
        if isinstance(command, BindVm) and command.vm_id == first:
            term.world.act(first, VmAction.STOP)

    term.before = stopped_meanwhile
    await term.place.reconcile()

    assert term.world.vm(first).status.node is None
    assert term.world.vm(second).status.node is not None


async def test_a_stopped_vm_holds_no_room_and_waits_for_it_again() -> None:
    term = Term()
    first = term.world.running("first", memory_mib=9000)
    term.world.act(first, VmAction.STOP)
    term.world.report(first, ObservedPower.STOPPED)
    second, _ = term.world.create("second", memory_mib=9000)
    await term.place.reconcile()
    await term.starts.reconcile()
    assert term.world.vm(second).status.generation == 1

    term.world.act(first, VmAction.START)
    await term.starts.reconcile()
    placed = condition(term.world.vm(first), PLACED)
    assert placed is not None
    assert not placed.status
    assert term.world.vm(first).status.generation == 1


async def test_a_crashed_vm_waits_for_its_back_off() -> None:
    term = Term()
    vm_id = term.world.running()
    term.world.report(vm_id, ObservedPower.CRASHED)
    await term.starts.reconcile()
    assert term.world.vm(vm_id).status.generation == 1
    term.world.age(seconds=2)
    await term.starts.reconcile()
    assert term.world.vm(vm_id).status.generation == 2


async def test_only_a_new_boot_ends_attempts() -> None:
    term = Term()
    vm_id = term.world.running()
    term.sessions.disconnect(term.world.node_id)
    await term.boots.reconcile()
    assert term.count(EndAttempt) == 0
    term.world.join("n1", boot_id="boot-2")
    await term.boots.reconcile()
    await term.boots.reconcile()

    attempt = term.world.vm(vm_id).status.attempt
    assert attempt is not None
    assert attempt.state is AttemptState.ENDED
    assert term.count(EndAttempt) == 1


async def test_operations_expire() -> None:
    term = Term()
    vm_id = term.world.running()
    stop = term.world.act(vm_id, VmAction.STOP)
    await term.deadlines.reconcile()
    assert stop in term.state.operations
    term.world.age(minutes=16)
    await term.deadlines.reconcile()

    assert term.world.ended(stop).state is OperationState.FAILED


def test_silence_is_noted_after_its_limit_and_taken_back() -> None:
    async def main() -> None:
        term = Term()
        node_id = term.world.node_id

        async def state_after(silent_s: float) -> NodeState:
            term.sessions.silent[node_id] = silent_s
            await term.silence.reconcile()
            return term.world.node().state

        assert await state_after(9.9) is NodeState.READY
        assert await state_after(10.0) is NodeState.SILENT
        assert await state_after(0.1) is NodeState.READY
        term.sessions.disconnect(node_id)
        await term.silence.reconcile()
        await asyncio.sleep(9)
        await term.silence.reconcile()
        assert term.world.node().state is NodeState.READY, "a new leader has heard nobody yet"
        await asyncio.sleep(1)
        await term.silence.reconcile()
        assert term.world.node().state is NodeState.SILENT

    run_virtual(main())


def test_silence_starts_nothing_elsewhere() -> None:
    async def main() -> None:
        term = Term()
        vm_id = term.world.running()
        other = term.world.join("n2")
        term.sessions.connect(other)
        term.sessions.disconnect(term.world.node_id)
        for _ in range(20):
            await asyncio.sleep(60)
            for reconciler in (term.silence, term.boots, term.place, term.starts, term.deadlines):
                await reconciler.reconcile()

        status = term.world.vm(vm_id).status
        assert (status.node, status.generation) == (term.world.node_id, 1)
        assert term.world.node().state is NodeState.SILENT

    run_virtual(main())


async def fresh_snapshot(term: Term) -> KeptSnapshot:
    made = KeptSnapshot(term.state, cast(Any, term.sessions), SETTINGS)
    await made.build(inline)
    return made


async def test_what_changes_while_the_snapshot_is_built_is_in_it() -> None:
    term = Term()
    built = KeptSnapshot(term.state, cast(Any, term.sessions), SETTINGS)

    async def slowly(work: Callable[[], Any]) -> Any:
        found = work()
        term.world.running("a", memory_mib=9000)
        return found

    await built.build(slowly)
    assert built.current() == (await fresh_snapshot(term)).current()
    assert built.current().nodes[term.world.node_id].allocated_memory_mib > 9000


async def test_the_kept_snapshot_is_what_a_fresh_one_would_be() -> None:
    term = Term()
    vm_id = term.world.running("a", memory_mib=9000)
    term.world.create("b")
    await term.place.reconcile()
    fresh = await fresh_snapshot(term)
    assert term.capacity.current() == fresh.current()

    term.world.act(vm_id, VmAction.STOP)
    term.world.report(vm_id, ObservedPower.STOPPED)
    term.sessions.disconnect(term.world.node_id)
    fresh = await fresh_snapshot(term)
    assert term.capacity.current() == fresh.current()
    term.capacity.close()
    fresh.close()


def sharing(term: Term, node_id: str, *, shared: bool = True) -> None:
    """Give a node a pool ``san`` of 100 GiB."""
    node, revision = term.world.node(node_id), term.state.revision + 1
    pool = PoolFacts(name="san", capacity_gib=100.0, free_gib=100.0, shared=shared)
    term.state.put(replace(node, inventory=replace(INVENTORY, pools=(pool,))), revision)
    term.state.advanced(revision)


def two_sharing() -> tuple[Term, str, str]:
    term = Term()
    one, two = term.world.node_id, term.world.join("n2")
    term.sessions.connect(two)
    for node_id in (one, two):
        sharing(term, node_id)
    return term, one, two


def on_san(term: Term, name: str, size_gib: int = 90) -> str:
    return term.world.create(name, disks=(DiskSpec(name="root", size_gib=size_gib, pool="san"),))[0]


def bind(term: Term, vm_id: str, node_id: str) -> BindVm:
    return BindVm(vm_id=vm_id, node_id=node_id, by=LEADER, check=term.capacity.check)


async def test_the_capacity_of_a_shared_pool_is_given_away_once() -> None:
    term, _, _ = two_sharing()
    first, second = on_san(term, "first"), on_san(term, "second")
    await term.place.reconcile()
    assert term.world.vm(first).status.node is not None
    assert term.world.vm(second).status.node is None

    term.state.remove(Vm, first)
    await term.place.reconcile()
    assert term.world.vm(second).status.node is not None


def test_the_capacity_of_a_shared_pool_is_checked_over_all_nodes_in_the_transaction() -> None:
    term, one, two = two_sharing()
    first, second = on_san(term, "first"), on_san(term, "second")
    small = on_san(term, "small", size_gib=10)
    draft = Draft(term.state, term.world.ids, term.world.clock.now())
    bind(term, first, one).decide(draft)
    with pytest.raises(StateConflict, match=r"shared pool san, 10\.0 of 100\.0 GiB"):
        bind(term, second, two).decide(draft)
    bind(term, small, two).decide(draft)

    term.world.apply(bind(term, first, one))
    draft = Draft(term.state, term.world.ids, term.world.clock.now())
    with pytest.raises(StateConflict, match="shared pool san"):
        bind(term, second, two).decide(draft)
    draft.delete(Vm, first)
    bind(term, second, two).decide(draft)


def test_the_capacity_check_goes_by_who_shares_the_pool_in_the_same_transaction() -> None:
    term, one, two = two_sharing()
    sharing(term, one, shared=False)
    first, second = on_san(term, "first"), on_san(term, "second")
    term.world.apply(bind(term, first, one))
    draft = Draft(term.state, term.world.ids, term.world.clock.now())
    bind(term, second, two).decide(draft)

    draft = Draft(term.state, term.world.ids, term.world.clock.now())
    draft.put(replace(term.world.node(one), inventory=term.world.node(two).inventory))
    with pytest.raises(StateConflict, match="shared pool san"):
        bind(term, second, two).decide(draft)


async def test_the_kept_capacity_follows_who_shares_a_pool_and_who_is_trusted() -> None:
    term, one, two = two_sharing()
    vm_id = on_san(term, "mover")
    term.world.apply(bind(term, vm_id, two))
    vm = term.world.vm(vm_id)
    left = Leftover(node=one, generation=1, disks=("root",))
    term.state.put(replace(vm, status=replace(vm.status, leftovers=(left,))), term.state.revision)
    for node_id, shared in ((two, False), (one, False), (two, True), (one, True)):
        sharing(term, node_id, shared=shared)
        fresh = await fresh_snapshot(term)
        assert term.capacity.current() == fresh.current()
    term.sessions.disconnect(one)
    assert term.capacity.current().nodes[one].state is NodeState.SILENT
    assert term.capacity.current().shared_gib == {"san": 90}


async def test_history_is_copied_and_trimmed_behind_the_copy() -> None:
    term = Term()
    history = History(None, inline)
    copy = CopyHistory(term.state, history, NO_PEERS)
    trim = TrimCopiedHistory(cast(Any, term), term.state, lambda: copy.copied_seq)
    last = KEPT_IN_ETCD + 3 * TRIM_MAX
    for seq in range(1, last + 1):
        term.state.put_history(
            Event(seq=seq, id=f"event-{seq}", kind="k", object="o", at=BORN, by="b")
        )
    await trim.reconcile()
    assert term.count(TrimHistory) == 0, "nothing has been copied"
    await copy.reconcile()
    assert copy.copied_seq == await history.copied_seq() == last
    await trim.reconcile()
    await trim.reconcile()

    assert sorted(term.state.history) == list(range(3 * TRIM_MAX + 1, last + 1))
    assert term.count(TrimHistory) == 3
    await history.close()


async def test_a_copy_goes_on_where_the_file_ends() -> None:
    term = Term()
    history = History(None, inline)
    await history.append(list(term.state.history.values()))
    copy = CopyHistory(term.state, history, NO_PEERS)
    await copy.reconcile()
    assert copy.copied_seq == term.state.last_seq
    await history.close()


def test_history_is_forgotten_after_its_time_and_never_what_etcd_has() -> None:
    async def main() -> None:
        state, clock, history = ClusterState(), HandClock(), History(None, inline)
        forget = ForgetHistory(state, history, clock)
        batches, in_etcd = 3, 10
        last = batches * FORGET_MAX + 5 + in_etcd
        for seq in range(1, last + 1):
            state.put_history(
                Event(seq=seq, id=f"event-{seq}", kind="k", object="o", at=BORN, by="b")
            )
        await CopyHistory(state, history, NO_PEERS).reconcile()
        for seq in range(1, last - in_etcd + 1):
            state.remove_history(seq)

        async def reach_after(days: float) -> Reach:
            clock.at = BORN + timedelta(days=days)
            await forget.reconcile()
            return await history.reach()

        assert await reach_after(KEPT_DAYS - 0.1) == Reach(1, last)
        assert await reach_after(KEPT_DAYS + 0.1) == Reach(last - in_etcd + 1, last)
        state.history.clear()
        assert await reach_after(KEPT_DAYS + 0.1) == Reach(last, last)
        await history.close()

    run_virtual(main())


class Passes:
    """A reconciler that counts its passes and does what a test wants in them."""

    name = "passes"
    period_s = 10.0

    def __init__(self, *ends: Exception | None) -> None:
        self.at: list[float] = []
        self._ends = list(ends)

    async def reconcile(self) -> None:
        self.at.append(asyncio.get_running_loop().time())
        if self._ends:
            end = self._ends.pop(0)
            if end is not None:
                raise end


def ran(passes: Passes, changes: Callable[[Changes], Any] | None, for_s: float) -> list[float]:
    async def main() -> None:
        known = Changes()
        running = asyncio.ensure_future(loop.run(passes, known))
        if changes is not None:
            await changes(known)
        await asyncio.wait([running], timeout=for_s)
        if running.done():
            running.result()
        running.cancel()

    run_virtual(main())
    return passes.at


def test_what_is_done_once_in_a_period_waits_for_it_also_when_it_failed() -> None:
    async def main(passes: Passes) -> list[float]:
        running = asyncio.ensure_future(loop.run_periodically(passes))
        await asyncio.wait([running], timeout=25)
        running.cancel()
        return passes.at

    assert run_virtual(main(Passes())) == [0, 10, 20]
    failed = run_virtual(main(Passes(StateConflict("moved on"), OutcomeUnknown("away"))))
    assert failed == [0, 10, 20 + loop.PAUSE_AFTER_FAILURE_S]


def test_a_loop_runs_on_its_timer_and_on_every_change() -> None:
    async def change(changes: Changes) -> None:
        await asyncio.sleep(3)
        changes.notify()

    assert ran(Passes(), None, 25) == [0, 10, 20]
    assert ran(Passes(), change, 15) == [0, 3, 13]


def test_a_change_during_a_pass_leads_to_another_one() -> None:
    class Slow(Passes):
        async def reconcile(self) -> None:
            await super().reconcile()
            await asyncio.sleep(2)

    async def change(changes: Changes) -> None:
        await asyncio.sleep(1)
        changes.notify()

    assert ran(Slow(), change, 5) == [0, 2]


def test_a_failed_pass_is_followed_by_another_after_a_pause() -> None:
    assert ran(Passes(OutcomeUnknown("?")), None, 15) == [0, 11]
    assert ran(Passes(StateConflict("moved on")), None, 15) == [0, 10]


@pytest.mark.parametrize("error", [LeadershipLost("over"), ZeroDivisionError("bug")])
def test_the_end_of_the_term_and_a_bug_end_the_loop(error: Exception) -> None:
    with pytest.raises(type(error)):
        ran(Passes(error), None, 15)


def test_a_time_out_inside_a_pass_is_not_taken_for_the_timer() -> None:
    with pytest.raises(TimeoutError):
        ran(Passes(TimeoutError("of something within")), None, 15)


async def test_a_note_on_a_vm_that_is_gone_is_nothing() -> None:
    term = Term()
    await term.submit(NotePlacement(vm_id="vm-gone", message="no"))
    vm_id, _ = term.world.create()
    stopped = replace(term.world.vm(vm_id), deleting=True)
    term.state.put(stopped, 99)
    await term.submit(NotePlacement(vm_id=vm_id, message="no"))
    assert term.world.vm(vm_id) == stopped
