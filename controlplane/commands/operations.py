"""How operations on VMs come to their end.

An operation is a row of goals. After every change of a VM its open operations are settled in the
same transaction: goals that hold are marked, the last one ends the operation, and one whose goal
can no longer be reached is failed or cancelled with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from shared.errors import StateConflict
from shared.model import (
    AttemptState,
    Node,
    NodeState,
    ObservedPower,
    Operation,
    OperationState,
    OperationStep,
    Power,
    Problem,
    StepState,
    Vm,
)
from shared.moves import Leftover
from shared.problems import problem
from shared.states import OPERATION_TRANSITIONS, OperationEvent, VmAction, advance

# A create may wait for room; everything else either happens soon or has gone wrong.
CREATE_DEADLINE = timedelta(days=1)
ACTION_DEADLINE = timedelta(minutes=15)
# Starts that libvirt refused in a row before the operation (not the VM) gives up.
START_FAILURES_MAX = 3

CREATE = "vm.create"
DELETE = f"vm.{VmAction.DELETE}"
STARTS = frozenset({CREATE, f"vm.{VmAction.START}"})


class Goal(Struct, frozen=True):
    name: str
    holds: Callable[[Vm, Operation], bool]


def _is_placed(vm: Vm, _: Operation) -> bool:
    return vm.status.node is not None


def _is_permitted(vm: Vm, operation: Operation) -> bool:
    return vm.status.generation > operation.generation_floor


def _has_run(vm: Vm, operation: Operation) -> bool:
    attempt = vm.status.attempt
    if attempt is None or attempt.generation <= operation.generation_floor:
        return False
    return attempt.state is AttemptState.RUNNING or vm.status.power_seen is ObservedPower.SHUT_OFF


def _is_running(vm: Vm, _: Operation) -> bool:
    return vm.status.power_seen is ObservedPower.RUNNING


def _is_paused(vm: Vm, _: Operation) -> bool:
    return vm.status.power_seen is ObservedPower.PAUSED


def _is_at_rest(vm: Vm, _: Operation) -> bool:
    attempt = vm.status.attempt
    return attempt is None or attempt.state is AttemptState.ENDED


def _is_answered(vm: Vm, operation: Operation) -> bool:
    return vm.status.answered_request >= operation.request_number


_START = (Goal("place", _is_placed), Goal("permit", _is_permitted), Goal("run", _has_run))
GOALS: dict[str, tuple[Goal, ...]] = {
    CREATE: _START,
    f"vm.{VmAction.START}": _START,
    f"vm.{VmAction.SHUTDOWN}": (Goal("shut-down", _is_at_rest),),
    f"vm.{VmAction.STOP}": (Goal("stop", _is_at_rest),),
    f"vm.{VmAction.REBOOT}": (Goal("reboot", _is_answered),),
    f"vm.{VmAction.RESET}": (Goal("reset", _is_answered),),
    f"vm.{VmAction.PAUSE}": (Goal("pause", _is_paused),),
    f"vm.{VmAction.RESUME}": (Goal("resume", _is_running),),
    DELETE: (Goal("remove", lambda vm, operation: False),),
}
# The desired power an operation works for; once it is another, somebody wants something else.
WANTED: dict[str, Power] = {
    CREATE: Power.RUNNING,
    f"vm.{VmAction.START}": Power.RUNNING,
    f"vm.{VmAction.SHUTDOWN}": Power.STOPPED,
    f"vm.{VmAction.STOP}": Power.STOPPED,
    f"vm.{VmAction.PAUSE}": Power.PAUSED,
    f"vm.{VmAction.RESUME}": Power.RUNNING,
}
REQUESTS = frozenset({f"vm.{VmAction.REBOOT}", f"vm.{VmAction.RESET}"})


def open_operation(draft: Draft, kind: str, vm: Vm, by: Author, request_number: int = 0) -> str:
    """Write a new operation on a VM and return its id."""
    operation = _new_operation(draft, kind, vm, by, request_number)
    draft.put(operation)
    return operation.id


def record_done(draft: Draft, kind: str, vm: Vm, by: Author) -> str:
    """Write an operation that had nothing left to do, and return its id."""
    operation = replace(_new_operation(draft, kind, vm, by, 0), phase="", steps=())
    end_operation(draft, operation, OperationEvent.SUCCEEDED)
    return operation.id


def open_operation_id(draft: Draft, kind: str, vm: Vm) -> str | None:
    """Return the operation of this kind that is under way on a VM."""
    return next((op.id for op in draft.operations_on(vm.id) if op.kind == kind), None)


def put_vm(draft: Draft, vm: Vm) -> None:
    """Write a VM and settle its open operations: the only way a VM's record is changed."""
    draft.put(replace(vm, updated_at=draft.now))
    for operation in draft.operations_on(vm.id):
        if operation.saga is None:
            settle(draft, operation, vm)


def settle(draft: Draft, operation: Operation, vm: Vm) -> None:
    reached = _mark_goals(draft, operation, vm)
    if all(step.state is StepState.DONE for step in reached.steps):
        end_operation(draft, reached, OperationEvent.SUCCEEDED)
    elif (fault := _why_never(vm, reached)) is not None:
        event = OperationEvent.CANCELLED if fault.code == "superseded" else OperationEvent.FAILED
        end_operation(draft, reached, event, fault)
    elif reached != operation:
        draft.put(replace(reached, updated_at=draft.now))


