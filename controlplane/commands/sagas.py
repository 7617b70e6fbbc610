"""How a saga's journal is written: each change of a step, and what that step changes, together.

The operation record is the journal. A step is ``running`` in it before its action's first side
effect, and ``done`` in the very transaction that writes what the step has decided. Which steps
there are, and which have an undo, ``controlplane/sagas/`` knows; here only the record is kept
straight.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from controlplane.commands.operations import end_operation
from shared.errors import StateConflict
from shared.model import Operation, OperationState, OperationStep, Problem, StepState
from shared.problems import problem
from shared.states import (
    OPERATION_ENDS,
    OPERATION_TRANSITIONS,
    STEP_TRANSITIONS,
    OperationEvent,
    StepEvent,
    advance,
)

# Writes what a step decided and returns the operation, whose journal it may have changed.
Effect = Callable[[Draft, Operation], Operation]


class FinishStep(Struct, frozen=True, kw_only=True):
    """Marks a running step done, with its effect, and the next one running; the last one ends it.

    Raises StateConflict when the saga has turned meanwhile, or what the effect raises.
    """

    operation_id: str
    step: str
    effect: Effect

    def decide(self, draft: Draft) -> None:
        operation = _open(draft, self.operation_id, undoing=False)
        position = _position(operation, self.step, StepState.RUNNING)
        operation = self.effect(draft, operation)
        operation = _marked(draft, operation, position, StepEvent.DONE)
        if position + 1 == len(operation.steps):
            end_operation(draft, replace(operation, phase=""), OperationEvent.SUCCEEDED)
            return
        _put(draft, _marked(draft, operation, position + 1, StepEvent.BEGUN))


class Note(Struct, frozen=True, kw_only=True):
    """Writes what a running (or undoing) step found out on its way, without ending the step."""

    operation_id: str
    step: str
    effect: Effect

    def decide(self, draft: Draft) -> None:
        operation = _saga(draft, self.operation_id)
        at = StepState.UNDOING if operation.undoing else StepState.RUNNING
        _position(operation, self.step, at)
        changed = self.effect(draft, operation)
        if changed != operation:
            draft.put(replace(changed, updated_at=draft.now))


class FailStep(Struct, frozen=True, kw_only=True):
    """Marks a running step failed; from now on the saga is undone.

    Raises StateConflict past the point of no return.
    """

    operation_id: str
    step: str
    fault: Problem

    def decide(self, draft: Draft) -> None:
        operation = _open(draft, self.operation_id, undoing=False)
        position = _position(operation, self.step, StepState.RUNNING)
        if is_past_return(operation):
            raise StateConflict(f"{operation.id} is past its point of no return")
        failed = _marked(draft, operation, position, StepEvent.FAILED)
        _put(draft, replace(failed, undoing=True, error=self.fault))


class BeginUndo(Struct, frozen=True, kw_only=True):
    operation_id: str
    step: str

    def decide(self, draft: Draft) -> None:
        operation = _open(draft, self.operation_id, undoing=True)
        position = _position(operation, self.step)
        _put(draft, _marked(draft, operation, position, StepEvent.UNDO_BEGUN))


class FinishUndo(Struct, frozen=True, kw_only=True):
    operation_id: str
    step: str
    effect: Effect

    def decide(self, draft: Draft) -> None:
        operation = _open(draft, self.operation_id, undoing=True)
        position = _position(operation, self.step, StepState.UNDOING)
        operation = self.effect(draft, operation)
        _put(draft, _marked(draft, operation, position, StepEvent.UNDONE))


class TurnForward(Struct, frozen=True, kw_only=True):
    """An undo found that its step had come to its end after all: the saga goes forward again.

    From now on it only does that: asked to be undone once more, it would turn once more.
    """

    operation_id: str
    step: str
    effect: Effect

    def decide(self, draft: Draft) -> None:
        operation = _open(draft, self.operation_id, undoing=True)
        position = _position(operation, self.step, StepState.UNDOING)
        operation = self.effect(draft, operation)
        state = advance(OPERATION_TRANSITIONS, operation.state, OperationEvent.TURNED)
        operation = replace(operation, state=state, undoing=False, error=None)
        operation = _marked(draft, operation, position, StepEvent.TURNED, no_return=True)
        for later, step in enumerate(operation.steps[position + 1 :], start=position + 1):
            if step.state is not StepState.PENDING:
                operation = _marked(draft, operation, later, StepEvent.RESET)
        _put(draft, _marked(draft, operation, position + 1, StepEvent.BEGUN))


class EndUndone(Struct, frozen=True, kw_only=True):
    """Ends a saga of which nothing is left to undo."""

    operation_id: str

    def decide(self, draft: Draft) -> None:
        operation = _open(draft, self.operation_id, undoing=True)
        cancelled = operation.state is OperationState.CANCELLING
        event = OperationEvent.CANCELLED if cancelled else OperationEvent.FAILED
        end_operation(draft, operation, event, operation.error)


class CancelOperation(Struct, frozen=True, kw_only=True, tag="cancel_operation"):
    """Asks for a saga to be undone. Returns its id. Raises StateConflict.

    Asked again, it does nothing. ``by`` may be the saga that asked for this one.
    """

    operation_id: str
    by: Author

    def decide(self, draft: Draft) -> str:
        operation = draft.find(Operation, self.operation_id)
        if operation is None:
            raise StateConflict(f"{self.operation_id} has ended already")
        if operation.saga is None:
            raise StateConflict(
                f"a {operation.kind} cannot be cancelled: ask for the opposite instead"
            )
        if operation.undoing:
            return operation.id
        if is_past_return(operation):
            raise StateConflict(
                f"{operation.id} is past its point of no return ({operation.phase}) and will end "
                "by itself"
            )
        draft.audit("operation.cancel", operation.id, self.by, operation.tenant)
        state = advance(OPERATION_TRANSITIONS, operation.state, OperationEvent.CANCEL_ASKED)
        fault = problem("cancelled", f"cancelled by {self.by.principal}")
        _put(draft, replace(operation, state=state, undoing=True, error=fault))
        return operation.id


class GiveUpSaga(Struct, frozen=True, kw_only=True):
    """Turns a saga whose deadline has passed; one past its return goes on for as long as it takes.

    Does nothing when it has ended, or is being undone already.
    """

    operation_id: str

    def decide(self, draft: Draft) -> None:
        operation = draft.find(Operation, self.operation_id)
        if operation is None or operation.saga is None or operation.undoing:
            return
        if operation.deadline_at > draft.now:
            raise StateConflict(f"{operation.id} has time until {operation.deadline_at}")
        if is_past_return(operation):
            return
        fault = problem(
            "deadline_exceeded",
            f"not done by {operation.deadline_at}; last phase {operation.phase}",
        )
        _put(draft, replace(operation, undoing=True, error=fault))


def open_saga(draft: Draft, operation: Operation) -> None:
    """Write a new saga with its first step begun: that is its intent."""
    assert operation.saga is not None, "a saga has a journal"
    assert operation.steps, "a saga has steps"
    _put(draft, _marked(draft, operation, 0, StepEvent.BEGUN))


def saga_steps(names: tuple[str, ...], no_return: frozenset[str]) -> tuple[OperationStep, ...]:
    return tuple(OperationStep(name=name, no_return=name in no_return) for name in names)


def is_past_return(operation: Operation) -> bool:
    return any(step.no_return and step.state is StepState.DONE for step in operation.steps)


def unchanged(draft: Draft, operation: Operation) -> Operation:
    """The effect of a step that writes nothing but that it is done."""
    return operation


def _saga(draft: Draft, operation_id: str) -> Operation:
    operation = draft.find(Operation, operation_id)
    if operation is None or operation.saga is None or operation.state in OPERATION_ENDS:
        raise StateConflict(f"{operation_id} is no open saga any more")
    return operation


def _open(draft: Draft, operation_id: str, *, undoing: bool) -> Operation:
    operation = _saga(draft, operation_id)
    if operation.undoing is not undoing:
        raise StateConflict(f"{operation_id} has turned meanwhile")
    return operation


def _position(operation: Operation, name: str, state: StepState | None = None) -> int:
    for position, step in enumerate(operation.steps):
        if step.name == name:
            if state is not None and step.state is not state:
                raise StateConflict(f"step {name} of {operation.id} is {step.state.value}")
            return position
    raise StateConflict(f"{operation.id} has no step {name}")


def _marked(
    draft: Draft,
    operation: Operation,
    position: int,
    event: StepEvent,
    *,
    no_return: bool = False,
) -> Operation:
    steps = list(operation.steps)
    step = steps[position]
    state = advance(STEP_TRANSITIONS, step.state, event)
    steps[position] = replace(
        step, state=state, at=draft.now, no_return=step.no_return or no_return
    )
    undoing = state is StepState.UNDOING
    begun = undoing or state is StepState.RUNNING
    phase = f"undo-{step.name}" if undoing else step.name if begun else operation.phase
    return replace(operation, steps=tuple(steps), phase=phase)


def _put(draft: Draft, operation: Operation) -> None:
    draft.put(replace(operation, updated_at=draft.now))
