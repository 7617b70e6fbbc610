"""Use cases of drains: ask for one, and ask first what would become of each VM of the node."""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.commands.drains import DRAIN, RequestDrain
from controlplane.sagas.drain import DRAINING, Fate, FateKind, fate_at_rest
from controlplane.scheduler.moves import plan_moves
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.placement import placement_view, snapshot_now
from controlplane.services.plans import MOVE, plan_view, planned_vm
from controlplane.services.rehearsal import rehearse
from controlplane.services.requests import DrainOrder
from controlplane.services.revisions import cluster_revision
from controlplane.services.scope import authorize, find_node, find_vm
from controlplane.services.views import OperationView, PlannedVm, PlanView, ReasonView
from controlplane.services.vms import accepted, author
from shared.model import Node, Vm


async def drain_node(
    context: Context, principal: Principal, reference: str, order: DrainOrder
) -> OperationView:
    """Accept a node's drain; asked again while one is under way, it is that one.

    Raises Forbidden, NotFound, StateConflict, and what committing raises.
    """
    authorize(principal, Permission.NODES_WRITE)
    node = find_node(context, reference).record
    return await accepted(context, principal, _request(context, principal, node, order))


async def plan_drain(
    context: Context, principal: Principal, reference: str, order: DrainOrder
) -> PlanView:
    """Return where each VM of a node would go, and which cannot leave and why.

    Raises what draining it raises.
    """
    authorize(principal, Permission.NODES_WRITE)
    node = find_node(context, reference).record
    revision = cluster_revision(context.state)
    request = _request(context, principal, node, order)
    await rehearse(context, request)
    state = context.state
    here = [state.vms[vm_id].record for vm_id in sorted(state.vm_ids_on(node.id))]
    snapshot = await snapshot_now(context)
    now = context.clock.now()
    fates = await context.offload(lambda: [fate_at_rest(node, vm, snapshot, now) for vm in here])
    planned = [
        _without_move(context, vm, fate, skipped=vm.id in request.skip)
        for vm, fate in zip(here, fates, strict=True)
    ]
    moving = [vm for vm, fixed in zip(here, planned, strict=True) if fixed is None]
    moves = await context.offload(lambda: plan_moves(snapshot, node, moving))
    told = {
        vm.id: planned_vm(context, vm, MOVE, placement_view(decision, revision))
        for vm, decision in moves
    }
    return plan_view(
        DRAIN,
        tuple(fixed or told[vm.id] for vm, fixed in zip(here, planned, strict=True)),
        revision,
    )


def _without_move(
    context: Context, vm: Vm, fate: Fate | None, *, skipped: bool
) -> PlannedVm | None:
    """Return what becomes of a VM that is not moved live; None for one that is."""
    if fate is None and not skipped:
        return None
    if skipped:
        reason = ReasonView(code="skipped", message="it is to be skipped")
        return replace(planned_vm(context, vm, "stay", None), reasons=(reason,))
    assert fate is not None, "one of the three"
    if fate.kind is FateKind.STAY:
        reason = ReasonView(code="left", message=fate.reason)
        return replace(planned_vm(context, vm, "stay", None), reasons=(reason,))
    action = "release" if fate.kind is FateKind.RELEASE else "wait"
    target = None if fate.new_node is None else context.state.nodes.get(fate.new_node)
    return replace(
        planned_vm(context, vm, action, None),
        target=fate.new_node,
        target_name=None if target is None else target.record.name,
    )


def _request(context: Context, principal: Principal, node: Node, order: DrainOrder) -> RequestDrain:
    return RequestDrain(
        node_id=node.id,
        reason=order.reason,
        skip=tuple(find_vm(context, principal, each).record.id for each in order.skip),
        steps=DRAINING.names,
        no_return=DRAINING.no_return,
        by=author(principal),
    )
