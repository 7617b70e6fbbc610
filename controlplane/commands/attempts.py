"""How a VM comes to run: binding, start permits, and what agents' reports prove.

A generation is given out here and nowhere else, for one attempt on one node in one boot of it. The
next one is given out only after the attempt before it has been proven over: by a report that
says "not running, and never again under this permit", or by a new boot of its node.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from controlplane.commands.operations import put_vm, vm_gone_from_node
from controlplane.commands.restored import RECOVERED, check_recovered, is_of_before_restore
from controlplane.commands.upgrade import MOVES_LEVEL, has_level
from shared.errors import Conflict, StateConflict
from shared.model import (
    Attempt,
    AttemptState,
    Condition,
    ObservedPower,
    Power,
    Problem,
    Vm,
    VmStatus,
    attempt_generation,
    condition,
    has_rivals,
    is_moving,
    may_have_run,
)
from shared.protocol import VmReport
from shared.states import (
    ATTEMPT_TRANSITIONS,
    RUNNING_POWERS,
    AttemptEvent,
    advance,
)

# A VM that ran this long before it crashed starts a new row of back-off.
STABLE_AFTER = timedelta(minutes=5)
RESTART_FIRST = timedelta(seconds=1)
RESTART_CAP = timedelta(minutes=5)

# Reports that are taken together leave room in their group, which holds twice as many writes.
TOGETHER_WRITES_MAX = 60

# A domain that was found so was started under its permit, or may have been.
_AFTER_A_START = frozenset({ObservedPower.STOPPED, ObservedPower.SHUT_OFF, ObservedPower.CRASHED})

PLACED = "Placed"

NodeCheck = Callable[[Draft, Vm, str], None]


class BindVm(Struct, frozen=True, kw_only=True):
    """Binds a VM to a node. ``check`` re-verifies the fit on the draft, or raises."""

    vm_id: str
    node_id: str
    by: Author
    check: NodeCheck

    def decide(self, draft: Draft) -> None:
        vm = draft.vm(self.vm_id)
        if vm.status.node is not None or vm.deleting or vm.spec.power is Power.STOPPED:
            raise StateConflict(f"{vm.name!r} is no longer waiting for a node")
        if has_rivals(vm):
            raise StateConflict(f"{vm.name!r} may still run on another node")
        check_recovered(draft, vm)
        self.check(draft, vm, self.node_id)
        node = draft.node(self.node_id)
        draft.event(
            "vm.placed", vm.id, self.by, tenant=vm.tenant, node=node.id, node_name=node.name
        )
        placed = Condition(type=PLACED, status=True, since=draft.now)
        status = with_condition(replace(vm.status, node=node.id), placed)
        put_vm(draft, replace(vm, status=status))


class PermitStart(Struct, frozen=True, kw_only=True):
    """Gives out the next generation for a bound VM. Returns it. Raises StateConflict.

    ``check`` re-verifies that the node has room: a stopped VM holds none.
    """

    vm_id: str
    by: Author
    check: NodeCheck

    def decide(self, draft: Draft) -> int:
        vm = draft.vm(self.vm_id)
        attempt = vm.status.attempt
        if vm.status.node is None or vm.deleting or vm.spec.power is Power.STOPPED:
            raise StateConflict(f"{vm.name!r} is not waiting for a start")
        if vm.status.migration is not None or has_rivals(vm):
            raise StateConflict(f"{vm.name!r} may still run on another node")
        if attempt is not None and attempt.state is not AttemptState.ENDED:
            raise StateConflict(f"generation {attempt.generation} of {vm.name!r} is not over")
        check_recovered(draft, vm)
        self.check(draft, vm, vm.status.node)
        node = draft.node(vm.status.node)
        generation = vm.status.generation + 1
        status = replace(
            vm.status,
            generation=generation,
            attempt=Attempt(
                generation=generation,
                node=node.id,
                boot_id=node.boot_id,
                state=AttemptState.PERMITTED,
                permitted_at=draft.now,
            ),
            has_run=may_have_run(vm) if has_level(draft, MOVES_LEVEL) else vm.status.has_run,
        )
        status = with_condition(status, Condition(type=PLACED, status=True, since=draft.now))
        status = without_condition(status, RECOVERED)
        draft.event("vm.starting", vm.id, self.by, tenant=vm.tenant, generation=generation)
        put_vm(draft, replace(vm, status=status))
        return generation


class ObserveVm(Struct, frozen=True, kw_only=True):
    """Takes an agent's report on a VM that is bound to its node; others are ignored."""

    node_id: str
    report: VmReport
    by: Author

    def decide(self, draft: Draft) -> None:
        vm = draft.find(Vm, self.report.vm_id)
        # While two nodes may own it, neither end alone says what has become of it: its saga asks
        # both.
        if vm is None or vm.status.node != self.node_id or is_moving(vm):
            return
        if vm.status.unproven is not None or is_of_before_restore(draft, self.report):
            return
        if vm.deleting and self.report.removed and _answers(self.report, vm):
            vm_gone_from_node(draft, vm, self.by)
            return
        if _is_lost(draft, vm):
            # What a node says in a new boot is no news of the guest that the boot before had: it
            # did not crash.
            vm = _end_lost(draft, vm, self.by)
        observed = _observe(draft, vm, self.report, self.by)
        # A report that says nothing new but its revision is not worth a write.
        if observed != replace(
            vm, status=replace(vm.status, observed_revision=observed.status.observed_revision)
        ):
            put_vm(draft, observed)