def end_operation(
    draft: Draft, operation: Operation, event: OperationEvent, fault: Problem | None = None
) -> None:
    """Bring an operation to its end; from then on it is history."""
    draft.finish(
        replace(
            operation,
            state=advance(OPERATION_TRANSITIONS, operation.state, event),
            error=fault,
            updated_at=draft.now,
        )
    )


def vm_gone_from_node(draft: Draft, vm: Vm, by: Author) -> None:
    """Unbind a VM that is being deleted; it is gone once no other node has something left of it.

    Nodes that have its console log of earlier are asked to delete it, if they can be asked: a log
    is nothing to wait for a silent node for.
    """
    logs = tuple(
        Leftover(node=node_id, generation=vm.status.generation)
        for node_id in vm.status.logs_on
        if (node := draft.find(Node, node_id)) is not None and node.state is NodeState.READY
    )
    leftovers = (*vm.status.leftovers, *logs)
    if leftovers:
        status = replace(vm.status, node=None, attempt=None, leftovers=leftovers, logs_on=())
        put_vm(draft, replace(vm, status=status))
        return
    draft.event("vm.deleted", vm.id, by, tenant=vm.tenant, name=vm.name)
    _vm_removed(draft, vm)


def _vm_removed(draft: Draft, vm: Vm) -> None:
    """Delete a VM's record and end what was open on it."""
    draft.delete(Vm, vm.id)
    for operation in draft.operations_on(vm.id):
        if operation.kind == DELETE:
            steps = tuple(
                replace(step, state=StepState.DONE, at=draft.now) for step in operation.steps
            )
            end_operation(draft, replace(operation, steps=steps), OperationEvent.SUCCEEDED)
        else:
            end_operation(draft, operation, OperationEvent.CANCELLED, _superseded("deleted"))


def _new_operation(draft: Draft, kind: str, vm: Vm, by: Author, request_number: int) -> Operation:
    return Operation(
        id=draft.new_id("op"),
        kind=kind,
        target=vm.id,
        tenant=vm.tenant,
        state=OperationState.RUNNING,
        phase=GOALS[kind][0].name,
        steps=tuple(OperationStep(name=goal.name) for goal in GOALS[kind]),
        by=by.principal,
        created_at=draft.now,
        updated_at=draft.now,
        deadline_at=draft.now + (CREATE_DEADLINE if kind == CREATE else ACTION_DEADLINE),
        request_number=request_number,
        generation_floor=vm.status.generation,
    )


def _mark_goals(draft: Draft, operation: Operation, vm: Vm) -> Operation:
    steps = list(operation.steps)
    for position, goal in enumerate(GOALS[operation.kind]):
        if steps[position].state is StepState.DONE:
            continue
        if not goal.holds(vm, operation):
            return replace(operation, steps=tuple(steps), phase=goal.name)
        steps[position] = replace(steps[position], state=StepState.DONE, at=draft.now)
    return replace(operation, steps=tuple(steps))


def _why_never(vm: Vm, operation: Operation) -> Problem | None:
    """Return why an operation can no longer reach its goal; None while it still can."""
    if vm.deleting and operation.kind != DELETE:
        return _superseded("is being deleted")
    if operation.kind in STARTS and vm.status.crashes >= _start_failures_max(vm):
        return vm.status.fault or problem("start_failed", "the VM does not stay up")
    wanted = WANTED.get(operation.kind)
    if wanted is not None and not _agree(vm.spec.power, wanted, operation.kind):
        return _superseded(f"is now wanted {vm.spec.power.value}")
    if operation.kind in REQUESTS and _is_at_rest(vm, operation):
        return problem("guest_not_running", "the guest ended before it took the request")
    asked = 0 if vm.request is None else vm.request.number
    if operation.kind in REQUESTS and asked != operation.request_number:
        return _superseded("was asked for something else")
    return None


def _start_failures_max(vm: Vm) -> int:
    return START_FAILURES_MAX if vm.spec.ha.restart else 1


def _agree(power: Power, wanted: Power, kind: str) -> bool:
    if kind in STARTS:
        return power is not Power.STOPPED
    return power is wanted


def _superseded(what: str) -> Problem:
    return problem("superseded", f"the VM {what}: a later request took the place of this one")


class ExpireOperation(Struct, frozen=True, kw_only=True):
    """Fails an operation whose deadline has passed; a saga is given up elsewhere: it is undone.

    A VM that fitted nowhere in all that time is no longer wanted running: it would surprise its
    user to see it start days later. Does nothing when the operation has ended meanwhile.
    """

    operation_id: str
    by: Author

    def decide(self, draft: Draft) -> None:
        operation = draft.find(Operation, self.operation_id)
        if operation is None or operation.saga is not None:
            return
        if operation.deadline_at > draft.now:
            raise StateConflict(f"{operation.id} has time until {operation.deadline_at}")
        fault = problem(
            "deadline_exceeded",
            f"not done by {operation.deadline_at}; last phase {operation.phase}",
        )
        end_operation(draft, operation, OperationEvent.FAILED, fault)
        vm = draft.find(Vm, operation.target)
        if operation.kind == CREATE and vm is not None and vm.status.node is None:
            put_vm(draft, replace(vm, spec=replace(vm.spec, power=Power.STOPPED)))
