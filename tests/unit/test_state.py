"""The records in memory: indexes follow every change, and whoever waits is woken."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import astuple, replace

from controlplane.commands.vms import DeleteVm
from controlplane.scheduler.request import Load
from controlplane.state import Changes, ClusterState, Stored
from shared.model import (
    AuditRecord,
    Event,
    FinishedOperation,
    ObservedPower,
    Record,
    Vm,
)
from shared.protocol import Desired, MigrationReport, VmReport
from shared.states import VmAction
from tests.unit.core_world import USER, CoreWorld
from tests.unit.samples import SAMPLES

STORED = [
    sample
    for sample in SAMPLES
    if isinstance(sample, Record | Event | AuditRecord | FinishedOperation)
]


def rebuilt(state: ClusterState) -> ClusterState:
    """Return a state made of the same records, each put once."""
    fresh = ClusterState()
    for kind, record_id in state.record_ids():
        stored = state.get(kind, record_id)
        assert stored is not None
        fresh.put(stored.record, stored.revision)
    return fresh


def indexes(state: ClusterState, world: CoreWorld) -> list[object]:
    return [
        state.vm_ids_to_place(),
        state.vm_ids_to_start(),
        state.lost_attempts(),
        sorted((node, boot, sorted(ids)) for (node, boot), ids in state._open_attempts.items()),
        sorted(state.vm_ids_on(world.node_id)),
        state.node_id_by_name("n1"),
        {name: state.vm_id_by_name("default", name) for name in ("a", "b", "c")},
        {vm_id: sorted(state.operation_ids_on(vm_id)) for vm_id in state.vms},
    ]


def test_indexes_say_what_the_records_say_after_every_change() -> None:
    world = CoreWorld()
    a, _ = world.create("a")
    steps: list[Callable[[], object]] = [
        lambda: world.create("b"),
        lambda: world.bind(a),
        lambda: world.permit(a),
        lambda: world.report(a, ObservedPower.RUNNING),
        lambda: world.report(a, ObservedPower.CRASHED),
        lambda: world.permit(a),
        lambda: world.act(a, VmAction.STOP),
        lambda: world.report(a, ObservedPower.STOPPED),
        lambda: world.apply(DeleteVm(vm_id=a, by=USER)),
        lambda: world.report(a, ObservedPower.ABSENT, permit_used=True, removed=True),
        lambda: world.create("a"),
    ]
    for step in steps:
        step()
        assert indexes(world.state, world) == indexes(rebuilt(world.state), world)
    assert len(world.state.vms) == 2


def test_observers_are_told_before_and_after() -> None:
    world = CoreWorld()
    vm_id, _ = world.create("a")
    told: list[tuple[Record | None, Record | None]] = []
    before = world.vm(vm_id)
    after = replace(before, labels={"tier": "gold"})

    def observer(old: Record | None, new: Record | None) -> None:
        told.append((old, new))

    world.state.observe(observer)
    world.state.put(after, 99)
    world.state.remove(Vm, vm_id)
    world.state.remove(Vm, vm_id)
    world.state.unobserve(observer)
    world.state.put(before, 100)

    assert told == [(before, after), (after, None)]


async def test_a_change_right_after_asking_is_not_missed() -> None:
    """The waiter is there at once, not when the loop comes to it."""
    changes = Changes()
    changed = changes.next()
    changes.notify()

    assert changed.done()


async def test_waiters_that_gave_up_are_forgotten() -> None:
    """In a quiet cluster every loop gives up waiting once a period, for ever."""
    changes = Changes()
    for _ in range(50):
        changes.next().cancel()
        waiting = asyncio.ensure_future(changes.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    await asyncio.sleep(0)
    kept = changes.next()

    assert len(changes._waiters) == 1
    kept.cancel()


async def test_everyone_who_waits_is_woken() -> None:
    changes = Changes()
    waiting = [asyncio.ensure_future(changes.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    changes.notify()

    await asyncio.gather(*waiting)


@pytest.mark.parametrize("kind", [Desired, VmReport, MigrationReport, Load])
def test_nor_what_a_leader_keeps_of_each_vm(kind: type[Struct]) -> None:
    assert kind.__struct_config__.gc is False


@pytest.mark.parametrize("sample", STORED, ids=lambda sample: type(sample).__name__)
def test_the_garbage_collector_follows_nothing_of_a_record(sample: Any) -> None:
    """A hundred thousand records are a tenth of a second that it would hold the loop up."""
    followed = {type(part).__name__ for part in parts(Stored(sample, 1)) if gc.is_tracked(part)}
    assert not followed, "give these Structs gc=False: what is stored is never part of a cycle"


def parts(value: object) -> Iterator[Struct]:
    """Yield a Struct and all Structs in it."""
    if isinstance(value, Struct):
        yield value
        value = astuple(value)
    if isinstance(value, tuple):
        for each in value:
            yield from parts(each)


def test_vms_are_counted_by_tenant() -> None:
    state, vm = ClusterState(), next(each for each in SAMPLES if isinstance(each, Vm))
    for n in range(3):
        state.put(replace(vm, id=f"vm-{n}", name=f"web-{n}"), 1)
    state.put(replace(vm, id="vm-9", tenant="other"), 1)
    state.put(replace(vm, id="vm-0", name="renamed"), 2)
    assert (state.vm_count(vm.tenant), state.vm_count("other"), state.vm_count("no")) == (3, 1, 0)
    state.remove(Vm, "vm-0")
    state.remove(Vm, "vm-0")
    assert state.vm_count(vm.tenant) == 2
