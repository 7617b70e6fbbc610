"""Every saga, at every step: looked at twice, failed, undone twice, cancelled, its leader killed.

Generated from the table of workflows; what must hold at every moment the invariants say. A saga
that joins the table needs a setup in ``saga_world.py`` and nothing here.
"""

from __future__ import annotations

from functools import cache

import pytest

from controlplane.sagas.context import Step
from controlplane.sagas.workflows import SAGAS
from shared.model import OperationState
from tests.sim.saga_world import (
    INJECTED,
    SETUPS,
    Kill,
    Played,
    Wrap,
    at_every_undo,
    at_step,
    both,
    cancelled_at_its_end,
    cancelled_at_once,
    fails_after_its_effect,
    fails_at_once,
    play,
    twice,
)

STEPS = [(kind, step.name) for kind, saga in SAGAS.items() for step in saga.steps]
FAILURES: dict[str, Wrap] = {"at once": fails_at_once, "after its effect": fails_after_its_effect}
# The kill comes before the answer of the commit, or when the next step has just begun.
KILLED_AFTER_S = (0.0, 0.02)

plain = cache(play)
each_step = pytest.mark.parametrize(("kind", "step"), STEPS, ids=lambda value: value)
each_failure = pytest.mark.parametrize("failure", FAILURES)


def test_every_saga_has_a_setup() -> None:
    assert SETUPS.keys() == SAGAS.keys()


@pytest.mark.parametrize("kind", SAGAS)
def test_a_saga_that_nothing_disturbs_succeeds(kind: str) -> None:
    assert plain(kind).ended.state is OperationState.SUCCEEDED


@each_step
def test_an_action_may_be_called_twice(kind: str, step: str) -> None:
    assert play(kind, at_step(kind, step, twice)).end == plain(kind).end


@each_failure
@each_step
def test_a_step_that_fails_is_undone_with_all_before_it(kind: str, step: str, failure: str) -> None:
    check_failed(step, play(kind, at_step(kind, step, FAILURES[failure])))


@each_failure
@each_step
def test_an_undo_may_be_called_twice(kind: str, step: str, failure: str) -> None:
    fails = at_step(kind, step, FAILURES[failure])

    assert play(kind, both(fails, at_every_undo(kind, twice))).end == play(kind, fails).end


@pytest.mark.parametrize("after_s", KILLED_AFTER_S)
@pytest.mark.parametrize("kind", SAGAS)
def test_another_leader_goes_on_after_every_commit(kind: str, after_s: float) -> None:
    for commit in range(1, plain(kind).commits + 1):
        resumed = play(kind, kill=Kill(commit, after_s))
        assert resumed.killed, commit
        assert resumed.end == plain(kind).end, commit


@pytest.mark.parametrize("after_s", KILLED_AFTER_S)
@each_failure
@each_step
def test_another_leader_goes_on_undoing_after_every_commit(
    kind: str, step: str, failure: str, after_s: float
) -> None:
    fails = at_step(kind, step, FAILURES[failure])
    failed = play(kind, fails)
    for commit in range(1, failed.commits + 1):
        resumed = play(kind, fails, Kill(commit, after_s))
        assert resumed.killed, commit
        # While nobody led, a step may have come to its end for good.
        assert resumed.end == (plain(kind) if resumed.turned else failed).end, commit


@each_step
def test_a_saga_can_be_cancelled_until_its_point_of_no_return(kind: str, step: str) -> None:
    for cancelled in (cancelled_at_once, cancelled_at_its_end):
        accepted: list[bool] = []
        outcome = play(kind, at_step(kind, step, cancelled(accepted)))
        assert accepted == [not is_past_return(kind, step)]
        if outcome.turned or is_past_return(kind, step):
            assert outcome.end == plain(kind).end
        else:
            outcome.check_undone(OperationState.CANCELLED)


def check_failed(step: str, outcome: Played) -> None:
    """Assert that a failure was undone, unless the step had come to its end for good."""
    kind = outcome.ended.kind
    if outcome.turned or is_past_return(kind, step):
        assert outcome.end == plain(kind).end
        return
    outcome.check_undone(OperationState.FAILED)
    assert outcome.ended.error == INJECTED


def is_past_return(kind: str, name: str) -> bool:
    """Whether a step is begun only after one from which there is no return."""
    steps: tuple[Step, ...] = SAGAS[kind].steps
    before = steps[: SAGAS[kind].names.index(name)]
    return any(each.no_return for each in before)
