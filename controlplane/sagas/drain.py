"""Empties a node: cordons it, moves what runs there away, lets what rests there go.

Level-triggered: each look at the node asks what is still there and what is to be done next about
it, whoever began it. The node counts as drained only when nothing of any VM is left on it.
"""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.drains import (
    DRAIN,
    cancel_moves,
    cordon_for,
    drained,
    journal_of,
    move_vm,
    note_ends,
    note_left,
    uncordon_again,
)
from controlplane.commands.migrations import MOTIONLESS, MOVABLE_PHASES
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
from shared.model import (
    AttemptState,
    FinishedOperation,
    Node,
    NodeState,
    Power,
    Problem,
    Vm,
)
from shared.moves import DrainJournal, DrainTry, MigrationClaim, VmLeft
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
# Asking again changes nothing about these. A guest that ended is started anew, and tried again.
TERMINAL = frozenset({"unschedulable", "migration_blocked", "cancelled"})
# What is on its way says so many times a minute. Who is still there is written down once nothing
# has been for so long: that is no longer news in passing, and six writes a minute at most.
QUIET_BEFORE_TOLD = timedelta(seconds=10)
# The drain's record holds a reason for each VM; one that names every node of a large cell would
# make it too large to be stored.
REASON_CHARS_MAX = 400
# What is undone is through its stages in seconds.
STANDS_AFTER = timedelta(seconds=60)
# Five crashes in a row are held back for half a minute in all, and each further one for longer than
# all before it together, up to five minutes: what does not stay up by then is not about to.
CRASHES_MAX = 5
# From the moment a start is due: a permit, and a guest that comes up, take seconds.
RESTART_GRACE = timedelta(seconds=30)

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
    if ends := _new_ends(context, node, vms):
        return Writes(note_ends(ends))
    snapshot, now = context.parts.capacity.current(), _now(context)
    at_rest = await context.parts.offload(
        lambda: [fate_at_rest(node, vm, snapshot, now) for vm in vms]
    )
    judged = [(vm, _judge(context, node, vm, fate)) for vm, fate in zip(vms, at_rest, strict=True)]
    under_way = sum(_is_moving_away(context, node, vm) for vm in vms)
    for vm, fate in judged:
        if fate.kind is FateKind.MOVE and under_way < MOVES_AT_ONCE:
            return Writes(move_vm(vm.id, MIGRATION.names, MIGRATION.no_return))
    for vm, fate in judged:  # after the moves: a node that is asked may be slow to answer
        if fate.kind is FateKind.RELEASE:
            return await let_go(context, vm, fate.new_node)
    return _what_is_left(context, node, judged)


def _what_is_left(context: StepContext, node: Node, judged: list[tuple[Vm, Fate]]) -> Outcome:
    """Tell of the VMs that are still there. Raises StepFailed once none of them can leave."""
    staying = [vm for vm, fate in judged if fate.kind is FateKind.STAY]
    if staying and (unheard := context.unheard()):
        return Waits(f"{unheard} may yet be heard, and take what is left")
    left = tuple(
        VmLeft(vm=vm.id, name=vm.name, reason=fate.reason) for vm, fate in judged if fate.reason
    )
    is_final = len(staying) == len(judged)
    is_quiet = _now(context) - context.operation.updated_at >= QUIET_BEFORE_TOLD
    if left != journal_of(context.operation).left and (is_final or is_quiet):
        return Writes(note_left(left))
    if is_final:
        raise StepFailed(_incomplete(node, left))
    return Waits(f"{len(judged) - len(staying)} VMs are on their way")


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
    """MOVE: live. RELEASE: let go, at rest. WAIT: it may leave yet. STAY: it cannot leave."""

    MOVE = "move"
    RELEASE = "release"
    WAIT = "wait"
    STAY = "stay"


class Fate(Struct, frozen=True):
    """``new_node``: where a VM with disks is bound once it is let go of.

    ``reason`` says why one stays, or what it waits for when that may take long.
    """

    kind: FateKind
    reason: str = ""
    new_node: str | None = None


def _judge(context: StepContext, node: Node, vm: Vm, at_rest: Fate | None) -> Fate:
    """Return what is to be done next about a VM of which the node holds something."""
    journal = journal_of(context.operation)
    here = vm.status.node == node.id
    if here and vm.id in journal.skip:
        return Fate(FateKind.STAY, "it was to be skipped")
    if vm.status.unproven is not None:
        return Fate(FateKind.WAIT, "where it is has not been known since the cluster was restored")
    if vm.deleting:
        return Fate(FateKind.WAIT, "it is being deleted")
    if vm.status.migration is not None:
        return Fate(FateKind.WAIT, _why_no_end(context, vm.status.migration))
    if not here:
        return Fate(FateKind.WAIT, "moved; what is left of it here could not be removed yet")
    if at_rest is not None:
        return _unless_refused(journal, vm, at_rest)
    return _fate_after_tries(context, journal, vm)


