"""Use cases of migrations: ask for one, plan one, read one.

A migration is an operation; what is shown under ``/migrations`` are the same records.
"""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.commands.migrations import MIGRATE, RequestMigration
from controlplane.sagas.migrate import MIGRATION
from controlplane.sagas.preflight import blockers_of
from controlplane.scheduler.moves import move_request
from controlplane.scheduler.place import Candidate, Plan, plan
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.operations import find_operation, list_operations, show_operation
from controlplane.services.placement import placement_view, snapshot_now
from controlplane.services.plans import MOVE, plan_view, planned_vm
from controlplane.services.rehearsal import rehearse
from controlplane.services.requests import MigrateOrder, MigrationQuery, OperationQuery
from controlplane.services.revisions import cluster_revision
from controlplane.services.scope import authorize, find_node, find_vm, shown
from controlplane.services.views import (
    MigrationList,
    MigrationView,
    OperationView,
    PlanView,
    ReasonView,
)
from controlplane.services.vms import accepted, author
from controlplane.state import ClusterState
from shared.errors import NotFound, NovacronError
from shared.model import Node, Vm
from shared.moves import MigrationJournal


async def migrate_vm(
    context: Context, principal: Principal, reference: str, order: MigrateOrder
) -> OperationView:
    """Accept a live migration; without a destination the scheduler chooses one.

    Raises Forbidden, NotFound, StateConflict, and what committing raises.
    """
    authorize(principal, Permission.VMS_WRITE)
    vm = find_vm(context, principal, reference).record
    return await accepted(context, principal, _request(context, principal, vm, order))


async def plan_migration(
    context: Context, principal: Principal, reference: str, order: MigrateOrder
) -> PlanView:
    """Return where a VM would be moved to, and every reason why it could not be.

    The two nodes are asked as well. Raises what moving it raises.
    """
    authorize(principal, Permission.VMS_WRITE)
    vm = find_vm(context, principal, reference).record
    revision = cluster_revision(context.state)
    await rehearse(context, _request(context, principal, vm, order))
    assert vm.status.node is not None, "the rehearsal asked for that"
    source = find_node(context, vm.status.node).record
    snapshot = (await snapshot_now(context)).without(vm)
    decision = await context.offload(lambda: plan(snapshot, move_request(vm, source)))
    wanted = None if order.destination is None else find_node(context, order.destination)
    if wanted is not None:
        decision = _only(decision, wanted.record.id)
    planned = planned_vm(context, vm, MOVE, placement_view(decision, revision))
    target = planned.target or (None if wanted is None else wanted.record.id)
    if target is not None and target != source.id:
        blockers = await _blockers(context, principal, vm, source, target)
        planned = replace(planned, reasons=(*planned.reasons, *blockers))
    return plan_view(MIGRATE, (planned,), revision)


async def list_migrations(
    context: Context, principal: Principal, query: MigrationQuery
) -> MigrationList:
    """Return a page of migrations, newest first. Raises as ``list_operations``."""
    wanted = OperationQuery(
        limit=query.limit,
        cursor=query.cursor,
        state=query.state,
        target=query.vm,
        kind=(MIGRATE,),
    )
    found = await list_operations(context, principal, wanted)
    return MigrationList(
        items=tuple(migration_view(context.state, each) for each in found.items),
        next_cursor=found.next_cursor,
        revision=found.revision,
    )


async def get_migration(context: Context, principal: Principal, operation_id: str) -> MigrationView:
    """Return one migration. Raises Forbidden, NotFound."""
    authorize(principal, Permission.OPERATIONS_READ)
    operation = await find_operation(context, principal.scope, operation_id)
    if operation is None or operation.kind != MIGRATE:
        raise NotFound(f"there is no migration {shown(operation_id)}")
    return migration_view(context.state, show_operation(context, operation))


def migration_view(state: ClusterState, operation: OperationView) -> MigrationView:
    """Return a migration's operation from the VM's side."""
    journal = operation.details
    assert isinstance(journal, MigrationJournal), "a migration's journal"
    vm = state.vms.get(operation.target)
    return MigrationView(
        id=operation.id,
        vm=operation.target,
        vm_name=None if vm is None else vm.record.name,
        tenant=operation.tenant,
        source=journal.source,
        source_name=_node_name(state, journal.source),
        destination=journal.destination,
        destination_name=_node_name(state, journal.destination),
        generation=journal.generation,
        state=operation.state,
        phase=operation.phase,
        steps=operation.steps,
        progress=operation.progress,
        figures=journal.figures,
        error=operation.error,
        by=operation.by,
        parent=operation.parent,
        created_at=operation.created_at,
        updated_at=operation.updated_at,
    )


async def _blockers(
    context: Context, principal: Principal, vm: Vm, source: Node, target: str
) -> tuple[ReasonView, ...]:
    """Return what the two nodes hold against it; one that cannot be asked is a reason itself."""
    destination = find_node(context, target).record
    try:
        blockers = await blockers_of(context.ask, principal.request_id, vm, source, destination)
    except NovacronError as error:
        return (ReasonView(code=error.code, message=str(error)),)
    return tuple(
        ReasonView(code=each.code, message=f"{each.pointer.rpartition('/')[2]}: {each.message}")
        for each in blockers
    )


def _request(
    context: Context, principal: Principal, vm: Vm, order: MigrateOrder
) -> RequestMigration:
    wanted = None if order.destination is None else find_node(context, order.destination)
    return RequestMigration(
        vm_id=vm.id,
        destination=None if wanted is None else wanted.record.id,
        steps=MIGRATION.names,
        no_return=MIGRATION.no_return,
        by=author(principal),
    )


def _only(decision: Plan, node_id: str) -> Plan:
    """Return a plan as if there were this node only."""
    candidates = tuple(each for each in decision.candidates if each.node == node_id)
    chosen: Candidate | None = next((each for each in candidates if each.fits), None)
    return replace(
        decision,
        node=None if chosen is None else chosen.node,
        node_name=None if chosen is None else chosen.node_name,
        candidates=candidates,
    )


def _node_name(state: ClusterState, node_id: str | None) -> str | None:
    stored = None if node_id is None else state.nodes.get(node_id)
    return None if stored is None else stored.record.name
