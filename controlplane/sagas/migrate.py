"""Moves a running VM to another node, live.

The claim in the VM's record tells both nodes what to do, stage by stage; their reports say what
has become of it. Whether the guest has moved is read from both ends (``matrix.py``), never from a
return code, and only then the VM changes its owner. Nothing here acts on a node.
"""

from __future__ import annotations

from datetime import timedelta

from msgspec.structs import replace

from controlplane.commands.migrations import (
    MIGRATE,
    admit,
    claim_destination,
    close_claim,
    drop_claim,
    no_slot,
    switch,
    to_stage,
)
from controlplane.commands.sagas import unchanged
from controlplane.sagas.context import (
    Done,
    Outcome,
    Saga,
    Step,
    StepContext,
    StepFailed,
    Turned,
    Waits,
    Writes,
)
from controlplane.sagas.matrix import Verdict, verdict
from controlplane.sagas.preflight import blockers_of
from controlplane.scheduler.moves import copied_disks, move_request
from controlplane.scheduler.place import Candidate, explain, plan
from controlplane.scheduler.snapshot import Snapshot
from shared.errors import FieldError, NodeUnreachable, NovacronError
from shared.model import AttemptState, Node, NodeState, ObservedPower, Operation, Power, Problem, Vm
from shared.moves import EndState, MigrationClaim, MigrationJournal, MigrationStage
from shared.problems import problem
from shared.protocol import MigrationReport

# Parameters.

# Both agents answer reads within a second; one that cannot for so long will not carry a migration.
PRECHECK_LIMIT = timedelta(seconds=60)
# Making empty disks takes seconds on a slow pool.
PREPARE_LIMIT = timedelta(seconds=120)
# After the switch the source ends within two seconds. One that cannot be asked is swept later.
FINALIZE_LIMIT = timedelta(seconds=30)
# A destination that was only made ready is cleaned in a second; one that is away, later.
CLEAN_LIMIT = timedelta(seconds=30)

# The actions and undos, in the order of the steps.


async def _admit(context: StepContext) -> Outcome:
    """Choose the destination, and wait for a slot on both nodes."""
    vm, claim = _running(context)
    chosen = await _choose(context, vm, claim)
    if isinstance(chosen, Waits):
        return chosen
    return Done(admit(chosen, context.parts.limits))


async def _precheck(context: StepContext) -> Outcome:
    """Ask both nodes what stands against it, and name all of it at once."""
    vm, claim = _running(context)
    assert claim.destination is not None, "it was admitted"
    try:
        blockers = await _blockers(context, vm, claim.source, claim.destination)
    except NodeUnreachable as unreachable:
        if context.is_over_limit(PRECHECK_LIMIT):
            raise StepFailed(problem("node_unreachable", str(unreachable))) from unreachable
        return Waits(str(unreachable))
    if blockers:
        raise StepFailed(_blocked(vm, blockers))
    return Done(unchanged)


async def _claim(context: StepContext) -> Outcome:
    """Give out the generation under which the guest will run on the destination."""
    vm, claim = _running(context)
    assert claim.destination is not None, "it was admitted"
    if vm.request is not None and vm.request.number > vm.status.answered_request:
        # From now on its node only takes part in the migration: nothing else would be done.
        if context.is_over_limit(PRECHECK_LIMIT):
            detail = f"the guest's {vm.request.kind.value} has not been carried out in time"
            raise StepFailed(problem("request_pending", detail, retryable=True))
        return Waits(f"the guest's {vm.request.kind.value} is carried out first")
    candidate = _explain(context, context.parts.capacity.current(), vm, claim.destination)
    if not candidate.fits and _journal(context.operation).requested is not None:
        return await _nowhere(context, vm, [candidate])
    if not candidate.fits:
        return await _choose_again(context, vm, claim)
    copied = copied_disks(vm, _node(context, claim.source), _node(context, claim.destination))
    return Done(claim_destination(context.parts.capacity.check_move, copied))


async def _prepare(context: StepContext) -> Outcome:
    """Wait until the destination has made disks, and opened its relay to the source."""
    vm, claim = _claimed(context)
    report = _report(context, vm, claim, claim.destination)
    if report is not None and report.stage is MigrationStage.PREPARE:
        if report.fault is not None:
            raise StepFailed(report.fault)
        if report.settled:
            return Done(to_stage(MigrationStage.TRANSFER))
    if context.is_over_limit(PREPARE_LIMIT):
        raise StepFailed(
            problem("destination_not_ready", "the destination has not made ready in time")
        )
    return Waits("the destination makes ready")


