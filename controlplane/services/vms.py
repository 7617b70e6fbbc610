"""Use cases of VMs: list, read, create, change, the power verbs, delete."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

from controlplane.commands.draft import Author, Command
from controlplane.commands.vm_patch import ChangeVm, VmPatch
from controlplane.commands.vms import ActOnVm, CreateVm, DeleteVm
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.operations import find_operation
from controlplane.services.pages import records, walk
from controlplane.services.requests import NewVm, VmQuery
from controlplane.services.revisions import epoch_of
from controlplane.services.scope import authorize, find_node, find_vm
from controlplane.services.selection import carries
from controlplane.services.validation import check_new_vm
from controlplane.services.views import OperationView, VmList, VmView, operation_view, vm_view
from controlplane.state import Stored, Then
from controlplane.store.port import Room
from shared.errors import DeletedSince, NotFound, StoreFull
from shared.model import Vm
from shared.states import VmAction, vm_phase

# Records looked through before other tasks get their turn: about 3 ms.
SCAN_STEP = 2000


async def get_vm(context: Context, principal: Principal, reference: str) -> VmView:
    """Return one VM. Raises Forbidden, NotFound."""
    authorize(principal, Permission.VMS_READ)
    return view(context, find_vm(context, principal, reference), epoch_of(context.state))


async def list_vms(context: Context, principal: Principal, query: VmQuery) -> VmList:
    """Return a page of the VMs that matched every filter when the walk began, oldest first.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable; NotFound when the filter names
    a node that does not exist.
    """
    authorize(principal, Permission.VMS_READ)
    state = context.state
    filters = (principal.scope.tenant, query.label, query.node, query.phase, query.name)
    here = walk(state, query.cursor, *filters)
    node_id = None if query.node is None else find_node(context, query.node).record.id
    then = records(state, Vm, here.at)
    ids = _candidate_ids(context, principal, query, node_id, then)
    start = 0 if here.last is None else bisect_right(ids, here.last)
    page: list[Stored[Vm]] = []
    more: str | None = None
    for position in range(start, len(ids)):
        if position % SCAN_STEP == SCAN_STEP - 1:
            await asyncio.sleep(0)
            then = records(state, Vm, here.at)
        stored = then.get(ids[position])
        if stored is None or not _matches(stored.record, principal, query, node_id):
            continue
        if len(page) == query.limit:
            more = here.cursor(page[-1].record.id)
            break
        page.append(stored)
    epoch = epoch_of(state)
    items = tuple(view(context, stored, epoch) for stored in page)
    return VmList(items=items, next_cursor=more, revision=str(here.at))


async def create_vm(context: Context, principal: Principal, new: NewVm) -> OperationView:
    """Accept a VM to make; the operation succeeds when it runs.

    Raises Forbidden, ValidationFailed, NameTaken, StoreFull, and what committing raises.
    """
    authorize(principal, Permission.VMS_WRITE)
    check_new_vm(context.state, new)
    check_room(context)
    command = CreateVm(
        name=new.name,
        tenant=principal.scope.tenant,
        labels=new.labels,
        spec=new.spec,
        by=author(principal),
    )
    return await accepted(context, principal, command)


async def change_vm(
    context: Context, principal: Principal, reference: str, patch: VmPatch
) -> VmView:
    """Change what of a VM can be changed in place, and return it.

    Raises Forbidden, NotFound, StateConflict, ValidationFailed, what committing raises;
    DeletedSince when the VM was changed, and is gone by the time that this replica can show it.
    """
    authorize(principal, Permission.VMS_WRITE)
    vm_id = find_vm(context, principal, reference).record.id
    # Under a key that was used before, another VM may have been changed: one that had the name.
    changed_id = await context.submit(ChangeVm(vm_id=vm_id, patch=patch, by=author(principal)))
    return changed(context, changed_id)


async def act_on_vm(
    context: Context,
    principal: Principal,
    reference: str,
    action: VmAction,
    deadline_s: float = 60.0,
) -> OperationView:
    """Accept a power verb. Raises Forbidden, NotFound, StateConflict, what committing raises."""
    authorize(principal, Permission.VMS_WRITE)
    vm_id = find_vm(context, principal, reference).record.id
    command = ActOnVm(vm_id=vm_id, action=action, by=author(principal), deadline_s=deadline_s)
    return await accepted(context, principal, command)


async def delete_vm(context: Context, principal: Principal, reference: str) -> OperationView:
    """Accept a VM's deletion. Raises Forbidden, NotFound, StateConflict, what committing raises."""
    authorize(principal, Permission.VMS_WRITE)
    vm_id = find_vm(context, principal, reference).record.id
    return await accepted(context, principal, DeleteVm(vm_id=vm_id, by=author(principal)))


def changed(context: Context, vm_id: str) -> VmView:
    """Return a VM after a change of it. Raises DeletedSince."""
    stored = context.state.vms.get(vm_id)
    if stored is None:
        raise DeletedSince(f"{vm_id} was changed, and has been deleted since")
    return view(context, stored, epoch_of(context.state))


def check_room(context: Context) -> None:
    """Keep what room is left for what cannot be done without. Raises StoreFull.

    Whether a full store is so still, etcd itself says best.
    """
    if context.space.room is Room.SCARCE:
        raise StoreFull(context.space.detail)


def author(principal: Principal) -> Author:
    return Author(principal.name, principal.request_id)


async def accepted(context: Context, principal: Principal, command: Command[str]) -> OperationView:
    operation_id = await context.submit(command)
    operation = await find_operation(context, principal.scope, operation_id)
    if operation is None:
        raise NotFound(f"operation {operation_id} was accepted, but this replica has not seen it")
    return operation_view(operation)


def _candidate_ids(
    context: Context,
    principal: Principal,
    query: VmQuery,
    node_id: str | None,
    then: Then[Vm],
) -> Sequence[str]:
    """Return sorted ids that hold every match, by the narrowest index there is.

    The indexes are of now; whatever changed since may have matched then.
    """
    state = context.state
    if query.name is not None:
        vm_id = state.vm_id_by_name(principal.scope.tenant, query.name)
        return sorted({*then.before, *(() if vm_id is None else (vm_id,))})
    if node_id is not None:
        return sorted({*then.before, *state.vm_ids_on(node_id)})
    return then.ids()


def _matches(vm: Vm, principal: Principal, query: VmQuery, node_id: str | None) -> bool:
    if vm.tenant != principal.scope.tenant or not carries(vm.labels, query.label):
        return False
    if query.name not in (None, vm.name) or node_id not in (None, vm.status.node):
        return False
    return query.phase is None or vm_phase(vm) is query.phase


def view(context: Context, stored: Stored[Vm], epoch: int) -> VmView:
    node_id = stored.record.status.node
    node = None if node_id is None else context.state.nodes.get(node_id)
    return vm_view(stored, epoch, None if node is None else node.record.name)
