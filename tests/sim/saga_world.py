"""A small cluster in which one saga runs, and what disturbs it at a named step, undo or commit.

Owns how each saga of the product is set up; a new one joins by a row in SETUPS. Knows nothing of
what a saga does in between: that is read from its table of steps and from its record.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.drains import DRAIN
from controlplane.commands.migrations import MIGRATE
from controlplane.sagas.context import Act, Done, Outcome, Step, StepContext, StepFailed
from controlplane.sagas.workflows import SAGAS
from controlplane.services.context import Permission, Principal, Scope
from controlplane.services.drains import drain_node
from controlplane.services.migrations import migrate_vm
from controlplane.services.nodes import set_cordon
from controlplane.services.operations import cancel_operation
from controlplane.services.requests import CordonOrder, DrainOrder, MigrateOrder, NewVm
from controlplane.services.vms import act_on_vm, create_vm
from shared.errors import StateConflict
from shared.model import (
    BootSpec,
    DiskSpec,
    FinishedOperation,
    Operation,
    OperationState,
    Power,
    StepState,
    VmSpec,
)
from shared.problems import problem
from shared.states import OPERATION_ENDS, VmAction
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.invariants import Judge, Violation, everything_settles
from tests.sim.ledger import Committed, SimEvent
from tests.sim.node import SHARED_POOL
from tests.sim.process import adopt_by_context, outside
from tests.sim.replica import SimReplica
from tests.sim.virtual_loop import run_virtual

ADMIN = Principal("admin", frozenset(Permission), Scope())
OPEN = CordonOrder()
# Longer than any time limit of a step, with an election in between.
END_LIMIT_S = 300.0
SETTLE_LIMIT_S = 120.0
# A supervisor restarts a replica that died.
RESTART_S = 3.0
LOOK_S = 0.05
CALM_LOOKS = 40


class Kill(Struct, frozen=True):
    """The leader dies ``after_s`` a commit of the saga; the first one is its request."""

    at_commit: int
    after_s: float = 0.0


class SagaWorld:
    """``home`` is the node on which everything begins. Violations are raised where it waits."""

    def __init__(self) -> None:
        self._judge = Judge()
        self._violation: Violation | None = None
        self._kill: Kill | None = None
        self.ledger = self._judge.ledger
        self.cluster = SimCluster(
            ClusterSettings(replicas=3, nodes=2, held_up_share=0.0),
            random.Random(1),
            observe=self._observe,
        )
        self.home, self.away = self.cluster.nodes
        self.kind = ""
        self.history: list[Operation] = []
        self.commits = 0
        self.killed = 0

    async def start(self) -> None:
        await self.cluster.start()
        await self.cluster.until_ready()
        await self._cordon(self.away, cordoned=True)

    async def vm(self, name: str, *pools: str, power: Power = Power.RUNNING) -> str:
        """Return the id of a new VM at home, in that power."""
        disks = tuple(DiskSpec(name=f"d{i}", size_gib=1, pool=p) for i, p in enumerate(pools))
        boot = BootSpec(kernel="tiny-kernel")
        spec = VmSpec(vcpus=1, memory_mib=256, boot=boot, disks=disks)
        view = await create_vm(self.cluster.context(), ADMIN, NewVm(name=name, spec=spec))
        await self.until(lambda: view.id in self.ledger.finished)
        if power is Power.STOPPED:
            stop = await act_on_vm(self.cluster.context(), ADMIN, name, VmAction.STOP)
            await self.until(lambda: stop.id in self.ledger.finished)
        return view.target

    async def run(self, kind: str, kill: Kill | None) -> Operation:
        """Set a saga up, ask for it, and return its record once it has ended and all is at rest."""
        setup = SETUPS[kind]
        await self.start()
        target = await setup.prepare(self)
        await self._cordon(self.away, cordoned=False)
        self.kind, self._kill = kind, kill
        leader = self._leader()
        assert leader.process is not None, "it leads"
        # In the leader's process: it may die before it answers.
        leader.process.spawn(setup.ask(self, target), "request")
        await self.until(lambda: self.history and self.history[-1].id in self.ledger.finished)
        await self._rest()
        return self.history[-1]

    async def until(
        self,
        holds: Callable[[], object],
        limit_s: float = END_LIMIT_S,
        tell: Callable[[], object] | None = None,
    ) -> None:
        """Wait until something holds. Raises Violation, or AssertionError after ``limit_s``."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + limit_s
        while not holds():
            if self._violation is not None:
                raise self._violation
            assert loop.time() < end_s, tell() if tell else self.ledger.operations
            await asyncio.sleep(LOOK_S)

    async def _rest(self) -> None:
        """Wait until nothing is wrong, and for a while: what only passes through rest is not."""
        calm = 0

        def is_calm() -> bool:
            nonlocal calm
            calm = 0 if self.complaints() else calm + 1
            return calm >= CALM_LOOKS

        await self.until(is_calm, SETTLE_LIMIT_S, self.complaints)

    async def cancel(self) -> bool:
        """Ask for the saga to be cancelled; return whether that was accepted."""
        try:
            await cancel_operation(self.cluster.context(), ADMIN, self.history[-1].id)
        except StateConflict:
            return False
        return True

    def complaints(self) -> list[str]:
        found = [node.found() for node in self.cluster.nodes.values()]
        return list(everything_settles(self.ledger, found))

    def places(self) -> dict[str, tuple[str, str]]:
        """Return where each VM is, by name, and in which power."""
        nodes = {node.id: node.name for node in self.ledger.nodes.values()}
        return {
            vm.name: (nodes.get(vm.status.node or "", ""), vm.spec.power.value)
            for vm in self.ledger.vms.values()
        }

    def cordoned(self) -> list[str]:
        return [node.name for node in self.ledger.nodes.values() if node.cordoned]

    async def _cordon(self, name: str, *, cordoned: bool) -> None:
        await set_cordon(self.cluster.context(), ADMIN, name, OPEN, cordoned=cordoned)

    def _observe(self, event: SimEvent) -> None:
        """Judge an event; whoever caused it must not be the one that a complaint is raised to."""
        if self._violation is not None:
            return
        try:
            self._judge.take(event)
        except Violation as violation:
            self._violation = violation
        if isinstance(event, Committed) and self.kind:
            self._note(event)

    def _note(self, commit: Committed) -> None:
        """Keep the saga's record; count what is committed between its request and its end."""
        open_ones = [r for _, _, r in commit.records if isinstance(r, Operation)]
        ended = [e.operation for e in commit.history if isinstance(e, FinishedOperation)]
        known = len(self.history)
        for operation in (*open_ones, *ended):
            if operation.kind == self.kind and operation.parent is None:
                self.history.append(operation)
        over = self.history and self.history[-1].state in OPERATION_ENDS
        if not self.history or (over and known == len(self.history)):
            return
        self.commits += commit.changes_state
        if self._kill is not None and self.commits == self._kill.at_commit and not self.killed:
            self.killed += 1
            asyncio.get_running_loop().call_later(self._kill.after_s, self._kill_leader)

    def _leader(self) -> SimReplica:
        return next(
            replica
            for replica in self.cluster.replicas.values()
            if replica.control_plane is not None and replica.control_plane.leader.term is not None
        )

    def _kill_leader(self) -> None:
        replica = self._leader()
        replica.crash()
        asyncio.get_running_loop().call_later(RESTART_S, replica.start)