async def _undo_prepare(context: StepContext) -> Outcome:
    """Have the destination leave nothing; nobody was told to go there, so it may do so later."""
    vm, claim = _claimed(context)
    assert claim.destination is not None, "it was claimed"
    if claim.stage is MigrationStage.RESUME:
        return Done(unchanged)  # cleaned while the transfer was undone
    if claim.stage is not MigrationStage.CLEAN:
        return Writes(to_stage(MigrationStage.CLEAN))
    report = _report(context, vm, claim, claim.destination)
    if report is not None and report.stage is MigrationStage.CLEAN and report.settled:
        return Done(unchanged)
    away = not context.nodes.trusts(claim.destination) and context.is_over_limit(CLEAN_LIMIT)
    if away or _has_only_files(report, MigrationStage.CLEAN):
        return Done(to_stage(MigrationStage.CLEAN, unclean=True))
    return Waits("the destination cleans up")


async def _transfer(context: StepContext) -> Outcome:
    """Wait until both ends say where the guest is."""
    vm, claim = _claimed(context)
    source, destination = _ends(context, vm, claim)
    if verdict(source, destination) is Verdict.SWITCHED:
        return Done(unchanged)
    if claim.stage is MigrationStage.TRANSFER:
        report = _report(context, vm, claim, claim.source)
        if report is not None and report.stage is claim.stage and report.over:
            return Writes(to_stage(MigrationStage.LOOK))
        _check_may_begin(context, claim, report)
        return Waits("the guest is moved")
    source, destination = _fresh_ends(context, vm, claim)
    decided = verdict(source, destination)
    if decided is Verdict.WAIT:
        return Waits(f"source {source.value}, destination {destination.value}")
    if decided is Verdict.LOST:
        raise StepFailed(problem("guest_ended", "the guest ended while it was moved"))
    raise StepFailed(_failure(context, vm, claim))


async def _undo_transfer(context: StepContext) -> Outcome:
    """End the transfer; what has switched meanwhile is no longer undone."""
    vm, claim = _claimed(context)
    if _has_switched(context, vm, claim):
        return Turned(unchanged)
    stage, source, destination = claim.stage, claim.source, claim.destination
    if stage is MigrationStage.TRANSFER:
        return Writes(to_stage(MigrationStage.ABORT))
    if stage is MigrationStage.ABORT:
        report = _report(context, vm, claim, source)
        over = report is not None and report.stage is stage and report.over
        return Writes(to_stage(MigrationStage.LOOK)) if over else Waits("the source ends its job")
    if stage is MigrationStage.LOOK:
        decided = verdict(*_fresh_ends(context, vm, claim))
        if decided in (Verdict.STAYED, Verdict.LOST):
            return Writes(to_stage(MigrationStage.CLEAN))
        return Waits("nobody can tell yet where the guest is")
    asked = destination if stage is MigrationStage.CLEAN else source
    report = _report(context, vm, claim, asked)
    if _has_only_files(report, MigrationStage.CLEAN):
        return Writes(to_stage(MigrationStage.RESUME, unclean=True))
    if report is None or report.stage is not stage or not report.settled:
        return Waits(f"a node has not answered the stage {stage.value} yet")
    if stage is MigrationStage.CLEAN:
        return Writes(to_stage(MigrationStage.RESUME))
    return Done(unchanged)


async def _switch(context: StepContext) -> Outcome:
    """Make the destination the owner."""
    vm, claim = _claimed(context)
    report = _report(context, vm, claim, claim.destination)
    waits = report is not None and report.end is EndState.READY
    return Done(switch(ObservedPower.PAUSED if waits else ObservedPower.RUNNING))


async def _finalize(context: StepContext) -> Outcome:
    """Wait until the source has nothing left, and the guest is seen to go on.

    A source that cannot be asked is swept later.
    """
    vm, claim = _claimed(context)
    report = _report(context, vm, claim, claim.source)
    swept = report is not None and report.stage is MigrationStage.FINALIZE and report.settled
    figures = None if report is None else report.figures
    # A strict one is resumed by its new owner, which has just been told.
    goes_on = vm.spec.power is not Power.RUNNING or vm.status.power_seen is not ObservedPower.PAUSED
    if (swept and goes_on) or context.is_over_limit(FINALIZE_LIMIT):
        empty = _has_only_files(report, MigrationStage.FINALIZE)
        return Done(close_claim(figures, swept=swept, empty=empty))
    return Waits("the source cleans up, and the guest goes on")


async def _undo_admit(context: StepContext) -> Outcome:
    return Done(drop_claim)


# The workflow.