class TakenReports(Struct, frozen=True):
    """How many reports were taken, from the first on, and of those what was refused of which VM."""

    count: int
    refused: tuple[tuple[str, str], ...]


class ObserveVms(Struct, frozen=True, kw_only=True):
    """Takes an agent's reports in order, as many as one group has room for.

    A node that comes back tells of all its VMs, and mostly nothing new: fifty reports take 0.3 ms
    as one command, 0.8 ms as fifty, and no client's change waits behind them one by one. A report
    that cannot be taken must not cost the others anything.
    """

    node_id: str
    reports: tuple[VmReport, ...]
    by: Author

    def decide(self, draft: Draft) -> TakenReports:
        began_with, refused = draft.size(), list[tuple[str, str]]()
        for count, report in enumerate(self.reports):
            if draft.size() - began_with >= TOGETHER_WRITES_MAX:
                return TakenReports(count, tuple(refused))
            savepoint = draft.savepoint()
            try:
                ObserveVm(node_id=self.node_id, report=report, by=self.by).decide(draft)
            except Conflict as problem:
                draft.rollback(savepoint)
                refused.append((report.vm_id, str(problem)))
        return TakenReports(len(self.reports), tuple(refused))


class NotePlacement(Struct, frozen=True, kw_only=True):
    """Writes down why a VM that should run has no room, for people; nothing when it is known."""

    vm_id: str
    message: str

    def decide(self, draft: Draft) -> None:
        vm = draft.find(Vm, self.vm_id)
        if vm is None or vm.deleting or vm.spec.power is Power.STOPPED:
            return
        known = condition(vm, PLACED)
        if known is not None and not known.status and known.message == self.message:
            return
        noted = Condition(
            type=PLACED,
            status=False,
            reason="unschedulable",
            message=self.message,
            since=draft.now if known is None else known.since,
        )
        put_vm(draft, replace(vm, status=with_condition(vm.status, noted)))


class EndAttempt(Struct, frozen=True, kw_only=True):
    """Ends an attempt of an earlier boot of its node: no guest outlives the boot it ran in."""

    vm_id: str
    by: Author

    def decide(self, draft: Draft) -> None:
        vm = draft.vm(self.vm_id)
        attempt = vm.status.attempt
        if attempt is None or attempt.state is AttemptState.ENDED:
            return
        if is_moving(vm) or vm.status.unproven is not None:
            raise StateConflict(f"{vm.name!r} may have moved before its node booted anew")
        if not _is_lost(draft, vm):
            node = draft.node(attempt.node)
            raise StateConflict(f"{node.name!r} has not booted since {vm.name!r} was permitted")
        _end_lost(draft, vm, self.by)


def _is_lost(draft: Draft, vm: Vm) -> bool:
    """Whether a VM's node has booted since its open attempt was permitted."""
    attempt = vm.status.attempt
    if attempt is None or attempt.state is AttemptState.ENDED:
        return False
    return draft.node(attempt.node).boot_id != attempt.boot_id


def _end_lost(draft: Draft, vm: Vm, by: Author) -> Vm:
    """End an attempt that its node's boot has ended, and return the VM."""
    assert vm.status.attempt is not None, "what was lost was attempted"
    ended = _advance(vm.status, AttemptEvent.NODE_BOOTED_ANEW)
    node_id = vm.status.attempt.node
    draft.event("vm.lost_with_node", vm.id, by, tenant=vm.tenant, node=node_id)
    put_vm(draft, replace(vm, status=replace(ended, power_seen=ObservedPower.STOPPED)))
    return draft.vm(vm.id)


def with_condition(status: VmStatus, condition: Condition) -> VmStatus:
    others = without_condition(status, condition.type).conditions
    return replace(status, conditions=(*others, condition))


def without_condition(status: VmStatus, kind: str) -> VmStatus:
    return replace(status, conditions=tuple(c for c in status.conditions if c.type != kind))


def _answers(report: VmReport, vm: Vm) -> bool:
    """A removal counts only for the present attempt: never for a permit still in flight."""
    return report.generation == attempt_generation(vm)


