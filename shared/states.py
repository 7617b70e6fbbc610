"""The state machines, as tables: what may follow what, and which action fits which phase.

Nothing else in the tree decides a transition. ``vm_phase`` is not a machine of its own: it derives
one word from a VM's record, so that the word can never disagree with the facts.
"""

from __future__ import annotations

import enum
from typing import TypeVar

from shared.errors import IllegalTransition, StateConflict
from shared.model import (
    AttemptState,
    ObservedPower,
    OperationState,
    Power,
    StepState,
    Vm,
    VmPhase,
)


class OperationEvent(enum.Enum):
    STARTED = "started"
    STEPPED = "stepped"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCEL_ASKED = "cancel asked"
    CANCELLED = "cancelled"
    TURNED = "turned"


class StepEvent(enum.Enum):
    """What happens to a saga's step; TURNED: its undo found that it is done for good.

    RESET: a step before it has turned, so that it is to come once more.
    """

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"
    UNDO_BEGUN = "undo begun"
    UNDONE = "undone"
    TURNED = "turned"
    RESET = "reset"


class AttemptEvent(enum.Enum):
    """What a report or a proof says about one generation."""

    SEEN_RUNNING = "seen running"
    SEEN_NOT_RUNNING = "seen not running"
    NODE_BOOTED_ANEW = "node booted anew"


class VmAction(enum.StrEnum):
    START = "start"
    SHUTDOWN = "shutdown"
    STOP = "stop"
    REBOOT = "reboot"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"
    DELETE = "delete"


_O, _OE = OperationState, OperationEvent
OPERATION_TRANSITIONS: dict[tuple[OperationState, OperationEvent], OperationState] = {
    (_O.PENDING, _OE.STARTED): _O.RUNNING,
    (_O.PENDING, _OE.STEPPED): _O.RUNNING,
    (_O.PENDING, _OE.SUCCEEDED): _O.SUCCEEDED,
    (_O.PENDING, _OE.FAILED): _O.FAILED,
    (_O.PENDING, _OE.CANCEL_ASKED): _O.CANCELLING,
    (_O.PENDING, _OE.CANCELLED): _O.CANCELLED,
    (_O.RUNNING, _OE.STEPPED): _O.RUNNING,
    (_O.RUNNING, _OE.SUCCEEDED): _O.SUCCEEDED,
    (_O.RUNNING, _OE.FAILED): _O.FAILED,
    (_O.RUNNING, _OE.CANCEL_ASKED): _O.CANCELLING,
    (_O.RUNNING, _OE.CANCELLED): _O.CANCELLED,
    (_O.CANCELLING, _OE.STEPPED): _O.CANCELLING,
    (_O.CANCELLING, _OE.CANCEL_ASKED): _O.CANCELLING,
    (_O.CANCELLING, _OE.SUCCEEDED): _O.SUCCEEDED,
    (_O.CANCELLING, _OE.FAILED): _O.FAILED,
    (_O.CANCELLING, _OE.CANCELLED): _O.CANCELLED,
    # A saga that is undone has found what it cannot undo: it goes forward, whoever cancelled it.
    (_O.RUNNING, _OE.TURNED): _O.RUNNING,
    (_O.CANCELLING, _OE.TURNED): _O.RUNNING,
}
OPERATION_ENDS = frozenset({_O.SUCCEEDED, _O.FAILED, _O.CANCELLED})

_S, _SE = StepState, StepEvent
STEP_TRANSITIONS: dict[tuple[StepState, StepEvent], StepState] = {
    (_S.PENDING, _SE.BEGUN): _S.RUNNING,
    (_S.RUNNING, _SE.DONE): _S.DONE,
    (_S.RUNNING, _SE.FAILED): _S.FAILED,
    # What ran or failed half-way may have had effects, too.
    (_S.RUNNING, _SE.UNDO_BEGUN): _S.UNDOING,
    (_S.FAILED, _SE.UNDO_BEGUN): _S.UNDOING,
    (_S.DONE, _SE.UNDO_BEGUN): _S.UNDOING,
    (_S.UNDOING, _SE.UNDONE): _S.UNDONE,
    (_S.UNDOING, _SE.TURNED): _S.DONE,
    (_S.RUNNING, _SE.RESET): _S.PENDING,
    (_S.FAILED, _SE.RESET): _S.PENDING,
    (_S.UNDONE, _SE.RESET): _S.PENDING,
}

