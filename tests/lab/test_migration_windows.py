"""The moment at which a guest may run twice: its destination has resumed, its source not yet ended.

Here the ways are broken that libvirt itself cannot answer for: its own end, and the relay that
carries what the two libvirtds say to each other. How long two guests ran is taken from the events
of both nodes' libvirtds, and printed. Each node has leases on its disks, which only bind a VM whose
disk is on shared storage.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

import pytest
from msgspec import Struct

from controlplane.cli.views import OperationView
from shared.model import MigrationSpec
from tests.lab.cluster import LabPlan
from tests.lab.domain_events import DomainEvent
from tests.lab.link import wait_until
from tests.lab.migration_cell import (
    NO_STRIKES,
    MigrationCell,
    Move,
    Spoilt,
    Strike,
    complaints,
    speaking_vm,
)
from tests.lab.migration_faults import Fault, Moment, Pair, Victim
from tests.lab.processes import key_of
from tests.lab.pulses import PulseAccount
from tests.lab.state import agent_program
from tests.lab.strikes import REPLICA, Striker, qemu_pid

pytestmark = pytest.mark.lab

BARE, STRICT, LEASED = "bare", "strict", "leased"
GUESTS = (BARE, STRICT, LEASED)
RELAY_KILLS = 6
OTHER_KILLS = 3
# See `test_migration_faults.TRIES_MAX`: QEMU's emulation spoils a guest now and then.
SPOILT_MAX = 3
# Events after which a guest does not run.
ENDS = frozenset({"suspended", "stopped"})
# Long enough for two guests to be seen, short enough for a test.
AGENT_AWAY_S = 1.5
HOLD_LIMIT_S = 60.0
# On a busy machine a blow may fall after the source has heard that its guest has arrived.
MISSES_MAX = 4
# Either relay's death ends the link; one of them stands for both where time is short.
VICTIMS = [
    pytest.param(Victim.SOURCE_RELAY, marks=pytest.mark.long),
    Victim.DESTINATION_RELAY,
]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MigrationCell]:
    scratch = tmp_path_factory.mktemp("cell")
    with MigrationCell(scratch, LabPlan(nodes=2, disk_leases=True)) as cell:
        cell.create(
            speaking_vm(BARE),
            speaking_vm(STRICT, pool="default", migration=MigrationSpec(strict=True)),
            speaking_vm(LEASED, pool="shared"),
        )
        yield cell


class Seen(Struct, frozen=True, kw_only=True):
    """One move and what was seen of it, once all is at rest again; ``boots`` were before it."""

    move: Move
    ended: OperationView
    where: str
    events: list[DomainEvent]
    account: PulseAccount
    boots: int

    @property
    def both_s(self) -> float:
        """How long both guests ran."""
        ours = self._ran(self.move.source.name, self.move.began)
        theirs = self._ran(self.move.destination.name, None)
        return sum(
            max(0.0, min(end, their_end) - max(start, their_start))
            for start, end in ours
            for their_start, their_end in theirs
        )

    def _ran(self, node: str, running_since: float | None) -> list[tuple[float, float]]:
        """Return from when until when a node's guest ran, as its libvirtd told it."""
        ran = []
        for event in self.events:
            if event.node == node and event.kind == "resumed" and running_since is None:
                running_since = event.at
            if event.node == node and event.kind in ENDS and running_since is not None:
                ran.append((running_since, event.at))
                running_since = None
        return ran if running_since is None else [*ran, (running_since, float("inf"))]


@pytest.mark.long
def test_a_source_libvirtd_killed_before_it_has_stopped_its_guest(cell: MigrationCell) -> None:
    outlived: list[bool] = []

    def strike(move: Move) -> None:
        _striker(cell, Victim.SOURCE_LIBVIRTD)(move)
        with suppress(FileNotFoundError):
            outlived.append(key_of(qemu_pid(move.source, move.vm.id)) is not None)

    for _ in range(MISSES_MAX):
        seen = _moved(cell, BARE, {Moment.RESUMED: strike})
        if outlived[-1:] == [True]:
            break
    assert outlived[-1:] == [True], "the source had ended already: the window was missed each time"
    assert (seen.ended.state, seen.where) == ("succeeded", seen.move.destination.name)
    assert complaints(seen.account, seen.boots, seen.move.began) == []


def test_a_relay_killed_as_the_guest_resumes_is_answered_by_the_reflex(cell: MigrationCell) -> None:
    both_s: list[float] = []
    for number in range(RELAY_KILLS):
        victim = (Victim.SOURCE_RELAY, Victim.DESTINATION_RELAY)[number % 2]
        strike = _striker(cell, victim)
        seen = _moved(cell, BARE, {Moment.RESUMED: strike})
        assert (seen.ended.state, seen.where) == ("succeeded", seen.move.destination.name)
        assert len(seen.account.boots()) == seen.boots
        if seen.both_s:
            both_s.append(seen.both_s)
        _tell(f"{victim.value} killed", seen)
    assert both_s, "the source never resumed: the window was missed each time"
    print(
        f"both guests ran in {len(both_s)} of {RELAY_KILLS} moves, for {min(both_s) * 1000:.1f} "
        f"to {max(both_s) * 1000:.1f} ms (median {statistics.median(both_s) * 1000:.1f} ms)"
    )


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_strict_migration_never_lets_two_run(cell: MigrationCell, victim: Victim) -> None:
    for _ in range(OTHER_KILLS):
        seen = _moved(cell, STRICT, {Moment.ARRIVED: _striker(cell, victim)})
        _tell(f"strict, {victim.value} killed", seen)
        arrived = seen.ended.state == "succeeded"
        assert seen.where == (seen.move.destination if arrived else seen.move.source).name
        assert seen.both_s == 0.0
        assert complaints(seen.account, seen.boots, seen.move.began) == []


