"""A draft: refused commands leave no trace, numbers are dense, reads see the draft's own writes."""

from __future__ import annotations

from controlplane.commands.draft import Draft
from controlplane.commands.vms import CreateVm, DeleteVm
from shared.model import Vm
from tests.unit.core_world import USER, CoreWorld, spec


def draft_of(world: CoreWorld) -> Draft:
    return Draft(world.state, world.ids, world.clock.now())


def create(name: str) -> CreateVm:
    return CreateVm(name=name, tenant="default", labels={}, spec=spec(), by=USER)


def test_a_refused_command_leaves_no_trace() -> None:
    world = CoreWorld()
    draft = draft_of(world)
    create("a").decide(draft)
    size, before = draft.size(), draft.savepoint()

    create("b").decide(draft)
    draft.trim_history([1])
    draft.rollback(before)

    assert draft.size() == size
    assert draft.vm_by_name("default", "b") is None
    sealed = draft.sealed(world.state.last_seq)
    assert [entry.seq for entry in sealed.history] == [
        world.state.last_seq + 1,
        world.state.last_seq + 2,
    ]
    assert sealed.trimmed == ()


def test_a_rollback_brings_back_what_was_changed_in_the_draft_before() -> None:
    world = CoreWorld()
    vm_id, _ = world.create("a")
    draft = draft_of(world)
    savepoint = draft.savepoint()
    DeleteVm(vm_id=vm_id, by=USER).decide(draft)
    assert draft.find(Vm, vm_id) is None
    draft.rollback(savepoint)

    assert draft.find(Vm, vm_id) == world.vm(vm_id)
    assert draft.vm_by_name("default", "a") is not None


def test_numbers_are_dense_whatever_was_refused_between() -> None:
    world = CoreWorld()
    draft = draft_of(world)
    for number in range(6):
        savepoint = draft.savepoint()
        create(f"vm-{number}").decide(draft)
        if number % 2:
            draft.rollback(savepoint)

    seqs = [entry.seq for entry in draft.sealed(40).history]

    assert seqs == list(range(41, 41 + len(seqs)))
    assert len(seqs) == 6  # an audit record and an event for each that stayed


def test_a_command_sees_those_before_it_in_the_draft() -> None:
    world = CoreWorld()
    gone, _ = world.create("gone")
    draft = draft_of(world)
    create("new").decide(draft)
    new = draft.vm_by_name("default", "new")
    assert new is not None
    assert [op.kind for op in draft.operations_on(new.id)] == ["vm.create"]
    assert draft.vm_by_name("other", "new") is None

    DeleteVm(vm_id=gone, by=USER).decide(draft)
    assert draft.vm_by_name("default", "gone") is None
    assert draft.operations_on(gone) == []
    create("gone").decide(draft)
    assert gone in world.state.vms, "the state below is never touched"


def test_changes_of_one_record_are_folded() -> None:
    world = CoreWorld()
    vm_id, _ = world.create("a")
    draft = draft_of(world)
    for _ in range(5):
        draft.put(world.vm(vm_id))

    assert draft.size() == 1


def test_vms_on_a_node_are_those_the_draft_leaves_there() -> None:
    world = CoreWorld()
    stays, goes = world.running("stays"), world.running("goes")
    draft = draft_of(world)
    draft.delete(Vm, goes)
    draft.put(world.vm(stays))

    assert [vm.id for vm in draft.vms_on(world.node_id)] == [stays]
