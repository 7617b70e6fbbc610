"""Use cases of figures: what nodes and VMs use, from the windows of whichever replica has them.

Figures are ephemeral: each answer says of when they are (``as_of``), and an object that was not
heard of yet has none.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from msgspec.structs import astuple

from controlplane.services.context import Context, Permission, Principal
from controlplane.services.nodes import NODES_STEP, allocated
from controlplane.services.pages import cut, records, walk
from controlplane.services.requests import UsageKind, UsageQuery
from controlplane.services.revisions import ClusterRevision
from controlplane.services.scope import authorize, find_node, find_vm
from controlplane.services.views import Figures, SeriesView, UsageList, UsageView
from controlplane.services.vms import SCAN_STEP
from controlplane.state import ClusterState
from controlplane.telemetry.exporter import NodeFigures, VmFigures
from controlplane.telemetry.windows import Rates
from shared.model import Node, NodeState, Vm
from shared.units import MIB

# Agents measure to no better than this, and single precision has noise behind it.
_DIGITS = 3


async def vm_series(context: Context, principal: Principal, reference: str) -> SeriesView:
    """Return the last ten minutes of a VM. Raises Forbidden, NotFound."""
    authorize(principal, Permission.METRICS_READ)
    return await _series(context, find_vm(context, principal, reference).record.id)


async def node_series(context: Context, principal: Principal, reference: str) -> SeriesView:
    """Return the last ten minutes of a node. Raises Forbidden, NotFound."""
    authorize(principal, Permission.METRICS_READ)
    return await _series(context, find_node(context, reference).record.id)


async def list_usage(context: Context, principal: Principal, query: UsageQuery) -> UsageList:
    """Return the latest figures of a page of nodes or VMs.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable.
    """
    authorize(principal, Permission.METRICS_READ)
    here = walk(context.state, query.cursor, "usage", query.kind)
    names = _names(context.state, principal, query.kind, here.at)
    ids = sorted(names)
    page, next_cursor = cut(here, ids, query.limit, str)
    latest = await context.figures.latest(page)
    return UsageList(
        items=tuple(_usage(each, names[each], latest.get(each)) for each in page),
        next_cursor=next_cursor,
        revision=str(here.at),
    )


class ScrapeView:
    """The records as the Prometheus exporter reads them: the whole cell, whatever the tenant."""

    def __init__(self, nodes: list[NodeFigures], vms: list[VmFigures]) -> None:
        self._nodes = nodes
        self._vms = vms

    def nodes(self) -> list[NodeFigures]:
        return self._nodes

    def vms(self) -> list[VmFigures]:
        return self._vms


async def scrape_view(state: ClusterState) -> ScrapeView:
    """Read the records for a scrape, in steps that leave the event loop to others in between."""
    nodes: list[NodeFigures] = []
    for position, node in enumerate([stored.record for stored in state.nodes.values()]):
        if position % NODES_STEP == NODES_STEP - 1:
            await asyncio.sleep(0)
        nodes.append(_node_figures(state, node))
    names = {node.id: node.name for node in nodes}
    vms: list[VmFigures] = []
    for position, vm in enumerate([stored.record for stored in state.vms.values()]):
        if position % SCAN_STEP == SCAN_STEP - 1:
            await asyncio.sleep(0)
        vms.append(_vm_figures(vm, names))
    return ScrapeView(nodes, vms)


def _node_figures(state: ClusterState, node: Node) -> NodeFigures:
    inventory = node.inventory
    taken = allocated(state, node.id)
    return NodeFigures(
        id=node.id,
        name=node.name,
        ready=node.state is NodeState.READY,
        cordoned=node.cordoned,
        capacity_cpus=0 if inventory is None else inventory.cpus,
        capacity_memory_bytes=0 if inventory is None else inventory.memory_mib * MIB,
        allocated_vcpus=taken.vcpus,
        allocated_memory_bytes=taken.memory_mib * MIB,
    )


def _vm_figures(vm: Vm, node_names: dict[str, str]) -> VmFigures:
    return VmFigures(
        id=vm.id,
        name=vm.name,
        tenant=vm.tenant,
        domain=vm.domain_name,
        node_name="" if vm.status.node is None else node_names.get(vm.status.node, ""),
    )


async def _series(context: Context, object_id: str) -> SeriesView:
    found = await context.figures.series(object_id)
    points = () if found is None else found.points
    rows = [_figures(point) for point in points]
    return SeriesView(
        object=object_id,
        as_of=_date(points[-1].at) if points else None,
        period_s=context.figures.period_s,
        at=tuple(_date(point.at) for point in points),
        series={
            name: tuple(getattr(row, name) for row in rows)
            for name in (Figures.__struct_fields__ if rows else ())
        },
        latest=rows[-1] if rows else None,
    )


def _usage(object_id: str, name: str, rates: Rates | None) -> UsageView:
    return UsageView(
        object=object_id,
        name=name,
        latest=None if rates is None else _figures(rates),
        as_of=None if rates is None else _date(rates.at),
    )


def _names(
    state: ClusterState, principal: Principal, kind: UsageKind, at: ClusterRevision
) -> dict[str, str]:
    if kind is UsageKind.NODE:
        nodes = records(state, Node, at)
        return {n.record.id: n.record.name for n in map(nodes.get, nodes.ids()) if n is not None}
    vms = records(state, Vm, at)
    return {
        vm.record.id: vm.record.name
        for vm in map(vms.get, vms.ids())
        if vm is not None and vm.record.tenant == principal.scope.tenant
    }


def _figures(rates: Rates) -> Figures:
    values = dict(zip(Rates.__struct_fields__, astuple(rates), strict=True))
    return Figures(**{name: round(values[name], _DIGITS) for name in Figures.__struct_fields__})


def _date(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
