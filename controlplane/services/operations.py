"""Use cases of operations: list, read, wait for the end.

Open operations are records; finished ones are history, first in etcd's part of it and then in this
replica's SQLite. Each is looked for in that order, so that one that moves on meanwhile is found.
"""

from __future__ import annotations

import asyncio

from controlplane.commands.draft import Author
from controlplane.commands.sagas import CancelOperation
from controlplane.services.context import Context, Permission, Principal, Scope
from controlplane.services.pages import records, walk
from controlplane.services.requests import OperationQuery
from controlplane.services.revisions import ClusterRevision
from controlplane.services.scope import authorize, object_ids, shown
from controlplane.services.views import OperationList, OperationView, Progress, operation_view
from controlplane.state import ClusterState
from controlplane.store.history import OperationFilter, kind_matches
from shared.errors import NotFound
from shared.model import FinishedOperation, Operation
from shared.moves import DrainJournal
from shared.states import OPERATION_ENDS

# Finished operations looked through for one page of a filtered list; a page may be short, even
# empty, while there is a next one.
HISTORY_SCAN_MAX = 1000


async def get_operation(
    context: Context, principal: Principal, operation_id: str, wait_s: float = 0.0
) -> OperationView:
    """Return an operation, at once when it has ended, or else after at most ``wait_s`` seconds.

    Raises Forbidden, NotFound.
    """
    authorize(principal, Permission.OPERATIONS_READ)
    if wait_s and operation_id in context.state.operations:
        await _ended(context.state, operation_id, wait_s)
    operation = await find_operation(context, principal.scope, operation_id)
    if operation is None:
        raise NotFound(f"there is no operation {shown(operation_id)}")
    return show_operation(context, operation)


async def cancel_operation(
    context: Context, principal: Principal, operation_id: str
) -> OperationView:
    """Ask for a saga to be undone and return it; asked again, it does nothing.

    Raises Forbidden, NotFound, StateConflict for one that cannot be cancelled (any more).
    """
    authorize(principal, Permission.OPERATIONS_WRITE)
    operation = await find_operation(context, principal.scope, operation_id)
    if operation is None:
        raise NotFound(f"there is no operation {shown(operation_id)}")
    by = Author(principal.name, principal.request_id)
    await context.submit(CancelOperation(operation_id=operation.id, by=by))
    return show_operation(
        context, await find_operation(context, principal.scope, operation_id) or operation
    )


async def await_end(
    context: Context, principal: Principal, operation: OperationView, wait_s: float
) -> OperationView:
    """Return an operation that was just accepted, once it has ended or after ``wait_s`` seconds."""
    await _ended(context.state, operation.id, wait_s)
    found = await find_operation(context, principal.scope, operation.id)
    return operation if found is None else show_operation(context, found)


async def find_operation(context: Context, scope: Scope, operation_id: str) -> Operation | None:
    """Return an operation, open or finished, of the scope's tenant."""
    stored = context.state.operations.get(operation_id)
    operation = None if stored is None else stored.record
    if operation is None:
        operation = _finished_in_state(context.state, operation_id)
    if operation is None:
        operation = await context.history.operation(operation_id)
    return operation if operation is not None and operation.tenant == scope.tenant else None


async def list_operations(
    context: Context, principal: Principal, query: OperationQuery
) -> OperationList:
    """Return a page of operations as they were when the walk began, newest first.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable.
    """
    authorize(principal, Permission.OPERATIONS_READ)
    state, tenant = context.state, principal.scope.tenant
    named = () if query.target is None else (query.target,)
    here = walk(
        state,
        query.cursor,
        *(tenant, query.state, query.target, query.kind),
        objects=object_ids(context, principal, named),
    )
    target = here.objects[0] if here.objects else None
    in_memory = _operations_in_state(state, here.at)
    stored: list[Operation] = []
    # SQLite holds none but ended ones: a filter for others would look through all in vain.
    if query.state is None or query.state in OPERATION_ENDS:
        wanted = OperationFilter(
            tenant=tenant,
            target=target,
            kinds=query.kind,
            before=here.last,
            until=here.at.seq,
            limit=HISTORY_SCAN_MAX,
        )
        stored = await context.history.operations(wanted)
    # Below the last row of a full scan SQLite may hold more, which come on a later page.
    floor = stored[-1].id if len(stored) == HISTORY_SCAN_MAX else ""
    merged = {operation.id: operation for operation in (*stored, *in_memory)}
    found = [
        operation
        for operation_id, operation in sorted(merged.items(), reverse=True)
        if (here.last is None or operation_id < here.last)
        and operation_id >= floor
        and operation.tenant == tenant
        and (target is None or operation.target == target)
        and (query.state is None or operation.state is query.state)
        and kind_matches(operation.kind, query.kind)
    ]
    page = found[: query.limit]
    more = page[-1].id if len(found) > query.limit else floor or None
    return OperationList(
        items=tuple(show_operation(context, operation) for operation in page),
        next_cursor=None if more is None else here.cursor(more),
        revision=str(here.at),
    )


def show_operation(context: Context, operation: Operation) -> OperationView:
    """Return an operation as a client sees it, with how far it is."""
    return operation_view(operation, _progress(context, operation))


def _progress(context: Context, operation: Operation) -> Progress | None:
    """Return how far an open operation is; a drain by the VMs that its node still holds."""
    journal = operation.saga
    if not isinstance(journal, DrainJournal) or operation.state in OPERATION_ENDS:
        return context.progress.latest(operation.id)
    left = len(tuple(context.state.vm_ids_on(operation.target)))
    total = max(journal.total, left)
    percent = 100.0 if not total else round(100.0 * (total - left) / total, 1)
    return Progress(percent=percent, eta_s=None, as_of=context.clock.now())


async def _ended(state: ClusterState, operation_id: str, wait_s: float) -> None:
    """Return when the operation has ended, or after ``wait_s`` seconds."""
    try:
        async with asyncio.timeout(wait_s):
            while operation_id in state.operations:
                if state.operations[operation_id].record.state in OPERATION_ENDS:
                    return
                await state.changes.wait()
    except TimeoutError:
        return


def _finished_in_state(state: ClusterState, operation_id: str) -> Operation | None:
    """Look through etcd's part of history from its end: what is asked for has mostly just ended."""
    for seq in range(state.last_seq, state.last_seq - len(state.history), -1):
        entry = state.history.get(seq)
        if isinstance(entry, FinishedOperation) and entry.operation.id == operation_id:
            return entry.operation
    return None


def _operations_in_state(state: ClusterState, at: ClusterRevision) -> list[Operation]:
    """Return those that were open at a moment, and those that had ended and are in memory."""
    then = records(state, Operation, at)
    opened = [stored.record for stored in map(then.get, then.ids()) if stored is not None]
    ended = [
        entry.operation
        for entry in state.history.values()
        if isinstance(entry, FinishedOperation) and entry.seq <= at.seq
    ]
    return [*ended, *opened]
