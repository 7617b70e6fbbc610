"""Empties a node: cordons it, moves what runs there away, lets what rests there go.

Level-triggered: each look at the node asks what is still there and what is to be done next about
it, whoever began it. The node counts as drained only when nothing of any VM is left on it.
"""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from msgspec import Struct

from controlplane.commands.drains import (
    DRAIN,
    cancel_moves,
    cordon_for,
    drained,
    journal_of,
    move_vm,
    note_left,
    uncordon_again,
)
from controlplane.commands.migrations import MOVABLE_PHASES
from controlplane.commands.sagas import is_past_return, unchanged
from controlplane.sagas.context import (
    Done,
    Outcome,
    Saga,
    Step,
    StepContext,
    StepFailed,
    Waits,
    Writes,
)
from controlplane.sagas.migrate import MIGRATION
from controlplane.sagas.release import let_go, stays_after_all
from controlplane.scheduler.moves import move_request, shared_pools
from controlplane.scheduler.place import plan
from controlplane.scheduler.snapshot import Snapshot
from shared.errors import FieldError
from shared.model import AttemptState, FinishedOperation, Node, Operation, Problem, Vm
from shared.moves import DrainJournal, DrainTry, VmLeft
from shared.problems import problem
from shared.states import vm_phase

# Parameters.

# As many as the cluster moves at once: more would only wait, and be planned on an old picture.
MOVES_AT_ONCE = 5
TRIES_MAX = 3
RETRY_FIRST = timedelta(seconds=20)
# What is cancelled ends within seconds, unless a node of it is away: then whoever cancels the drain
# gets the node back, and the migration ends once it can be told where its guest is.
RECALL_LIMIT = timedelta(seconds=60)
# Asking again changes nothing about these.
TERMINAL = frozenset({"unschedulable", "migration_blocked", "guest_ended", "cancelled"})

# The actions and undos, in the order of the steps.


async def _cordon(context: StepContext) -> Outcome:
    return Done(cordon_for)


async def _uncordon(context: StepContext) -> Outcome:
    return Done(uncordon_again)


async def _evacuate(context: StepContext) -> Outcome:
    """Do the next thing about one VM that is still there."""
    operation = context.operation
    node = context.state.nodes[operation.target].record
    vms = [context.state.vms[vm_id].record for vm_id in sorted(context.state.vm_ids_on(node.id))]
    if not vms:
        return Done(drained)
    snapshot = context.parts.capacity.current()
    at_rest = await context.parts.offload(lambda: [fate_at_rest(node, vm, snapshot) for vm in vms])
    judged = [(vm, _judge(context, node, vm, fate)) for vm, fate in zip(vms, at_rest, strict=True)]
    under_way = sum(fate.kind is FateKind.WAIT for _, fate in judged)
    for vm, fate in judged:
        if fate.kind is FateKind.MOVE and under_way < MOVES_AT_ONCE:
            return Writes(move_vm(vm.id, MIGRATION.names, MIGRATION.no_return))
    for vm, fate in judged:  # after the moves: a node that is asked may be slow to answer
        if fate.kind is FateKind.RELEASE:
            return await let_go(context, vm, fate.new_node)
    left = tuple(
        VmLeft(vm=vm.id, name=vm.name, reason=fate.reason)
        for vm, fate in judged
        if fate.kind is FateKind.STAY
    )
    if left and (unheard := context.unheard()):
        return Waits(f"{unheard} may yet be heard, and take what is left")
    if left != journal_of(operation).left:
        return Writes(note_left(left))
    if len(left) < len(vms):
        return Waits(f"{len(vms) - len(left)} VMs are on their way")
    raise StepFailed(_incomplete(node, left))


async def _recall(context: StepContext) -> Outcome:
    """Cancel the migrations that can be; what has switched is not taken back."""
    tries = journal_of(context.operation).tries
    stored = [context.state.operations.get(attempt.operation) for attempt in tries]
    open_ones = [each.record for each in stored if each is not None]
    if any(not child.undoing and not is_past_return(child) for child in open_ones):
        return Writes(cancel_moves)
    if open_ones and not context.is_over_limit(RECALL_LIMIT):
        return Waits("its migrations end")
    return Done(unchanged)


# The workflow.

DRAINING = Saga(
    kind=DRAIN,
    steps=(
        Step(name="cordon", action=_cordon, undo=_uncordon),
        Step(name="evacuate", action=_evacuate, undo=_recall),
    ),
)

