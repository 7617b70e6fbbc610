"""The state machines: every state with every event, legal and illegal; phases and actions."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import product

import pytest
from msgspec.structs import replace

from shared.errors import IllegalTransition, StateConflict
from shared.model import (
    Attempt,
    AttemptState,
    ObservedPower,
    OperationState,
    Power,
    StepState,
    Vm,
    VmPhase,
    VmStatus,
)
from shared.states import (
    ACTION_PHASES,
    ATTEMPT_TRANSITIONS,
    OPERATION_ENDS,
    OPERATION_TRANSITIONS,
    STEP_TRANSITIONS,
    AttemptEvent,
    OperationEvent,
    StepEvent,
    VmAction,
    advance,
    check_action,
    vm_phase,
)
from tests.unit.core_world import spec

NOW = datetime(2026, 11, 1, tzinfo=UTC)
OPEN = [OperationState.PENDING, OperationState.RUNNING, OperationState.CANCELLING]
NEVER = [*OPERATION_ENDS, OperationState.UNKNOWN]


def a_vm(power: Power, attempt: AttemptState | None, **status: object) -> Vm:
    run = None
    if attempt is not None:
        run = Attempt(generation=1, node="node-1", boot_id="b", state=attempt, permitted_at=NOW)
    return Vm(
        id="vm-1",
        name="web-1",
        created_at=NOW,
        updated_at=NOW,
        spec=spec(power=power),
        domain_name="vm-1",
        domain_uuid="",
        status=VmStatus(attempt=run, **status),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("state", "event"), list(product(NEVER, OperationEvent)))
def test_nothing_follows_the_end_of_an_operation(
    state: OperationState, event: OperationEvent
) -> None:
    with pytest.raises(IllegalTransition):
        advance(OPERATION_TRANSITIONS, state, event)


@pytest.mark.parametrize("state", OPEN)
def test_an_open_operation_can_come_to_each_end(state: OperationState) -> None:
    ends = {
        OperationEvent.SUCCEEDED: OperationState.SUCCEEDED,
        OperationEvent.FAILED: OperationState.FAILED,
        OperationEvent.CANCELLED: OperationState.CANCELLED,
    }
    for event, end in ends.items():
        assert advance(OPERATION_TRANSITIONS, state, event) is end


def test_every_pair_of_operation_state_and_event_is_decided() -> None:
    """Only an open operation moves; nothing starts twice; only a turn takes cancelling back."""
    illegal = {
        (state, event)
        for state, event in product(OperationState, OperationEvent)
        if (state, event) not in OPERATION_TRANSITIONS
    }

    assert illegal == {*product(NEVER, OperationEvent)} | {
        (OperationState.RUNNING, OperationEvent.STARTED),
        (OperationState.CANCELLING, OperationEvent.STARTED),
        (OperationState.PENDING, OperationEvent.TURNED),
    }
    for event in (OperationEvent.STEPPED, OperationEvent.CANCEL_ASKED):
        after = advance(OPERATION_TRANSITIONS, OperationState.CANCELLING, event)
        assert after is OperationState.CANCELLING


def test_every_pair_of_step_state_and_event_is_decided() -> None:
    """What ran may be undone, what was undone is not undone again, and only undoing turns."""
    touched = {StepState.RUNNING, StepState.FAILED, StepState.DONE}
    legal = {
        *((StepState.RUNNING, event) for event in (StepEvent.DONE, StepEvent.FAILED)),
        *((state, StepEvent.UNDO_BEGUN) for state in touched),
        *((StepState.UNDOING, event) for event in (StepEvent.UNDONE, StepEvent.TURNED)),
        *((state, StepEvent.RESET) for state in (touched - {StepState.DONE}) | {StepState.UNDONE}),
        (StepState.PENDING, StepEvent.BEGUN),
    }

    assert set(STEP_TRANSITIONS) == legal


@pytest.mark.parametrize(("state", "event"), list(product(AttemptState, AttemptEvent)))
def test_an_attempt_is_what_was_seen_of_it_last(state: AttemptState, event: AttemptEvent) -> None:
    if state is AttemptState.UNKNOWN:
        with pytest.raises(IllegalTransition):
            advance(ATTEMPT_TRANSITIONS, state, event)
        return
    after = advance(ATTEMPT_TRANSITIONS, state, event)
    running = event is AttemptEvent.SEEN_RUNNING
    assert after is (AttemptState.RUNNING if running else AttemptState.ENDED)


def phase_of(power: Power, attempt: AttemptState | None, **status: object) -> VmPhase:
    return vm_phase(a_vm(power, attempt, **status))


def test_the_phase_follows_from_the_facts() -> None:
    run, rest = Power.RUNNING, AttemptState.ENDED
    assert phase_of(run, None) is VmPhase.PENDING
    assert phase_of(run, None, node="node-1") is VmPhase.STARTING
    assert phase_of(run, AttemptState.PERMITTED, node="node-1") is VmPhase.STARTING
    assert phase_of(run, AttemptState.RUNNING, node="node-1") is VmPhase.RUNNING
    paused = phase_of(run, AttemptState.RUNNING, power_seen=ObservedPower.PAUSED)
    assert paused is VmPhase.PAUSED
    assert phase_of(run, rest, node="node-1", crashes=1) is VmPhase.CRASHED
    assert phase_of(run, rest, node="node-1") is VmPhase.STARTING
    for attempt in (AttemptState.PERMITTED, AttemptState.RUNNING):
        assert phase_of(Power.STOPPED, attempt, node="node-1") is VmPhase.STOPPING
    assert phase_of(Power.STOPPED, rest, node="node-1", crashes=3) is VmPhase.STOPPED
    assert phase_of(Power.STOPPED, None) is VmPhase.STOPPED


@pytest.mark.parametrize(("power", "attempt"), list(product(Power, [None, *AttemptState])))
def test_every_combination_has_a_phase_and_deleting_wins(
    power: Power, attempt: AttemptState | None
) -> None:
    vm = a_vm(power, attempt)

    assert vm_phase(vm) not in (VmPhase.DELETING, VmPhase.UNKNOWN)
    assert vm_phase(replace(vm, deleting=True)) is VmPhase.DELETING


@pytest.mark.parametrize("action", VmAction)
def test_an_action_is_taken_in_its_phases_only(action: VmAction) -> None:
    examples = {
        VmPhase.PENDING: a_vm(Power.RUNNING, None),
        VmPhase.STARTING: a_vm(Power.RUNNING, AttemptState.PERMITTED),
        VmPhase.RUNNING: a_vm(Power.RUNNING, AttemptState.RUNNING),
        VmPhase.PAUSED: a_vm(Power.PAUSED, AttemptState.RUNNING, power_seen=ObservedPower.PAUSED),
        VmPhase.STOPPING: a_vm(Power.STOPPED, AttemptState.RUNNING),
        VmPhase.STOPPED: a_vm(Power.STOPPED, None),
        VmPhase.CRASHED: a_vm(Power.RUNNING, AttemptState.ENDED, node="node-1", crashes=1),
        VmPhase.DELETING: replace(a_vm(Power.RUNNING, None), deleting=True),
    }
    assert set(examples) | {VmPhase.UNKNOWN} == set(VmPhase)
    for phase, vm in examples.items():
        assert vm_phase(vm) is phase
        if phase in ACTION_PHASES[action]:
            check_action(action, vm)
        else:
            with pytest.raises(StateConflict, match=phase.value):
                check_action(action, vm)


def test_the_table_of_actions() -> None:
    """Stated once more, so that a slip in the table is seen."""
    table = {
        phase: {action.value for action in VmAction if phase in ACTION_PHASES[action]}
        for phase in VmPhase
    }

    assert table == {
        VmPhase.PENDING: {"stop", "delete"},
        VmPhase.STARTING: {"stop", "delete"},
        VmPhase.RUNNING: {"shutdown", "stop", "reboot", "reset", "pause", "delete"},
        VmPhase.PAUSED: {"stop", "resume", "delete"},
        VmPhase.STOPPING: {"stop", "delete"},
        VmPhase.STOPPED: {"start", "delete"},
        VmPhase.CRASHED: {"start", "stop", "delete"},
        VmPhase.DELETING: set(),
        VmPhase.UNKNOWN: {"delete"},
    }
