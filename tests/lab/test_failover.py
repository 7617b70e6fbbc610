"""Three replicas and three members: whichever goes, nothing is lost and no guest notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.failover import FAULTS, Fault, done_to, writers_that_lost
from tests.lab.failover_cell import FailoverCell

pytestmark = pytest.mark.lab

SAMPLE = {"leader_killed", "leader_stopped"}


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailoverCell]:
    with FailoverCell(Path(tmp_path_factory.mktemp("failover")), records=0, agents=0) as made:
        yield made


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=() if fault.name in SAMPLE else pytest.mark.long)
        for fault in FAULTS
    ],
)
def test_a_failover_loses_nothing_and_stops_nobody(cell: FailoverCell, fault: Fault) -> None:
    guests = cell.guests()
    boots = {vm.name: len(cell.trial.counts(vm)) for vm in guests}
    since = cell.trial.witness.now()

    told = done_to(cell, fault)

    if fault.silent:
        assert not told.errors
    cell.trial.wait_counting(guests)
    seen, until = cell.trial.witness.account(), cell.trial.witness.now()
    for vm in guests:
        assert seen.same_process(vm.id, since, until), f"{vm.name} did not run through"
        assert len(cell.trial.counts(vm)) == boots[vm.name], f"{vm.name} booted"
    assert writers_that_lost(cell) == 0