MIGRATION = Saga(
    kind=MIGRATE,
    steps=(
        Step(name="admit", action=_admit, undo=_undo_admit),
        Step(name="precheck", action=_precheck, why="it only reads"),
        Step(name="claim", action=_claim, why="the claim itself ends with the undo of admit"),
        Step(name="prepare", action=_prepare, undo=_undo_prepare),
        Step(name="transfer", action=_transfer, undo=_undo_transfer),
        Step(
            name="switch",
            action=_switch,
            why="the guest runs on its new node, and its disks have been written there",
            no_return=True,
        ),
        Step(
            name="finalize", action=_finalize, why="what is left of the old node goes, in the end"
        ),
    ),
)

# What the steps have in common.


async def _choose(context: StepContext, vm: Vm, claim: MigrationClaim) -> str | Waits:
    """Return the best node that has a slot. Raises StepFailed when none can take the VM."""
    snapshot = context.parts.capacity.current()
    wanted = _journal(context.operation).requested
    candidates = (
        list(await _plan(context, snapshot, vm))
        if wanted is None
        else [_explain(context, snapshot, vm, wanted)]
    )
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return await _nowhere(context, vm, candidates)
    others = [each for each in _claims(context) if each.operation != context.operation.id]
    full = ""
    for candidate in fitting:
        full = no_slot(
            others,
            claim.source,
            candidate.node,
            context.parts.limits,
            lambda node_id: _node(context, node_id).state is NodeState.READY,
        )
        if not full:
            return candidate.node
    return Waits(full)


async def _choose_again(context: StepContext, vm: Vm, claim: MigrationClaim) -> Outcome:
    """Book another node, and ask it too: the one that was chosen has been filled meanwhile."""
    chosen = await _choose(context, vm, claim)
    if isinstance(chosen, Waits):
        return chosen
    blockers = await _blockers(context, vm, claim.source, chosen)
    if blockers:
        raise StepFailed(_blocked(vm, blockers))
    return Writes(admit(chosen, context.parts.limits))


async def _blockers(
    context: StepContext, vm: Vm, source_id: str, destination_id: str
) -> tuple[FieldError, ...]:
    return await blockers_of(
        context.nodes.ask,
        context.operation.id,
        vm,
        _node(context, source_id),
        _node(context, destination_id),
    )


async def _refused(
    context: StepContext, vm: Vm, wanted: str | None, candidates: list[Candidate]
) -> Problem:
    """Return why no node will do; a node that was asked for also tells what it holds against it."""
    refusal = _unschedulable(vm, candidates)
    if wanted is None or vm.status.node in (None, wanted):
        return refusal
    try:
        more = await _blockers(context, vm, _source(context, vm).id, wanted)
    except NovacronError:
        return refusal  # that it cannot be asked is among the reasons
    return replace(refusal, errors=(*refusal.errors, *more))


def _claimed(context: StepContext) -> tuple[Vm, MigrationClaim]:
    """Return the VM and its claim. Raises StepFailed when the claim is not this operation's."""
    stored = context.state.vms.get(context.operation.target)
    claim = None if stored is None else stored.record.status.migration
    if stored is None or claim is None or claim.operation != context.operation.id:
        raise StepFailed(problem("claim_lost", "the VM is no longer claimed by this migration"))
    return stored.record, claim


def _running(context: StepContext) -> tuple[Vm, MigrationClaim]:
    """Return the VM and its claim. Raises StepFailed when there is no guest (any more) to move."""
    vm, claim = _claimed(context)
    attempt = vm.status.attempt
    if attempt is None or attempt.state is not AttemptState.RUNNING:
        raise StepFailed(problem("guest_ended", "the guest ended before it was moved"))
    return vm, claim


def _has_only_files(report: MigrationReport | None, stage: MigrationStage) -> bool:
    """Whether a node has told in a stage that it has no guest, and cannot remove all else."""
    return (
        report is not None
        and report.stage is stage
        and report.end is EndState.ABSENT
        and report.fault is not None
        and not report.settled
    )


def _report(
    context: StepContext, vm: Vm, claim: MigrationClaim, node_id: str | None
) -> MigrationReport | None:
    """Return what a node tells of this very claim, while it can be asked."""
    if node_id is None or not context.nodes.trusts(node_id):
        return None
    report = context.nodes.migration_report(vm.id, node_id)
    return report if report is not None and report.generation == claim.generation else None


def _ends(context: StepContext, vm: Vm, claim: MigrationClaim) -> tuple[EndState, EndState]:
    """Return the newest that both ends have told, however old: only "it runs there" keeps."""
    source = _report(context, vm, claim, claim.source)
    destination = _report(context, vm, claim, claim.destination)
    return (
        EndState.UNKNOWN if source is None else source.end,
        EndState.UNKNOWN if destination is None else destination.end,
    )


