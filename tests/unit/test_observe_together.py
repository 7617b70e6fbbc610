"""Reports that are taken together: as if each were taken alone, as many as a group has room for."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

from msgspec import to_builtins

from controlplane.commands.attempts import (
    TOGETHER_WRITES_MAX,
    ObserveVm,
    ObserveVms,
    TakenReports,
)
from controlplane.commands.draft import Author, Draft
from controlplane.store.applier import GROUP_WRITES_MAX
from shared.errors import IllegalTransition
from shared.model import ObservedPower
from shared.protocol import VmReport
from tests.unit.core_world import CoreWorld

AGENT = Author("agent:n1")


def world_of(count: int) -> tuple[CoreWorld, list[str]]:
    world = CoreWorld()
    return world, [world.running(f"web-{n}") for n in range(count)]


def a_report(vm_id: str, power: ObservedPower, generation: int = 1) -> VmReport:
    return VmReport(
        vm_id=vm_id, generation=generation, power=power, permit_used=True, highest_used=generation
    )


def together(world: CoreWorld, reports: list[VmReport]) -> TakenReports:
    return world.apply(ObserveVms(node_id=world.node_id, reports=tuple(reports), by=AGENT))


def told(world: CoreWorld) -> Any:
    """Return records and history without what differs in two runs: ids of events, and dates."""
    history = [
        {k: v for k, v in to_builtins(each).items() if k not in ("id", "at")}
        for each in world.state.history.values()
    ]
    return [world.vm(vm_id).status.power_seen for vm_id in sorted(world.state.vms)], history


def test_it_comes_to_the_same_as_one_after_the_other() -> None:
    powers = (ObservedPower.RUNNING, ObservedPower.PAUSED, ObservedPower.SHUT_OFF)
    for seed in range(20):
        rng = random.Random(seed)
        (one, vm_ids), (other, same_ids) = world_of(6), world_of(6)
        assert len(vm_ids) == len(same_ids)
        choices = [(rng.randrange(6), rng.choice(powers), rng.randrange(3)) for _ in range(8)]
        reports = [a_report(vm_ids[n], power, generation) for n, power, generation in choices]
        rest = list(reports)
        while rest:
            rest = rest[together(one, rest).count :]
        for n, power, generation in choices:
            report = a_report(same_ids[n], power, generation)
            other.apply(ObserveVm(node_id=other.node_id, report=report, by=AGENT))
        assert [h["kind"] for h in told(one)[1] if "kind" in h] == [
            h["kind"] for h in told(other)[1] if "kind" in h
        ]
        assert told(one)[0] == told(other)[0]


def test_what_says_nothing_new_is_no_write() -> None:
    world, vm_ids = world_of(50)
    draft = Draft(world.state, world.ids, world.clock.now())
    reports = tuple(a_report(vm_id, ObservedPower.RUNNING) for vm_id in vm_ids)
    taken = ObserveVms(node_id=world.node_id, reports=reports, by=AGENT).decide(draft)
    assert taken == TakenReports(50, ())
    assert draft.size() == 0


def test_what_a_group_has_no_room_for_is_left() -> None:
    world, vm_ids = world_of(100)
    rest = [a_report(vm_id, ObservedPower.PAUSED) for vm_id in vm_ids]
    rounds = 0
    while rest:
        draft = Draft(world.state, world.ids, world.clock.now())
        command = ObserveVms(node_id=world.node_id, reports=tuple(rest), by=AGENT)
        assert command.decide(draft).count > 0
        assert draft.size() <= GROUP_WRITES_MAX
        rest = rest[together(world, rest).count :]
        rounds += 1
    assert rounds > 100 * 2 / (2 * TOGETHER_WRITES_MAX)
    assert {world.vm(vm_id).status.power_seen for vm_id in vm_ids} == {ObservedPower.PAUSED}


def test_one_that_cannot_be_taken_leaves_no_trace_and_costs_the_others_nothing() -> None:
    world, vm_ids = world_of(3)
    decide = ObserveVm.decide

    def refuse_one(self: ObserveVm, draft: Draft) -> None:
        decide(self, draft)
        if self.report.vm_id == vm_ids[1]:
            raise IllegalTransition("no such row")

    with patch.object(ObserveVm, "decide", refuse_one):
        reports = [a_report(vm_id, ObservedPower.PAUSED) for vm_id in vm_ids]
        taken = together(world, reports)
    assert taken == TakenReports(3, ((vm_ids[1], "no such row"),))
    assert [world.vm(vm_id).status.power_seen for vm_id in vm_ids] == [
        ObservedPower.PAUSED,
        ObservedPower.RUNNING,
        ObservedPower.PAUSED,
    ]
    assert world.events().count("vm.paused") == 2