@pytest.mark.long
def test_a_guest_that_dies_before_it_goes_on_goes_on_where_it_was(cell: MigrationCell) -> None:
    """What never ran over there has changed nothing, although its domain was there to stay."""
    stayed = 0
    for _ in range(OTHER_KILLS):
        seen = _moved(cell, STRICT, {Moment.ARRIVED: _striker(cell, Victim.DESTINATION_QEMU)})
        _tell("strict, destination-qemu killed", seen)
        # Once the source's libvirtd has heard that all has arrived, it ends its guest.
        lost = seen.where == seen.move.destination.name
        stayed += not lost
        assert seen.both_s == 0.0
        assert complaints(seen.account, seen.boots + lost, seen.move.began) == []
    assert stayed, "the source had heard already each time: the window was missed"


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_lease_on_a_shared_disk_never_lets_two_run(cell: MigrationCell, victim: Victim) -> None:
    for _ in range(OTHER_KILLS):
        seen = _moved(cell, LEASED, {Moment.RESUMED: _striker(cell, victim)})
        _tell(f"leased, {victim.value} killed", seen)
        assert (seen.ended.state, seen.where) == ("succeeded", seen.move.destination.name)
        assert seen.both_s == 0.0
        assert complaints(seen.account, seen.boots, seen.move.began) == []


# On a busy machine the relay may be killed too late, and then nothing comes back.
@pytest.mark.long
def test_an_agent_holds_a_guest_that_came_back_before_it_has_a_session(cell: MigrationCell) -> None:
    """Nobody is there to hold the source's guest: it runs until its agent is back.

    So this also shows that the witness sees two guests when there are two.
    """
    link = cell.lab.link

    def kill_agent(move: Move) -> None:
        link.set_restart(agent_program(move.source.name), False)
        cell.trial.kill(agent_program(move.source.name))

    def kill_relay(move: Move) -> None:
        _striker(cell, Victim.SOURCE_RELAY)(move)
        link.set_restart(REPLICA, False)
        cell.trial.kill(REPLICA)

    def come_back(move: Move) -> None:
        kind, at = _told(cell, move, {"resumed", "stopped"}, move.began)
        time.sleep(AGENT_AWAY_S)
        link.set_restart(agent_program(move.source.name), True)
        if kind == "resumed":  # otherwise its libvirtd had heard already, and ended it
            _told(cell, move, {"suspended"}, at)
        link.set_restart(REPLICA, True)

    try:
        strikes = {Moment.MIDDLE: kill_agent, Moment.RESUMED: kill_relay}
        moves = (_moved(cell, BARE, strikes, come_back) for _ in range(MISSES_MAX))
        seen = next((seen for seen in moves if seen.both_s), None)
    finally:
        for program in (REPLICA, *(agent_program(node.name) for node in cell.lab.nodes)):
            link.set_restart(program, True)
    assert seen is not None, "the source never resumed: the window was missed each time"
    _tell(f"source agent away for {AGENT_AWAY_S} s", seen)
    assert (seen.ended.state, seen.where) == ("succeeded", seen.move.destination.name)
    assert len(seen.account.boots()) == seen.boots
    assert seen.account.said_twice(seen.move.began), (
        "the witness did not see what there was to be seen"
    )
    assert seen.both_s >= AGENT_AWAY_S


def _striker(cell: MigrationCell, victim: Victim) -> Striker:
    return Striker(cell.lab, Pair(Fault.KILL, victim, Moment.RESUMED))


def _moved(
    cell: MigrationCell,
    name: str,
    strikes: Mapping[Moment, Strike] = NO_STRIKES,
    meanwhile: Strike | None = None,
) -> Seen:
    """Move a guest under strikes, again if QEMU spoils it, and return what was seen."""
    for _ in range(SPOILT_MAX):
        with cell.witness() as witness:
            vm = cell.trial.api.vm(name)
            boots = len(witness.account(vm.id).boots())
            move = cell.move(name, strikes, meanwhile)
            try:
                cell.rest(*GUESTS)
            except Spoilt as spoilt:
                print(f"\nQEMU spoilt the guest ({spoilt}): once more")
                continue
            account = witness.account(vm.id)
        if said := account.last_words(move.began):
            print(f"\nQEMU spoilt the guest ({said[0]}): once more")
            continue
        return Seen(
            move=move,
            ended=cell.ended(move),
            where=cell.trial.api.vm(name).status.where,
            events=cell.events.of(vm.id, move.began),
            account=account,
            boots=boots,
        )
    raise AssertionError("QEMU spoils every guest")


def _told(cell: MigrationCell, move: Move, kinds: set[str], since: float) -> tuple[str, float]:
    """Return what the source's libvirtd told first of that, and when, waiting for it."""

    def told() -> list[tuple[str, float]]:
        events = cell.events.of(move.vm.id, since)
        ours = [event for event in events if event.node == move.source.name]
        return [(event.kind, event.at) for event in ours if event.kind in kinds]

    wait_until(lambda: bool(told()), f"the source's {kinds}", limit_s=HOLD_LIMIT_S)
    return told()[0]


def _tell(what: str, seen: Seen) -> None:
    since = seen.move.began
    print(
        f"\n{what}: {seen.ended.state}, on {seen.where}; by libvirt both ran "
        f"{seen.both_s * 1000:.1f} ms; by the witness: "
        f"{len(seen.account.said_twice(since))} numbers twice, CPUs of both for "
        f"{seen.account.both_ran_s() * 1000:.0f} ms; silent for "
        f"{seen.account.longest_silence_s(since):.2f} s"
    )