def _has_switched(context: StepContext, vm: Vm, claim: MigrationClaim) -> bool:
    """Whether the guest is the destination's, although its migration is being undone.

    Once the destination was told to leave nothing of what never ran there, what it told before that
    may be gone: then it has the guest only if it says that the guest has run.
    """
    source, destination = _ends(context, vm, claim)
    cleans = claim.stage in (MigrationStage.CLEAN, MigrationStage.RESUME)
    if cleans and destination not in (EndState.RUNNING, EndState.DOWN):
        return False
    return verdict(source, destination) is Verdict.SWITCHED


def _fresh_ends(context: StepContext, vm: Vm, claim: MigrationClaim) -> tuple[EndState, EndState]:
    """Return what both ends have seen since the present stage was written; UNKNOWN until then."""
    found = []
    for node_id in (claim.source, claim.destination):
        report = _report(context, vm, claim, node_id)
        fresh = report is not None and report.stage is claim.stage
        found.append(report.end if fresh and report is not None else EndState.UNKNOWN)
    return found[0], found[1]


async def _plan(context: StepContext, snapshot: Snapshot, vm: Vm) -> tuple[Candidate, ...]:
    """Plan over all nodes; in a large cell that takes too long for the leader's loop."""
    request = move_request(vm, _source(context, vm))
    decision = await context.parts.offload(lambda: plan(snapshot.without(vm), request))
    return decision.candidates


def _explain(context: StepContext, snapshot: Snapshot, vm: Vm, node_id: str) -> Candidate:
    if node_id not in snapshot.nodes:
        raise StepFailed(problem("not_found", f"there is no node {node_id} any more"))
    return explain(snapshot.without(vm), move_request(vm, _source(context, vm)), node_id)


def _source(context: StepContext, vm: Vm) -> Node:
    assert vm.status.node is not None, "what moves is bound"
    return _node(context, vm.status.node)


def _node(context: StepContext, node_id: str) -> Node:
    stored = context.state.nodes.get(node_id)
    if stored is None:
        raise StepFailed(problem("not_found", f"there is no node {node_id} any more"))
    return stored.record


def _claims(context: StepContext) -> list[MigrationClaim]:
    vms = (context.state.vms[vm_id].record for vm_id in context.state.claimed_vm_ids())
    claims = (vm.status.migration for vm in vms)
    return [claim for claim in claims if claim is not None]


def _journal(operation: Operation) -> MigrationJournal:
    assert isinstance(operation.saga, MigrationJournal), "a migration's journal"
    return operation.saga


def _check_may_begin(
    context: StepContext, claim: MigrationClaim, report: MigrationReport | None
) -> None:
    """Raise StepFailed when a source that has not begun will never come to it.

    Should it have begun after all, the undo finds that out.
    """
    assert claim.destination is not None, "it was claimed"
    destination = _node(context, claim.destination)
    if destination.boot_id != claim.boot_id:
        raise StepFailed(
            problem("destination_not_ready", f"{destination.name!r} has booted meanwhile")
        )
    idle = report is not None and report.end in (EndState.RUNNING, EndState.HELD)
    if idle and context.is_over_limit(PREPARE_LIMIT):
        raise StepFailed(
            problem("destination_not_ready", "the source was never told where to move the guest")
        )


def _failure(context: StepContext, vm: Vm, claim: MigrationClaim) -> Problem:
    report = _report(context, vm, claim, claim.source)
    if report is not None and report.fault is not None:
        return report.fault
    return problem("migration_failed", "the guest has not moved; it is where it was")


async def _nowhere(context: StepContext, vm: Vm, candidates: list[Candidate]) -> Waits:
    """Wait for nodes that may yet be heard. Raises StepFailed when there are none."""
    if unheard := context.unheard():
        return Waits(f"{unheard} may yet be heard")
    wanted = _journal(context.operation).requested
    raise StepFailed(await _refused(context, vm, wanted, candidates))


def _unschedulable(vm: Vm, candidates: list[Candidate]) -> Problem:
    errors = tuple(
        FieldError(f"/nodes/{candidate.node_name}", reason.code.value, reason.message)
        for candidate in candidates
        for reason in candidate.reasons
    )
    return problem("unschedulable", f"no node can take {vm.name!r}", errors)


def _blocked(vm: Vm, blockers: tuple[FieldError, ...]) -> Problem:
    return problem("migration_blocked", f"{vm.name!r} cannot be moved", blockers)