def fate_at_rest(node: Node, vm: Vm, snapshot: Snapshot, now: datetime) -> Fate | None:
    """Return what becomes of a VM that is not running there; None for one that is to be moved."""
    elsewhere = vm.status.node != node.id or vm.status.unproven is not None
    if elsewhere or vm.status.migration is not None or vm.deleting:
        return Fate(FateKind.WAIT)
    if vm_phase(vm) in MOVABLE_PHASES:
        return None
    attempt = vm.status.attempt
    if attempt is not None and attempt.state is not AttemptState.ENDED:
        return Fate(FateKind.WAIT, f"it is {vm_phase(vm).value}")
    if node.inventory is None or node.inventory.migration is None:
        return Fate(
            FateKind.STAY,
            "its node's agent is of an older release and cannot be told to let go of it: upgrade "
            "the agent",
        )
    shared = shared_pools(node)
    local = [disk.name for disk in vm.spec.disks if disk.pool not in shared]
    if local:
        return _fate_with_local_disk(vm, local[0], now)
    if not vm.spec.disks:
        return Fate(FateKind.RELEASE)
    new_node = plan(snapshot.without(vm), move_request(vm, node)).node
    if new_node is None:
        return Fate(FateKind.STAY, "no other node that sees its disks can take it")
    return Fate(FateKind.RELEASE, new_node=new_node)


def _fate_with_local_disk(vm: Vm, disk: str, now: datetime) -> Fate:
    """Only running it can leave: one that is wanted running is about to, for a while."""
    has = f"it is {vm_phase(vm).value} and has its disk {disk} on this node"
    if vm.spec.power is Power.STOPPED:
        return Fate(FateKind.STAY, f"{has}: start it, so that it can be moved live, or delete it")
    due = max(vm.updated_at, vm.status.not_before or vm.updated_at)
    if vm.status.crashes <= CRASHES_MAX and now < due + RESTART_GRACE:
        return Fate(FateKind.WAIT, f"{has}: it is moved once it runs again")
    return Fate(
        FateKind.STAY, f"{has}: see why it does not stay up, so that it can be moved, or delete it"
    )


def _why_no_end(context: StepContext, claim: MigrationClaim) -> str:
    """Return what an open migration waits for; empty when it only takes its time."""
    away = [each for each in (claim.source, claim.destination) if each and _is_away(context, each)]
    nodes = context.state.nodes
    names = [nodes[each].record.name if each in nodes else each for each in away]
    if away:
        return f"its migration waits for node {' and '.join(names)}, which is away"
    stored = context.state.operations.get(claim.operation)
    stands = stored is not None and claim.stage in MOTIONLESS
    if stored is not None and stands and _now(context) - stored.record.updated_at > STANDS_AFTER:
        return (
            f"its migration ({claim.operation}) stands at {claim.stage.value!r}: see whether the "
            "libvirtd of both of its nodes answers"
        )
    return ""


def _is_moving_away(context: StepContext, node: Node, vm: Vm) -> bool:
    """Whether a VM is one of those that move at once.

    One whose destination is away, or that is undone, moves nothing, for days perhaps. While the
    drained node itself is away nothing moves at all, and what was begun counts: nothing is gained
    by beginning more.
    """
    claim = vm.status.migration
    if claim is None or vm.status.node != node.id or claim.stage in MOTIONLESS:
        return False
    return claim.destination is None or not _is_away(context, claim.destination)


def _is_away(context: StepContext, node_id: str) -> bool:
    stored = context.state.nodes.get(node_id)
    return stored is None or stored.record.state is not NodeState.READY


def _fate_after_tries(context: StepContext, journal: DrainJournal, vm: Vm) -> Fate:
    attempt = next((each for each in journal.tries if each.vm == vm.id), None)
    if attempt is None:
        return Fate(FateKind.MOVE)
    if attempt.ended_at is None:
        return Fate(FateKind.WAIT)  # it has let go of the VM, and ends with its next commit
    reason = attempt.detail or "its migration failed"
    if attempt.count >= TRIES_MAX or attempt.code in TERMINAL:
        return Fate(FateKind.STAY, reason)
    due = attempt.ended_at + RETRY_FIRST * 2 ** (attempt.count - 1)
    if due <= _now(context):
        return Fate(FateKind.MOVE)
    return Fate(FateKind.WAIT, f"{reason}; it is tried again")


# How the migrations that it has asked for have ended.


def _new_ends(context: StepContext, node: Node, vms: list[Vm]) -> tuple[DrainTry, ...]:
    """Return the tries that have ended since the last look, and have left their VM here."""
    here = {vm.id for vm in vms if vm.status.node == node.id}
    return tuple(
        _ended(context, each)
        for each in journal_of(context.operation).tries
        if each.vm in here
        and each.ended_at is None
        and each.operation not in context.state.operations
    )


def _ended(context: StepContext, attempt: DrainTry) -> DrainTry:
    """Return a try with its end: as history tells it, unless nobody has led for very long."""
    state = context.state
    for seq in range(state.last_seq, state.last_seq - len(state.history), -1):
        entry = state.history.get(seq)
        if isinstance(entry, FinishedOperation) and entry.operation.id == attempt.operation:
            error, ended_at = entry.operation.error, entry.operation.updated_at
            if error is None:
                return replace(attempt, ended_at=ended_at)
            detail = shortened(_told(error), attempt.operation)
            return replace(attempt, ended_at=ended_at, code=error.code, detail=detail)
    return replace(attempt, ended_at=_now(context))


def shortened(told: str, operation_id: str) -> str:
    if len(told) <= REASON_CHARS_MAX:
        return told
    return f"{told[:REASON_CHARS_MAX]}... (all of it: novacron op show {operation_id})"


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