# What is to become of each VM.


class FateKind(enum.Enum):
    """MOVE: live. RELEASE: let go, at rest. WAIT: something is under way. STAY: cannot leave."""

    MOVE = "move"
    RELEASE = "release"
    WAIT = "wait"
    STAY = "stay"


class Fate(Struct, frozen=True):
    """``new_node``: where a VM with disks is bound once it is let go of."""

    kind: FateKind
    reason: str = ""
    new_node: str | None = None


def _judge(context: StepContext, node: Node, vm: Vm, at_rest: Fate | None) -> Fate:
    """Return what is to be done next about a VM of which the node holds something."""
    journal = journal_of(context.operation)
    if vm.status.node == node.id and vm.id in journal.skip:
        return Fate(FateKind.STAY, "it was to be skipped")
    if at_rest is not None:
        return _unless_refused(journal, vm, at_rest)
    return _fate_after_tries(context, journal, vm)


def fate_at_rest(node: Node, vm: Vm, snapshot: Snapshot) -> Fate | None:
    """Return what becomes of a VM that is not running there; None for one that is to be moved."""
    if vm.status.node != node.id or vm.status.migration is not None or vm.deleting:
        return Fate(FateKind.WAIT)
    if vm_phase(vm) in MOVABLE_PHASES:
        return None
    attempt = vm.status.attempt
    if attempt is not None and attempt.state is not AttemptState.ENDED:
        return Fate(FateKind.WAIT)
    if node.inventory is None or node.inventory.migration is None:
        return Fate(
            FateKind.STAY,
            "its node's agent is of an older release and cannot be told to let go of it: upgrade "
            "the agent",
        )
    shared = shared_pools(node)
    local = [disk.name for disk in vm.spec.disks if disk.pool not in shared]
    if local:
        return Fate(
            FateKind.STAY,
            f"it is {vm_phase(vm).value} and has its disk {local[0]} on this node: start it, so "
            "that it can be moved live, or delete it",
        )
    if not vm.spec.disks:
        return Fate(FateKind.RELEASE)
    new_node = plan(snapshot.without(vm), move_request(vm, node)).node
    if new_node is None:
        return Fate(FateKind.STAY, "no other node that sees its disks can take it")
    return Fate(FateKind.RELEASE, new_node=new_node)


def _fate_after_tries(context: StepContext, journal: DrainJournal, vm: Vm) -> Fate:
    attempt = next((each for each in journal.tries if each.vm == vm.id), None)
    if attempt is None:
        return Fate(FateKind.MOVE)
    ended = _ended(context, attempt)
    code = "" if ended is None or ended.error is None else ended.error.code
    reason = "its migration failed" if ended is None or ended.error is None else _told(ended.error)
    if attempt.count >= TRIES_MAX or code in TERMINAL:
        return Fate(FateKind.STAY, reason)
    due = attempt.at + RETRY_FIRST * 2 ** (attempt.count - 1)
    return Fate(FateKind.MOVE if due <= _now(context) else FateKind.WAIT, reason)


def _ended(context: StepContext, attempt: DrainTry) -> Operation | None:
    """Return a migration that has ended, as long as it is in etcd's part of history."""
    state = context.state
    for seq in range(state.last_seq, state.last_seq - len(state.history), -1):
        entry = state.history.get(seq)
        if isinstance(entry, FinishedOperation) and entry.operation.id == attempt.operation:
            return entry.operation
    return None


def _told(error: Problem) -> str:
    reasons = "; ".join(
        f"{each.pointer.rpartition('/')[2]}: {each.message}" for each in error.errors
    )
    return f"{error.detail}: {reasons}" if reasons else error.detail


def _unless_refused(journal: DrainJournal, vm: Vm, fate: Fate) -> Fate:
    """Return a fate, unless it is to be let go to a node that was asked and does not take it."""
    why = stays_after_all(journal, vm) if fate.kind is FateKind.RELEASE else ""
    return Fate(FateKind.STAY, why) if why else fate


def _now(context: StepContext) -> datetime:
    return context.parts.clock.now()


def _incomplete(node: Node, left: tuple[VmLeft, ...]) -> Problem:
    errors = tuple(FieldError(f"/vms/{each.name}", "left", each.reason) for each in left)
    return problem(
        "drain_incomplete",
        f"{len(left)} VMs are left on {node.name!r}, which stays cordoned",
        errors,
    )
