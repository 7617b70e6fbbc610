"""What two ends of a migration say together: every pair, by rules that are written here anew."""

from __future__ import annotations

from itertools import product

import pytest

from controlplane.sagas.matrix import DESTINATION_ENDS, VERDICTS, Verdict, verdict
from shared.moves import EndState

PAIRS = list(product(EndState, EndState))
# What a source, and what a destination, can be at all.
SOURCES = set(EndState) - {EndState.INCOMING, EndState.NEVER_RAN, EndState.READY}
DESTINATIONS = set(EndState) - {EndState.MOVING, EndState.AWAY, EndState.HELD}
HAS_RUN = {EndState.RUNNING, EndState.DOWN}
ALIVE = {EndState.RUNNING, EndState.HELD, EndState.AWAY}
GONE = {EndState.ABSENT, EndState.DOWN}


def expected(source: EndState, destination: EndState) -> Verdict:
    if source not in SOURCES or destination not in DESTINATIONS:
        return Verdict.WAIT
    if destination in HAS_RUN:
        return Verdict.SWITCHED
    if EndState.UNKNOWN in (source, destination) or source is EndState.MOVING:
        return Verdict.WAIT
    if source in ALIVE:
        return Verdict.STAYED
    assert source in GONE
    without_source = {EndState.ABSENT: Verdict.LOST, EndState.INCOMING: Verdict.WAIT}
    return without_source.get(destination, Verdict.SWITCHED)


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_each_pair_has_its_verdict(source: EndState, destination: EndState) -> None:
    assert verdict(source, destination) is expected(source, destination)


@pytest.mark.parametrize("source", EndState)
def test_a_destination_that_runs_is_never_given_up(source: EndState) -> None:
    assert verdict(source, EndState.RUNNING) not in (Verdict.STAYED, Verdict.LOST)


@pytest.mark.parametrize("end", EndState)
def test_an_unknown_end_decides_nothing_but_a_switch(end: EndState) -> None:
    for pair in ((end, EndState.UNKNOWN), (EndState.UNKNOWN, end)):
        assert verdict(*pair) in (Verdict.WAIT, Verdict.SWITCHED)
    assert verdict(end, EndState.UNKNOWN) is Verdict.WAIT


def test_while_a_job_runs_only_a_destination_that_has_run_decides() -> None:
    for destination in set(EndState) - HAS_RUN:
        assert verdict(EndState.MOVING, destination) is Verdict.WAIT


def test_the_table_names_each_pair_that_can_be() -> None:
    assert set(DESTINATION_ENDS) == DESTINATIONS
    assert set(VERDICTS) == set(product(SOURCES, DESTINATIONS))
