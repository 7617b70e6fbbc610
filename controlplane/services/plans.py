"""Use cases that only tell what a write would do: the dry runs of what places, moves or stops VMs.

Each checks what the write checks and rehearses its command, so that it fails as the write would.
"""

from __future__ import annotations

from controlplane.commands.vms import ActOnVm, CreateVm, DeleteVm
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.placement import planned, unborn
from controlplane.services.rehearsal import rehearse
from controlplane.services.requests import NewVm
from controlplane.services.revisions import cluster_revision
from controlplane.services.scope import authorize, find_vm
from controlplane.services.validation import check_new_vm
from controlplane.services.views import PlacementView, PlannedVm, PlanView, ReasonView
from controlplane.services.vms import author, check_room
from shared.model import Power, Vm
from shared.states import VmAction

# The action of one that moves live.
MOVE = "migrate"
# A person reads so many; the placement has them all.
NODES_TOLD_MAX = 8


async def plan_create(context: Context, principal: Principal, new: NewVm) -> PlanView:
    """Return where a VM would go that is created now. Raises what creating it raises."""
    authorize(principal, Permission.VMS_WRITE)
    check_new_vm(context.state, new)
    check_room(context)
    revision = cluster_revision(context.state)
    command = CreateVm(
        name=new.name,
        tenant=principal.scope.tenant,
        labels=new.labels,
        spec=new.spec,
        by=author(principal),
    )
    await rehearse(context, command)
    vm = unborn(context, principal, new)
    # One that is to stay stopped is placed when it is started.
    placement = None if new.spec.power is Power.STOPPED else await planned(context, vm)
    return plan_view("vm.create", (planned_vm(context, vm, "create", placement),), revision)


async def plan_action(
    context: Context,
    principal: Principal,
    reference: str,
    action: VmAction,
    deadline_s: float = 60.0,
) -> PlanView:
    """Return what a power verb would do. Raises what the verb raises."""
    authorize(principal, Permission.VMS_WRITE)
    vm = find_vm(context, principal, reference).record
    revision = cluster_revision(context.state)
    command = ActOnVm(vm_id=vm.id, action=action, by=author(principal), deadline_s=deadline_s)
    await rehearse(context, command)
    placement = await planned(context, vm) if action is VmAction.START else None
    return plan_view(f"vm.{action}", (planned_vm(context, vm, action, placement),), revision)


async def plan_delete(context: Context, principal: Principal, reference: str) -> PlanView:
    """Return what deleting a VM would do. Raises what deleting it raises."""
    authorize(principal, Permission.VMS_WRITE)
    vm = find_vm(context, principal, reference).record
    revision = cluster_revision(context.state)
    await rehearse(context, DeleteVm(vm_id=vm.id, by=author(principal)))
    return plan_view("vm.delete", (planned_vm(context, vm, VmAction.DELETE, None),), revision)


def planned_vm(context: Context, vm: Vm, action: str, placement: PlacementView | None) -> PlannedVm:
    """Return what a plan says of one VM; with a placement it goes where that says, or nowhere."""
    node_id = vm.status.node
    node = None if node_id is None else context.state.nodes.get(node_id)
    blocked = placement is not None and placement.node is None
    refusals = _refusals_elsewhere if action == MOVE else _refusals
    return PlannedVm(
        vm=vm.id or None,
        vm_name=vm.name,
        action=action,
        node=node_id,
        node_name=None if node is None else node.record.name,
        target=None if placement is None else placement.node,
        target_name=None if placement is None else placement.node_name,
        reasons=refusals(vm, placement) if placement is not None and blocked else (),
        placement=placement,
    )


def plan_view(kind: str, vms: tuple[PlannedVm, ...], revision: str) -> PlanView:
    blocked = sum(bool(each.reasons) for each in vms)
    return PlanView(kind=kind, vms=vms, blocked=blocked, revision=revision)


def _refusals(vm: Vm, placement: PlacementView) -> tuple[ReasonView, ...]:
    """Return why a VM can go nowhere: what its own node says, or how many say what."""
    for candidate in placement.candidates:
        if candidate.node == vm.status.node:
            return candidate.reasons
    return (_counted(placement),)


def _refusals_elsewhere(vm: Vm, placement: PlacementView) -> tuple[ReasonView, ...]:
    """Return why no other node can take a VM: each of a few by itself, of many how many say what.

    That it runs on its own node is no news.
    """
    elsewhere = [each for each in placement.candidates if each.node != vm.status.node]
    if not 0 < len(elsewhere) <= NODES_TOLD_MAX:
        return (_counted(placement),)
    return tuple(
        ReasonView(code=reason.code, message=f"{each.node_name}: {reason.message}")
        for each in elsewhere
        for reason in each.reasons
    )


def _counted(placement: PlacementView) -> ReasonView:
    counts = sorted(placement.refusals.items(), key=lambda item: (-item[1], item[0]))
    told = ", ".join(f"{count} {code}" for code, count in counts) or "there is none"
    return ReasonView(code="unschedulable", message=f"no node can run it now: {told}")