def _observe(draft: Draft, vm: Vm, report: VmReport, by: Author) -> Vm:
    status = replace(
        vm.status,
        observed_revision=max(vm.status.observed_revision, report.revision),
        answered_request=max(vm.status.answered_request, report.answered_request),
        fault=report.fault,
    )
    status = _take_up_again(status, report)
    attempt = status.attempt
    if attempt is None or report.generation != attempt.generation:
        return replace(vm, status=status)
    status = _with_run(draft, status, report)
    if report.power in RUNNING_POWERS:
        return _seen_running(draft, replace(vm, status=status), report, by)
    # UNKNOWN is no answer: libvirt could not tell, or a newer agent has a word that we lack.
    if report.permit_used and report.power is not ObservedPower.UNKNOWN:
        return _seen_over(draft, replace(vm, status=status), report, by)
    return replace(vm, status=status)


def _with_run(draft: Draft, status: VmStatus, report: VmReport) -> VmStatus:
    """Remember for good that a guest may have written to the VM's disks.

    Also of a domain that was never seen running: its node may have lost power before it could tell.
    Its disks were made before it was started, so that whatever is missing later is lost.
    """
    ran = report.power in RUNNING_POWERS or (report.permit_used and report.power in _AFTER_A_START)
    if not ran or status.has_run or not has_level(draft, MOVES_LEVEL):
        return status
    return replace(status, has_run=True)


def _take_up_again(status: VmStatus, report: VmReport) -> VmStatus:
    """Return to an earlier attempt that runs after all, when the present one can never start.

    libvirt may carry a start out after it was reported to be over. Both attempts are of the same
    node and boot, and the agent has revoked the present one before it reported.
    """
    attempt = status.attempt
    if (
        attempt is None
        or attempt.state is AttemptState.RUNNING
        or report.power not in RUNNING_POWERS
        or not report.generation < attempt.generation <= report.highest_used
    ):
        return status
    earlier = replace(attempt, generation=report.generation, state=AttemptState.ENDED)
    return replace(status, attempt=earlier, fault=None)


def _seen_running(draft: Draft, vm: Vm, report: VmReport, by: Author) -> Vm:
    before = vm.status
    assert before.attempt is not None, "only an attempt is seen running"
    changed = (
        before.attempt.state is not AttemptState.RUNNING or before.power_seen is not report.power
    )
    if changed:
        draft.event(
            f"vm.{report.power.value}",
            vm.id,
            by,
            tenant=vm.tenant,
            node=vm.status.node,
            generation=report.generation,
        )
    status = _advance(before, AttemptEvent.SEEN_RUNNING)
    return replace(vm, status=replace(status, power_seen=report.power))


def _seen_over(draft: Draft, vm: Vm, report: VmReport, by: Author) -> Vm:
    before = vm.status
    assert before.attempt is not None, "only an attempt is seen to be over"
    already_over = before.attempt.state is AttemptState.ENDED
    status = replace(_advance(before, AttemptEvent.SEEN_NOT_RUNNING), power_seen=report.power)
    vm = replace(vm, status=status)
    if already_over:
        return vm
    draft.event(
        _over_event(vm, report.power),
        vm.id,
        by,
        tenant=vm.tenant,
        node=vm.status.node,
        generation=report.generation,
        detail="" if report.fault is None else report.fault.detail,
    )
    if vm.spec.power is Power.STOPPED or vm.deleting:
        return vm
    if report.power is ObservedPower.SHUT_OFF:
        # The guest switched itself off: that is what its user wants now.
        return replace(vm, spec=replace(vm.spec, power=Power.STOPPED))
    return _crashed(draft, vm, report.fault)


def _crashed(draft: Draft, vm: Vm, fault: Problem | None) -> Vm:
    """Count a crash and hold the next attempt back, or stop where the user wants no restart."""
    assert vm.status.attempt is not None, "what crashed was an attempt"
    started_ago = draft.now - vm.status.attempt.permitted_at
    crashes = 1 if started_ago >= STABLE_AFTER else vm.status.crashes + 1
    delay = min(RESTART_CAP, RESTART_FIRST * 2 ** min(crashes - 1, 16))
    status = replace(vm.status, crashes=crashes, not_before=draft.now + delay, fault=fault)
    if not vm.spec.ha.restart:
        return replace(vm, status=status, spec=replace(vm.spec, power=Power.STOPPED))
    return replace(vm, status=status)


def _advance(status: VmStatus, event: AttemptEvent) -> VmStatus:
    assert status.attempt is not None, "only an attempt advances"
    state = advance(ATTEMPT_TRANSITIONS, status.attempt.state, event)
    return replace(status, attempt=replace(status.attempt, state=state))


def _over_event(vm: Vm, power: ObservedPower) -> str:
    if power is ObservedPower.FAILED:
        return "vm.start_failed"
    if power is ObservedPower.SHUT_OFF:
        return "vm.shut_off"
    expected = vm.spec.power is Power.STOPPED or vm.deleting
    return "vm.stopped" if expected else "vm.crashed"
