"""A saga's journal is kept straight: what may follow what, and everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from controlplane.commands.draft import Command
from controlplane.commands.operations import ExpireOperation
from controlplane.commands.sagas import (
    BeginUndo,
    CancelOperation,
    EndUndone,
    FailStep,
    FinishStep,
    FinishUndo,
    GiveUpSaga,
    Note,
    TurnForward,
    unchanged,
)
from controlplane.services.views import is_cancellable
from shared.errors import IllegalTransition, StateConflict
from shared.model import OperationState, StepState
from tests.unit.core_world import USER
from tests.unit.move_world import FAULT, MoveWorld

_Make = Callable[[str, str], Command[Any]]
COMMANDS: dict[str, _Make] = {
    "finish": lambda op, step: FinishStep(operation_id=op, step=step, effect=unchanged),
    "note": lambda op, step: Note(operation_id=op, step=step, effect=unchanged),
    "fail": lambda op, step: FailStep(operation_id=op, step=step, fault=FAULT),
    "begin undo": lambda op, step: BeginUndo(operation_id=op, step=step),
    "finish undo": lambda op, step: FinishUndo(operation_id=op, step=step, effect=unchanged),
    "turn": lambda op, step: TurnForward(operation_id=op, step=step, effect=unchanged),
    "end undone": lambda op, step: EndUndone(operation_id=op),
}
# Where a migration stands, and what may be written to it then, about which steps.
FORWARD = {"finish", "note", "fail"}
LEGAL: dict[str, set[tuple[str, str]]] = {
    "forward": {(name, "prepare") for name in FORWARD},
    "failed": {
        *(("begin undo", step) for step in ("admit", "precheck", "claim", "prepare")),
        *(("end undone", step) for step in ("admit", "precheck", "claim", "prepare", "transfer")),
    },
    "undoing": {
        *(("begin undo", step) for step in ("admit", "precheck", "claim")),
        *(("end undone", step) for step in ("admit", "precheck", "claim", "prepare", "transfer")),
        *((name, "prepare") for name in ("note", "finish undo", "turn")),
    },
    "past return": {(name, "finalize") for name in FORWARD - {"fail"}},
    "ended": set(),
}
STEPS = ("admit", "precheck", "claim", "prepare", "transfer")


def standing(where: str) -> tuple[MoveWorld, str]:
    """Return a world with a migration that stands there."""
    world = MoveWorld()
    _, operation_id = world.moving("finalize" if where in ("past return", "ended") else "prepare")
    if where in ("failed", "undoing"):
        world.fail(operation_id, "prepare")
    if where == "undoing":
        world.apply(BeginUndo(operation_id=operation_id, step="prepare"))
    if where == "ended":
        world.finish(operation_id, "finalize", world.effects()["finalize"])
    return world, operation_id


@pytest.mark.parametrize(("where", "name"), list(product(LEGAL, COMMANDS)))
def test_only_what_follows_is_written(where: str, name: str) -> None:
    for step in (*STEPS, "switch", "finalize", "no such step"):
        if where in ("failed", "undoing") and step in ("switch", "finalize", "no such step"):
            continue  # EndUndone does not name a step
        world, operation_id = standing(where)
        command = COMMANDS[name](operation_id, step)
        if (name, step) in LEGAL[where]:
            world.apply(command)
        else:
            assert isinstance(world.refused(command), StateConflict | IllegalTransition), step


def test_a_step_is_done_and_the_next_begun_in_one_transaction() -> None:
    world, operation_id = standing("forward")
    before = world.state.revision
    world.finish(operation_id, "prepare")
    states = [step.state for step in world.operation(operation_id).steps]

    assert world.state.revision == before + 1
    assert states == [StepState.DONE] * 4 + [StepState.RUNNING] + [StepState.PENDING] * 2
    assert world.operation(operation_id).phase == "transfer"


def test_a_note_that_says_nothing_new_is_not_written() -> None:
    world, operation_id = standing("forward")
    before = world.operation(operation_id)
    world.note(operation_id, "prepare", unchanged)

    assert world.operation(operation_id) == before


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_saga_that_is_undone_ends_as_it_was_turned(cancelled: bool) -> None:
    world, operation_id = standing("forward")
    if cancelled:
        world.apply(CancelOperation(operation_id=operation_id, by=USER))
        assert world.apply(CancelOperation(operation_id=operation_id, by=USER)) == operation_id
    else:
        world.fail(operation_id, "prepare")
    assert not is_cancellable(world.operation(operation_id))
    world.apply(EndUndone(operation_id=operation_id))

    ended = world.ended(operation_id)
    assert ended.state is (OperationState.CANCELLED if cancelled else OperationState.FAILED)
    assert ended.error is not None
    assert ended.error.code == ("cancelled" if cancelled else "broken")


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_saga_that_turns_only_goes_forward(cancelled: bool) -> None:
    """It was at the step after the one that turns, which is to come once more."""
    world = MoveWorld()
    _, operation_id = world.moving("switch")
    if cancelled:
        world.apply(CancelOperation(operation_id=operation_id, by=USER))
    else:
        world.fail(operation_id, "switch")
    world.apply(BeginUndo(operation_id=operation_id, step="transfer"))
    world.apply(TurnForward(operation_id=operation_id, step="transfer", effect=unchanged))

    operation = world.operation(operation_id)
    assert (operation.state, operation.undoing, operation.error) == (
        OperationState.RUNNING,
        False,
        None,
    )
    assert operation.phase == "switch"
    cancel = CancelOperation(operation_id=operation_id, by=USER)
    assert "no return" in str(world.refused(cancel))
    assert not is_cancellable(operation)
    world.age(days=2)
    world.apply(GiveUpSaga(operation_id=operation_id))
    assert not world.operation(operation_id).undoing


def test_a_saga_is_given_up_at_its_deadline_and_not_before() -> None:
    world, operation_id = standing("forward")
    give_up = GiveUpSaga(operation_id=operation_id)
    assert isinstance(world.refused(give_up), StateConflict)
    world.age(days=2)
    world.apply(ExpireOperation(operation_id=operation_id, by=USER))
    assert not world.operation(operation_id).undoing, "a saga is given up otherwise"
    world.apply(give_up)

    operation = world.operation(operation_id)
    assert operation.undoing
    assert operation.error is not None
    assert operation.error.code == "deadline_exceeded"
    before = world.state.revision
    world.apply(give_up)
    assert world.operation(operation_id) == operation
    assert world.state.revision == before + 1


def test_what_is_past_its_return_is_neither_cancelled_nor_given_up() -> None:
    world, operation_id = standing("past return")
    cancel = CancelOperation(operation_id=operation_id, by=USER)
    assert "no return" in str(world.refused(cancel))
    world.age(days=2)
    world.apply(GiveUpSaga(operation_id=operation_id))

    assert not world.operation(operation_id).undoing


def test_what_is_no_saga_or_has_ended_cannot_be_cancelled() -> None:
    world, ended = standing("ended")
    _, create = world.create("web-2")
    for operation_id in (ended, create, "op-nowhere"):
        cancel = CancelOperation(operation_id=operation_id, by=USER)
        assert isinstance(world.refused(cancel), StateConflict)
