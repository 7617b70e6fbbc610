"""Aims a fault: brings a saga into a named step, or its undo, and says when it is there.

Many steps are as short as a commit, so nothing that looks now and then would see them: commits are
watched as they come. Every kind of fault is aimed at every step in turn, so that all the pairs are
met within a known number of seeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec import Struct

from controlplane.commands.drains import DRAIN
from controlplane.commands.migrations import MIGRATE
from controlplane.sagas.workflows import SAGAS
from shared.model import Operation
from tests.sim.ledger import Committed, Ledger, SimEvent
from tests.sim.workload import Workload

# A saga waits for an election or for a slot before it comes where it is wanted.
WAIT_LIMIT_S = 15.0


class Target(Struct, frozen=True):
    """A step of a kind of saga; ``undo``: of one that is taken back."""

    kind: str
    step: str
    undo: bool = False

    @property
    def phase(self) -> str:
        return f"undo-{self.step}" if self.undo else self.step


TARGETS: tuple[Target, ...] = (
    *(Target(kind, step.name) for kind, saga in SAGAS.items() for step in saga.steps),
    *(
        Target(kind, step.name, undo=True)
        for kind, saga in SAGAS.items()
        for step in saga.steps
        if step.undo is not None
    ),
)


class Aim:
    """``take`` is told of every event; ``spawn`` runs a client's call beside the fault."""

    def __init__(self, workload: Workload, ledger: Ledger) -> None:
        self._workload = workload
        self._ledger = ledger
        self._waiting: list[tuple[Target, asyncio.Future[Operation]]] = []

    def take(self, event: SimEvent) -> None:
        if not isinstance(event, Committed):
            return
        for kind, _, record in event.records:
            if kind is Operation and isinstance(record, Operation):
                self._arrived(record)

    async def at(
        self, target: Target, spawn: Callable[[Coroutine[Any, Any, None]], object]
    ) -> bool:
        """Have a saga come to ``target``; return whether it has, in time."""
        first = Target(target.kind, target.step)
        there = self._phase(first)
        spawn(_ASK[target.kind](self._workload))
        operation = await _in_time(there)
        if operation is None or not target.undo:
            return operation is not None
        there = self._phase(target)
        spawn(self._workload.client.cancel(operation.id))
        return await _in_time(there) is not None

    def _phase(self, target: Target) -> asyncio.Future[Operation]:
        came: asyncio.Future[Operation] = asyncio.get_running_loop().create_future()
        self._waiting.append((target, came))
        return came

    def _arrived(self, operation: Operation) -> None:
        for entry in list(self._waiting):
            target, came = entry
            if came.done() or (operation.kind, operation.phase) == (target.kind, target.phase):
                self._waiting.remove(entry)
                if not came.done():
                    came.set_result(operation)


async def _in_time(came: asyncio.Future[Operation]) -> Operation | None:
    try:
        async with asyncio.timeout(WAIT_LIMIT_S):
            return await came
    except TimeoutError:
        return None


_ASK: dict[str, Callable[[Workload], Coroutine[Any, Any, None]]] = {
    MIGRATE: Workload.migrate_one,
    DRAIN: Workload.drain_one,
}
