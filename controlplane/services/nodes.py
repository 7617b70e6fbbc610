"""Use cases of nodes: list, read, cordon, give up for gone, remove."""

from __future__ import annotations

import asyncio

from controlplane.commands.nodes import RemoveNode, SetCordon
from controlplane.commands.recovery import DeclareGone
from controlplane.commands.restored import must_tell
from controlplane.scheduler.snapshot import loads_of
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.pages import cut, records, walk
from controlplane.services.requests import CordonOrder, NodeQuery
from controlplane.services.revisions import epoch_of, object_revision
from controlplane.services.scope import authorize, find_node
from controlplane.services.selection import carries
from controlplane.services.views import Allocated, NodeList, NodeView
from controlplane.services.vms import author
from controlplane.state import ClusterState, Stored
from shared.model import Node

# Nodes summed up before other tasks get their turn: about 4 ms where each has 100 VMs.
NODES_STEP = 20


async def get_node(context: Context, principal: Principal, reference: str) -> NodeView:
    """Return one node. Raises Forbidden, NotFound."""
    authorize(principal, Permission.NODES_READ)
    return node_view(context.state, find_node(context, reference))


async def list_nodes(context: Context, principal: Principal, query: NodeQuery) -> NodeList:
    """Return a page of the cell's nodes that match, oldest first.

    The records are as of the walk's beginning, what their VMs take as of now. Raises Forbidden,
    ValidationFailed, CursorExpired, Unavailable.
    """
    authorize(principal, Permission.NODES_READ)
    state = context.state
    here = walk(state, query.cursor, "nodes", query.label)
    then = records(state, Node, here.at)
    found = [stored for stored in map(then.get, then.ids()) if stored is not None]
    if query.label:
        found = [stored for stored in found if carries(stored.record.labels, query.label)]
    page, next_cursor = cut(here, found, query.limit, _id)
    items: list[NodeView] = []
    for position, stored in enumerate(page):
        if position % NODES_STEP == NODES_STEP - 1:
            await asyncio.sleep(0)
        items.append(node_view(state, stored))
    return NodeList(
        items=tuple(items),
        next_cursor=next_cursor,
        revision=str(here.at),
    )


async def set_cordon(
    context: Context, principal: Principal, reference: str, order: CordonOrder, *, cordoned: bool
) -> NodeView:
    """Cordon or uncordon a node and return it.

    Raises Forbidden, NotFound, StateConflict when it is so already, and what committing raises.
    """
    authorize(principal, Permission.NODES_WRITE)
    node_id = find_node(context, reference).record.id
    await context.submit(
        SetCordon(node_id=node_id, cordoned=cordoned, reason=order.reason, by=author(principal))
    )
    return node_view(context.state, find_node(context, node_id))


async def declare_gone(context: Context, principal: Principal, reference: str) -> NodeView:
    """Take an operator's word that nothing runs on a node any more, and return the node.

    Raises Forbidden, NotFound, StateConflict when nobody waits for it or it is heard, and what
    committing raises.
    """
    authorize(principal, Permission.NODES_WRITE)
    node_id = find_node(context, reference).record.id
    await context.submit(DeclareGone(node_id=node_id, by=author(principal)))
    return node_view(context.state, find_node(context, node_id))


async def remove_node(context: Context, principal: Principal, reference: str) -> NodeView:
    """Forget a node that has nothing any more, and shut it out; returns it as it was.

    Raises Forbidden, NotFound, StateConflict while anything of a VM is there or may be, and what
    committing raises.
    """
    authorize(principal, Permission.NODES_WRITE)
    stored = find_node(context, reference)
    await context.submit(RemoveNode(node_id=stored.record.id, by=author(principal)))
    return node_view(context.state, stored)


def node_view(state: ClusterState, stored: Stored[Node]) -> NodeView:
    node = stored.record
    return NodeView(
        id=node.id,
        name=node.name,
        labels=node.labels,
        created_at=node.created_at,
        updated_at=node.updated_at,
        revision=object_revision(epoch_of(state), stored.revision),
        cordoned=node.cordoned,
        cordon_reason=node.cordon_reason,
        state=node.state,
        state_since=node.state_since,
        address=node.address,
        boot_id=node.boot_id,
        inventory=node.inventory,
        foreign_domains=node.foreign_domains,
        must_tell=must_tell(state.cluster(), node),
        gone=node.recovery.gone,
        unrecorded_vms=node.recovery.unrecorded,
        allocated=allocated(state, node.id),
    )


def _id(stored: Stored[Node]) -> str:
    return stored.record.id


def allocated(state: ClusterState, node_id: str) -> Allocated:
    """Return what the VMs that are bound to a node take of it."""
    vcpus = memory_mib = vms = 0
    for vm_id in state.vm_ids_on(node_id):
        vms += 1
        load = loads_of(state.vms[vm_id].record).get(node_id)
        if load is not None:
            vcpus += load.vcpus
            memory_mib += load.memory_mib
    return Allocated(vcpus=vcpus, memory_mib=memory_mib, vms=vms)