# An attempt that ended may be seen running after all: a start that libvirt reported as failed, or
# answered too late. The truth is taken, as long as no newer generation was given out.
_A, _AE = AttemptState, AttemptEvent
ATTEMPT_TRANSITIONS: dict[tuple[AttemptState, AttemptEvent], AttemptState] = {
    (_A.PERMITTED, _AE.SEEN_RUNNING): _A.RUNNING,
    (_A.PERMITTED, _AE.SEEN_NOT_RUNNING): _A.ENDED,
    (_A.PERMITTED, _AE.NODE_BOOTED_ANEW): _A.ENDED,
    (_A.RUNNING, _AE.SEEN_RUNNING): _A.RUNNING,
    (_A.RUNNING, _AE.SEEN_NOT_RUNNING): _A.ENDED,
    (_A.RUNNING, _AE.NODE_BOOTED_ANEW): _A.ENDED,
    (_A.ENDED, _AE.SEEN_RUNNING): _A.RUNNING,
    (_A.ENDED, _AE.SEEN_NOT_RUNNING): _A.ENDED,
    (_A.ENDED, _AE.NODE_BOOTED_ANEW): _A.ENDED,
}

_P = VmPhase
ACTION_PHASES: dict[VmAction, frozenset[VmPhase]] = {
    VmAction.START: frozenset({_P.STOPPED, _P.CRASHED}),
    VmAction.SHUTDOWN: frozenset({_P.RUNNING}),
    VmAction.STOP: frozenset(
        {_P.PENDING, _P.STARTING, _P.RUNNING, _P.PAUSED, _P.STOPPING, _P.CRASHED}
    ),
    VmAction.REBOOT: frozenset({_P.RUNNING}),
    VmAction.RESET: frozenset({_P.RUNNING}),
    VmAction.PAUSE: frozenset({_P.RUNNING}),
    VmAction.RESUME: frozenset({_P.PAUSED}),
    VmAction.DELETE: frozenset(set(_P) - {_P.DELETING}),
}

RUNNING_POWERS = frozenset({ObservedPower.RUNNING, ObservedPower.PAUSED})

State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)


def advance(table: dict[tuple[State, Event], State], state: State, event: Event) -> State:
    """Return the state that follows; raises IllegalTransition where ``table`` has no row."""
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransition(f"nothing follows {state.value!r} on {event.value!r}") from None


def check_action(action: VmAction, vm: Vm) -> None:
    """Raise StateConflict unless the action fits the phase of a VM that is known to stay put."""
    if vm.status.unproven is not None:
        raise StateConflict(
            f"cannot {action} {vm.name!r}: the cluster was restored from a backup, and where it is "
            f"is not known yet{vm.status.unproven.why and ': '}{vm.status.unproven.why} (novacron "
            "cluster status)"
        )
    if vm.status.migration is not None:
        operation = vm.status.migration.operation
        raise StateConflict(
            f"cannot {action} {vm.name!r} while {operation} migrates it: wait for that, or cancel "
            f"it (novacron op cancel {operation})"
        )
    phase = vm_phase(vm)
    if phase not in ACTION_PHASES[action]:
        fits = " or ".join(sorted(p.value for p in ACTION_PHASES[action]))
        raise StateConflict(
            f"cannot {action} {vm.name!r} while it is {phase.value}: it must be {fits}"
        )


def vm_phase(vm: Vm) -> VmPhase:
    """Return the one word for what a VM is doing, from desired power, attempt and last report."""
    if vm.status.unproven is not None:
        return VmPhase.UNKNOWN
    if vm.deleting:
        return VmPhase.DELETING
    attempt = vm.status.attempt
    wanted = vm.spec.power is not Power.STOPPED
    if attempt is None or attempt.state is AttemptState.ENDED:
        return _phase_at_rest(vm, wanted)
    if not wanted:
        return VmPhase.STOPPING
    if attempt.state is AttemptState.PERMITTED:
        return VmPhase.STARTING
    return VmPhase.PAUSED if vm.status.power_seen is ObservedPower.PAUSED else VmPhase.RUNNING


def _phase_at_rest(vm: Vm, wanted: bool) -> VmPhase:
    if not wanted:
        return VmPhase.STOPPED
    if vm.status.node is None:
        return VmPhase.PENDING
    if vm.status.crashes:
        return VmPhase.CRASHED
    return VmPhase.STARTING