class Setup(Struct, frozen=True):
    """``prepare`` returns the saga's target; ``back`` are the names of VMs that an undo returns."""

    prepare: Callable[[SagaWorld], Awaitable[str]]
    ask: Callable[[SagaWorld, str], Coroutine[Any, Any, None]]
    back: tuple[str, ...] = ()


async def _one_vm(world: SagaWorld) -> str:
    return await world.vm("web", "default", SHARED_POOL)


async def _migrate(world: SagaWorld, target: str) -> None:
    await migrate_vm(world.cluster.context(), ADMIN, target, MigrateOrder())


async def _full_node(world: SagaWorld) -> str:
    await world.vm("web", "default")
    await world.vm("db", SHARED_POOL)
    await world.vm("rest", power=Power.STOPPED)
    await world.vm("kept", SHARED_POOL, power=Power.STOPPED)
    return world.home


async def _drain(world: SagaWorld, target: str) -> None:
    await drain_node(world.cluster.context(), ADMIN, target, DrainOrder())


SETUPS: dict[str, Setup] = {
    MIGRATE: Setup(_one_vm, _migrate, back=("web",)),
    DRAIN: Setup(_full_node, _drain),
}

# What disturbs a step: each makes another action (or undo) of one.

INJECTED = problem("injected", "a test has failed this step")
Wrap = Callable[[SagaWorld, Act], Act]
Disturb = Callable[[SagaWorld], AbstractContextManager[object]]


def undisturbed(world: SagaWorld) -> AbstractContextManager[object]:
    return nullcontext()


def at_step(kind: str, step: str, action: Wrap) -> Disturb:
    """Have a step of a saga act otherwise."""
    return lambda world: _changed(
        kind,
        lambda each: (
            replace(each, action=action(world, each.action)) if each.name == step else each
        ),
    )


