"""Runs sagas: one step at a time, forward or back, from what the journal says.

A task for each open saga looks at its operation's record, asks the step that is next, and submits
what that answers. Nothing is remembered between two looks, so a new leader goes on where the
record stands. A step's intent is in the record before its action is called.
"""

from __future__ import annotations

import asyncio
import logging

from controlplane.commands.sagas import (
    BeginUndo,
    EndUndone,
    FailStep,
    FinishStep,
    FinishUndo,
    GiveUpSaga,
    Note,
    TurnForward,
    is_past_return,
)
from controlplane.sagas.context import (
    Done,
    Outcome,
    Saga,
    SagaParts,
    Step,
    StepContext,
    StepFailed,
    Turned,
    Waits,
    Writes,
)
from controlplane.state import Changes
from shared.errors import LeadershipLost, NovacronError, StateConflict
from shared.model import Operation, OperationStep, StepState
from shared.states import OPERATION_ENDS

log = logging.getLogger(__name__)

# Reports come as they come; what depends on time alone (a deadline, a silent node) is seen within
# this.
LOOK_AGAIN_S = 1.0
PAUSE_AFTER_FAILURE_S = 1.0
# What is waited for changes in moments as a rule; an operator looks for what has lasted.
TELL_WAIT_AFTER_S = 5.0
# What may have to be undone. A step that is pending has done nothing.
_TOUCHED = frozenset({StepState.RUNNING, StepState.DONE, StepState.FAILED, StepState.UNDOING})


class SagaEngine:
    """Made for one term. ``sagas`` are the workflows there are, by kind of operation."""

    def __init__(self, parts: SagaParts, sagas: dict[str, Saga]) -> None:
        self._parts = parts
        self._sagas = sagas
        self._driven: dict[str, None] = {}
        # What each saga waits for, since when, and whether that was told.
        self._waits: dict[str, tuple[str, float, bool]] = {}
        self._woken = Changes()

    def wake(self) -> None:
        """Have every saga looked at again: something that is in no record has changed."""
        self._woken.notify()

    async def run(self) -> None:
        """Drive every open saga until cancelled. Raises LeadershipLost."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                changed = self._parts.state.changes.next()
                for operation_id in self._parts.state.saga_ids():
                    if operation_id not in self._driven:
                        self._driven[operation_id] = None
                        tasks.create_task(self._drive(operation_id))
                try:
                    await asyncio.wait([changed], timeout=LOOK_AGAIN_S)
                finally:
                    changed.cancel()

    async def advance(self, operation_id: str) -> bool:
        """Take one look and do what it asks for; False when there is nothing to do at present."""
        stored = self._parts.state.operations.get(operation_id)
        if stored is None or stored.record.state in OPERATION_ENDS:
            return False
        operation = stored.record
        saga = self._sagas[operation.kind]
        if self._is_overdue(operation):
            await self._parts.submit(GiveUpSaga(operation_id=operation_id))
            return True
        if operation.undoing:
            return await self._back(saga, operation)
        return await self._forward(saga, operation)

    def _is_overdue(self, operation: Operation) -> bool:
        if operation.undoing or is_past_return(operation):
            return False
        return operation.deadline_at <= self._parts.clock.now()

    async def _drive(self, operation_id: str) -> None:
        try:
            while operation_id in self._parts.state.operations:
                # Waiting begins before the look: what changes during it leads to another one.
                waits = [self._parts.state.changes.next(), self._woken.next()]
                try:
                    if not await self._look(operation_id):
                        await asyncio.wait(
                            waits, timeout=LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED
                        )
                finally:
                    for wait in waits:
                        wait.cancel()
        finally:
            del self._driven[operation_id]
            self._waits.pop(operation_id, None)

    async def _look(self, operation_id: str) -> bool:
        try:
            return await self.advance(operation_id)
        except LeadershipLost:
            raise
        except StateConflict as conflict:
            # Its record or the cluster has moved on meanwhile.
            log.info("%s: %s", operation_id, conflict)
            return False
        except NovacronError as error:
            log.warning("%s: will be looked at again: %s", operation_id, error)
            await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
            return True

    async def _forward(self, saga: Saga, operation: Operation) -> bool:
        step = saga.step(_first(operation, {StepState.RUNNING}).name)
        try:
            outcome = await step.action(StepContext(self._parts, operation))
        except StepFailed as failed:
            if is_past_return(operation):
                raise  # there is no way but forward: it is looked at again
            log.warning("%s: step %s failed: %s", operation.id, step.name, failed)
            await self._parts.submit(
                FailStep(operation_id=operation.id, step=step.name, fault=failed.problem)
            )
            return True
        return await self._take(operation, step, outcome)

    async def _back(self, saga: Saga, operation: Operation) -> bool:
        step = _next_undo(saga, operation)
        if step is None:
            await self._parts.submit(EndUndone(operation_id=operation.id))
            return True
        assert step.undo is not None, "only what has an undo is undone"
        recorded = next(each for each in operation.steps if each.name == step.name)
        if recorded.state is not StepState.UNDOING:
            await self._parts.submit(BeginUndo(operation_id=operation.id, step=step.name))
            return True
        outcome = await step.undo(StepContext(self._parts, operation))
        return await self._take(operation, step, outcome)

    async def _take(self, operation: Operation, step: Step, outcome: Outcome) -> bool:
        if isinstance(outcome, Waits):
            self._note_wait(operation.id, step.name, outcome.why)
            return False
        kind = _COMMANDS[type(outcome), operation.undoing]
        await self._parts.submit(
            kind(operation_id=operation.id, step=step.name, effect=outcome.effect)
        )
        return True

    def _note_wait(self, operation_id: str, step: str, why: str) -> None:
        """Tell, once, what a saga has been waiting for for a while."""
        now_s = asyncio.get_running_loop().time()
        known, since_s, told = self._waits.get(operation_id, ("", now_s, False))
        if known != why:
            self._waits[operation_id] = (why, now_s, False)
        elif not told and now_s - since_s >= TELL_WAIT_AFTER_S:
            log.info("%s: step %s waits: %s", operation_id, step, why)
            self._waits[operation_id] = (why, since_s, True)


_StepCommand = type[FinishStep] | type[FinishUndo] | type[Note] | type[TurnForward]
_COMMANDS: dict[tuple[type, bool], _StepCommand] = {
    (Writes, False): Note,
    (Writes, True): Note,
    (Done, False): FinishStep,
    (Done, True): FinishUndo,
    (Turned, True): TurnForward,
}


def _first(operation: Operation, states: set[StepState]) -> OperationStep:
    return next(step for step in operation.steps if step.state in states)


def _next_undo(saga: Saga, operation: Operation) -> Step | None:
    """Return the step to undo next: the last one that may have had an effect."""
    for recorded in reversed(operation.steps):
        step = saga.step(recorded.name)
        if recorded.state in _TOUCHED and step.undo is not None:
            return step
    return None
