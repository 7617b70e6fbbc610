"""What an agent is told of a VM: a permit only where the record gives one, for this boot."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.commands.vms import DeleteVm
from controlplane.sessions.desired import desired_of
from shared.model import ObservedPower, Power, Term
from shared.protocol import Desired, Intent
from shared.states import VmAction
from tests.unit.core_world import USER, CoreWorld

TERM = Term(1, 7)


def told(world: CoreWorld, vm_id: str) -> Desired:
    desired = desired_of(world.state.vms[vm_id], world.node(), TERM, str)
    assert desired is not None, "it is bound to that node"
    return desired


def test_a_permit_is_told_from_permit_to_report() -> None:
    world = CoreWorld()
    vm_id, _ = world.create()
    world.bind(vm_id)
    permits = [told(world, vm_id).permitted]
    world.permit(vm_id)
    permits.append(told(world, vm_id).permitted)
    world.report(vm_id, ObservedPower.RUNNING)
    permits.append(told(world, vm_id).permitted)
    world.report(vm_id, ObservedPower.CRASHED)
    permits.append(told(world, vm_id).permitted)

    assert permits == [False, True, False, False]


def test_that_it_has_run_is_told_from_the_first_look_on() -> None:
    world = CoreWorld()
    vm_id, _ = world.create()
    world.bind(vm_id)
    world.permit(vm_id)
    before = told(world, vm_id).has_run
    world.report(vm_id, ObservedPower.RUNNING)
    world.report(vm_id, ObservedPower.CRASHED)
    world.permit(vm_id)

    assert (before, told(world, vm_id).has_run) == (False, True)


@pytest.mark.parametrize("why", ["stopped", "deleted", "booted"])
def test_a_permit_that_is_out_of_date_is_not_told(why: str) -> None:
    world = CoreWorld()
    vm_id, _ = world.create()
    world.bind(vm_id)
    world.permit(vm_id)
    if why == "stopped":
        world.act(vm_id, VmAction.STOP)
    elif why == "deleted":
        world.apply(DeleteVm(vm_id=vm_id, by=USER))
    else:
        world.join("n1", boot_id="boot-2")

    assert not told(world, vm_id).permitted
    assert told(world, vm_id).generation == 1


def test_the_message_carries_term_revision_and_generation() -> None:
    world = CoreWorld()
    vm_id = world.running()
    message = told(world, vm_id)

    assert (message.term, message.generation, message.boot_id) == (TERM, 1, "boot-1")
    assert message.revision == world.state.vms[vm_id].revision
    assert message.domain_name == vm_id


@pytest.mark.parametrize(
    ("power", "intent"),
    [
        (Power.RUNNING, Intent.RUN),
        (Power.PAUSED, Intent.PAUSE),
        (Power.STOPPED, Intent.STOP),
        (Power.UNKNOWN, Intent.UNKNOWN),
    ],
)
def test_the_intent_is_the_wish_and_deleting_wins(power: Power, intent: Intent) -> None:
    world = CoreWorld()
    vm_id = world.running()
    vm = world.vm(vm_id)
    world.state.put(replace(vm, spec=replace(vm.spec, power=power)), 99)
    assert told(world, vm_id).intent is intent

    world.state.put(replace(world.vm(vm_id), deleting=True), 100)
    assert told(world, vm_id).intent is Intent.REMOVE


def test_a_request_is_told_until_it_is_answered() -> None:
    world = CoreWorld()
    vm_id = world.running()
    world.act(vm_id, VmAction.REBOOT)
    assert told(world, vm_id).request is not None
    world.report(vm_id, ObservedPower.RUNNING, answered_request=1)

    assert told(world, vm_id).request is None