def at_every_undo(kind: str, undo: Wrap) -> Disturb:
    return lambda world: _changed(
        kind,
        lambda each: each if each.undo is None else replace(each, undo=undo(world, each.undo)),
    )


def both(one: Disturb, other: Disturb) -> Disturb:
    @contextmanager
    def enter(world: SagaWorld) -> Iterator[None]:
        with one(world), other(world):
            yield

    return enter


def _changed(kind: str, change: Callable[[Step], Step]) -> AbstractContextManager[object]:
    saga = SAGAS[kind]
    return patch.dict(SAGAS, {kind: replace(saga, steps=tuple(map(change, saga.steps)))})


def twice(world: SagaWorld, act: Act) -> Act:
    """The engine looks again before what the first look answered is committed."""

    async def look_twice(context: StepContext) -> Outcome:
        await act(context)
        return await act(context)

    return look_twice


def fails_at_once(world: SagaWorld, act: Act) -> Act:
    return _fails_once(world, act, at_its_end=False)


def fails_after_its_effect(world: SagaWorld, act: Act) -> Act:
    return _fails_once(world, act, at_its_end=True)


def cancelled_at_once(asked: list[bool]) -> Wrap:
    return lambda world, act: _cancelled(world, act, asked, at_its_end=False)


def cancelled_at_its_end(asked: list[bool]) -> Wrap:
    return lambda world, act: _cancelled(world, act, asked, at_its_end=True)


def meanwhile(happens: Callable[[SagaWorld], Coroutine[Any, Any, None]]) -> Wrap:
    """Have something happen beside a step, from its first look on."""

    def beside(world: SagaWorld, act: Act) -> Act:
        begun: list[asyncio.Task[None]] = []

        async def look(context: StepContext) -> Outcome:
            if not begun:
                # Not in the leader's process: it may die meanwhile.
                begun.append(outside(happens(world), "meanwhile"))
            return await act(context)

        return look

    return beside


def _fails_once(world: SagaWorld, act: Act, *, at_its_end: bool) -> Act:
    failed: list[bool] = []

    async def fail(context: StepContext) -> Outcome:
        outcome = None if not at_its_end else await act(context)
        if not failed and (outcome is None or isinstance(outcome, Done)):
            failed.append(True)
            raise StepFailed(INJECTED)
        return outcome or await act(context)

    return fail


def _cancelled(world: SagaWorld, act: Act, asked: list[bool], *, at_its_end: bool) -> Act:
    async def cancel(context: StepContext) -> Outcome:
        outcome = None if not at_its_end else await act(context)
        if not asked and (outcome is None or isinstance(outcome, Done)):
            asked.append(await world.cancel())
        return outcome or await act(context)

    return cancel


class Played(Struct, frozen=True, kw_only=True):
    """How a saga ended: its record at last, every state of it before, and what is where."""

    ended: Operation
    history: tuple[Operation, ...]
    commits: int
    places: dict[str, tuple[str, str]]
    cordoned: list[str]
    killed: int

    @property
    def end(self) -> tuple[object, ...]:
        """What two runs of the same story have in common."""
        error = None if self.ended.error is None else self.ended.error.code
        steps = tuple(step.state for step in self.ended.steps)
        return (self.ended.state, error, steps, self.places, self.cordoned)

    @property
    def turned(self) -> bool:
        """Whether an undo found that its step had come to its end after all."""
        return any(
            before.undoing and not after.undoing
            for before, after in zip(self.history, self.history[1:], strict=False)
        )

    def check_undone(self, state: OperationState) -> None:
        """Assert that it ended in ``state``, and that every undo there is was done."""
        assert self.ended.state is state, self.ended
        for step in self.ended.steps:
            has_undo = SAGAS[self.ended.kind].step(step.name).undo is not None
            assert step.state is StepState.UNDONE or not has_undo or _untouched(step.state), step
        # A failure may leave a node closed; whoever cancels wants it as it was.
        assert state is not OperationState.CANCELLED or not self.cordoned
        for name in SETUPS[self.ended.kind].back:
            assert self.places[name][0] == "node-1"


def _untouched(state: StepState) -> bool:
    return state is StepState.PENDING


def play(kind: str, disturb: Disturb = undisturbed, kill: Kill | None = None) -> Played:
    """Play a saga from its request to rest."""

    async def story() -> Played:
        world = SagaWorld()
        with disturb(world):
            try:
                ended = await world.run(kind, kill)
            finally:
                await world.cluster.stop()
        return Played(
            ended=ended,
            history=tuple(world.history),
            commits=world.commits,
            places=world.places(),
            cordoned=world.cordoned(),
            killed=world.killed,
        )

    return run_virtual(story(), adopt_by_context)
