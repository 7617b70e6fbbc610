"""What a saga's steps are given, and what they answer.

A step is an action and its undo. Both may be begun anew at any moment, by this leader or the next:
they look at what is, and either say that they wait, or hand over what to write. They write nothing
themselves, but through the engine; what one step found reaches another through the records only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from msgspec import Struct

from controlplane.commands.draft import Command, Draft
from controlplane.commands.migrations import MigrationLimits
from controlplane.commands.sagas import Effect
from controlplane.scheduler.snapshot import Snapshot
from controlplane.state import ClusterState
from shared.clock import Clock
from shared.errors import NovacronError
from shared.model import NodeState, Operation, Problem, Vm
from shared.offload import Offload
from shared.protocol import MigrationReport, Query

Result = TypeVar("Result")


class Nodes(Protocol):
    """The leader's sessions, as far as a saga needs them."""

    def trusts(self, node_id: str) -> bool:
        """Whether the node's agent is connected and has accepted this term."""
        ...

    def migration_report(self, vm_id: str, node_id: str) -> MigrationReport | None:
        """Return what a node last told, in its present session, of a VM's migration."""
        ...

    async def ask(self, node_id: str, query: Query) -> bytes:
        """Return an agent's answer. Raises NodeUnreachable, Overloaded, or the agent's problem."""
        ...


class Capacity(Protocol):
    """The scheduler's view of the cluster, and its check on a draft."""

    def current(self) -> Snapshot: ...

    def check_move(self, draft: Draft, vm: Vm, node_id: str) -> None:
        """Raise StateConflict unless the node can take a VM that moves to it."""
        ...


class Submit(Protocol):
    async def __call__(self, command: Command[Result]) -> Result: ...


class SagaParts(Struct, frozen=True):
    """What every saga of a term works with, which began at ``since``."""

    state: ClusterState
    nodes: Nodes
    capacity: Capacity
    submit: Submit
    clock: Clock
    limits: MigrationLimits
    offload: Offload
    since: datetime


class StepContext(Struct, frozen=True):
    """One look at one step: ``operation`` is the record as it was when the look began."""

    parts: SagaParts
    operation: Operation

    @property
    def state(self) -> ClusterState:
        return self.parts.state

    @property
    def nodes(self) -> Nodes:
        return self.parts.nodes

    def is_over_limit(self, limit: timedelta) -> bool:
        """Whether the present step, or its undo, has been under way for longer than ``limit``.

        Time in which nobody led does not count.
        """
        began = max(step.at for step in self.operation.steps if step.at is not None)
        return self.parts.clock.now() - max(began, self.parts.since) > limit

    def unheard(self) -> str:
        """Return which nodes may take something, but have not greeted this leader (yet).

        After a change of leaders that are all of them for a second or two; one that stays away is
        soon recorded as silent. Until then nothing is refused for want of a node.
        """
        names = [
            stored.record.name
            for node_id, stored in self.state.nodes.items()
            if stored.record.state is NodeState.READY and not self.nodes.trusts(node_id)
        ]
        return ", ".join(sorted(names))


class Waits(Struct, frozen=True):
    """Nothing to do before something changes; ``why`` is for the log."""

    why: str


class Writes(Struct, frozen=True):
    """The step goes on: first this is to be written, then it is looked at again."""

    effect: Effect


class Done(Struct, frozen=True):
    """The step (or its undo) is done, together with what is to be written."""

    effect: Effect


class Turned(Struct, frozen=True):
    """An undo's answer: the step has come to its end for good, so the saga goes forward."""

    effect: Effect


Outcome = Waits | Writes | Done | Turned
Act = Callable[[StepContext], Awaitable[Outcome]]


class StepFailed(NovacronError):
    """A step cannot be done; the saga is undone and ends with this problem."""

    code = "step_failed"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Step(Struct, frozen=True, kw_only=True):
    """``why`` says why there is no undo. ``no_return``: once done, the saga only goes forward."""

    name: str
    action: Act
    undo: Act | None = None
    why: str = ""
    no_return: bool = False


class Saga(Struct, frozen=True, kw_only=True):
    """A workflow: its steps, in order; ``kind`` is its operation's."""

    kind: str
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.steps)

    @property
    def no_return(self) -> frozenset[str]:
        return frozenset(step.name for step in self.steps if step.no_return)
