"""The one table of routes: what each path takes, demands and answers.

The application, the OpenAPI document and the tests are made of it. A handler hands over to a use
case, which checks the permission again: the table's is for the document, and to refuse before a
body is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from controlplane.api.answer import BYTES, TEXT, Answer, Streamed, json_answer
from controlplane.commands.vm_patch import VmPatch
from controlplane.services import (
    admission,
    audit,
    backups,
    cluster,
    console,
    drains,
    events,
    metrics,
    migrations,
    nodes,
    operations,
    placement,
    plans,
    vms,
)
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.metrics import scrape_view
from controlplane.services.requests import (
    VM_IMMUTABLE,
    AuditQuery,
    ConsoleQuery,
    CordonOrder,
    DrainOrder,
    DryRunQuery,
    Enrolment,
    EventQuery,
    MigrateOrder,
    MigrationQuery,
    NewJoinToken,
    NewVm,
    NoBody,
    NodeQuery,
    NoQuery,
    OperationQuery,
    PageQuery,
    RevokeOrder,
    ShutdownOrder,
    UsageQuery,
    VmQuery,
    WaitQuery,
)
from controlplane.services.views import (
    AdmissionList,
    AdmissionView,
    AuditList,
    ClusterView,
    EnrolmentView,
    EventList,
    JoinTokenList,
    JoinTokenView,
    MigrationList,
    MigrationView,
    NewJoinTokenView,
    NodeList,
    NodeView,
    OperationList,
    OperationView,
    PlacementView,
    SeriesView,
    UsageList,
    VmList,
    VmView,
)
from controlplane.telemetry.exporter import CONTENT_TYPE, Metrics
from shared.states import VmAction

BASE = "/api/v1"
PEM = b"application/x-pem-file"


class Call(Struct, frozen=True):
    """One authorized, checked request; ``path`` has the values of the template's names."""

    context: Context
    metrics: Metrics
    principal: Principal
    path: dict[str, str]
    query: Any
    body: Any


Handler = Callable[[Call], Awaitable[object]]


class Route(Struct, frozen=True, kw_only=True):
    """One method of one path.

    ``permission`` None: open to everyone. ``view`` is what the handler returns, to be sent as JSON
    with ``status``; a handler of a route without one returns an Answer of type ``text``.
    ``follows``: the same list also comes as an event stream. ``streams``: the handler returns what
    is sent as it is made. ``immutable``: pointers of what an
    object has and its patch may not name.
    """

    method: str
    path: str
    handler: Handler
    permission: Permission | None
    summary: str
    view: type[Struct] | None = None
    text: str = ""
    body: type[Struct] = NoBody
    query: type[Struct] = NoQuery
    status: int = 200
    follows: bool = False
    streams: bool = False
    immutable: frozenset[str] = frozenset()

    @property
    def changes(self) -> bool:
        """Whether it may change something; a plan that is posted changes nothing."""
        return self.permission is not None and self.permission.endswith(":write")


async def _healthz(call: Call) -> Answer:
    return json_answer(200, {"status": "ok"})


async def _readyz(call: Call) -> Answer:
    found = cluster.readiness(call.context)
    return json_answer(200 if found.ready else 503, found)


async def _scrape(call: Call) -> Streamed:
    view = await scrape_view(call.context.state)
    return Streamed(CONTENT_TYPE.encode(), call.metrics.render(view))


async def _console_log(call: Call) -> Answer:
    log = await console.console_log(call.context, call.principal, call.path["vm"], call.query)
    return Answer(200, TEXT, log)


async def _ca(call: Call) -> Answer:
    return Answer(200, PEM, await admission.read_ca(call.context))


async def _backup(call: Call) -> Streamed:
    return Streamed(BYTES, await backups.back_up(call.context, call.principal))


def _vm_action(action: VmAction, summary: str) -> Route:
    return Route(
        method="POST",
        path=f"{BASE}/vms/{{vm}}/actions/{action}",
        handler=lambda c: vms.act_on_vm(c.context, c.principal, c.path["vm"], action),
        permission=Permission.VMS_WRITE,
        summary=summary,
        view=OperationView,
        status=202,
    )


def _planned_vm_action(action: VmAction, summary: str) -> Route:
    """Return the route of a verb that can be asked for its plan first."""
    return Route(
        method="POST",
        path=f"{BASE}/vms/{{vm}}/actions/{action}",
        handler=lambda c: (plans.plan_action if c.query.dry_run else vms.act_on_vm)(
            c.context, c.principal, c.path["vm"], action
        ),
        permission=Permission.VMS_WRITE,
        summary=summary,
        view=OperationView,
        query=DryRunQuery,
        status=202,
    )


def _cordon(*, cordoned: bool, summary: str) -> Route:
    return Route(
        method="POST",
        path=f"{BASE}/nodes/{{node}}/actions/{'cordon' if cordoned else 'uncordon'}",
        handler=lambda c: nodes.set_cordon(
            c.context, c.principal, c.path["node"], c.body, cordoned=cordoned
        ),
        permission=Permission.NODES_WRITE,
        summary=summary,
        view=NodeView,
        body=CordonOrder,
    )


# Literal paths stand before those with names; what is asked most stands first.
ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path=f"{BASE}/vms",
        handler=lambda c: vms.list_vms(c.context, c.principal, c.query),
        permission=Permission.VMS_READ,
        summary="List VMs, oldest first",
        view=VmList,
        query=VmQuery,
    ),
    Route(
        method="POST",
        path=f"{BASE}/vms",
        handler=lambda c: (plans.plan_create if c.query.dry_run else vms.create_vm)(
            c.context, c.principal, c.body
        ),
        permission=Permission.VMS_WRITE,
        summary="Create a VM",
        view=OperationView,
        body=NewVm,
        query=DryRunQuery,
        status=202,
    ),
    Route(
        method="GET",
        path=f"{BASE}/vms/{{vm}}",
        handler=lambda c: vms.get_vm(c.context, c.principal, c.path["vm"]),
        permission=Permission.VMS_READ,
        summary="Get a VM by id or name",
        view=VmView,
    ),
    Route(
        method="PATCH",
        path=f"{BASE}/vms/{{vm}}",
        handler=lambda c: vms.change_vm(c.context, c.principal, c.path["vm"], c.body),
        permission=Permission.VMS_WRITE,
        summary="Change what of a VM can be changed in place (merge patch)",
        view=VmView,
        body=VmPatch,
        immutable=VM_IMMUTABLE,
    ),
    Route(
        method="DELETE",
        path=f"{BASE}/vms/{{vm}}",
        handler=lambda c: (plans.plan_delete if c.query.dry_run else vms.delete_vm)(
            c.context, c.principal, c.path["vm"]
        ),
        permission=Permission.VMS_WRITE,
        summary="Delete a VM and its disks",
        view=OperationView,
        query=DryRunQuery,
        status=202,
    ),
    Route(
        method="GET",
        path=f"{BASE}/vms/{{vm}}/placement",
        handler=lambda c: placement.explain_vm(c.context, c.principal, c.path["vm"]),
        permission=Permission.VMS_READ,
        summary="Explain where a VM can run now, node by node",
        view=PlacementView,
    ),
    Route(
        method="GET",
        path=f"{BASE}/vms/{{vm}}/metrics",
        handler=lambda c: metrics.vm_series(c.context, c.principal, c.path["vm"]),
        permission=Permission.METRICS_READ,
        summary="Get the last ten minutes of a VM's figures",
        view=SeriesView,
    ),
    Route(
        method="GET",
        path=f"{BASE}/vms/{{vm}}/console-log",
        handler=_console_log,
        permission=Permission.VMS_READ,
        summary="Read a part of a VM's serial console log",
        text=TEXT.decode(),
        query=ConsoleQuery,
    ),
    Route(
        method="POST",
        path=f"{BASE}/vms/{{vm}}/actions/{VmAction.SHUTDOWN}",
        handler=lambda c: (plans.plan_action if c.query.dry_run else vms.act_on_vm)(
            c.context, c.principal, c.path["vm"], VmAction.SHUTDOWN, c.body.deadline_s
        ),
        permission=Permission.VMS_WRITE,
        summary="Ask the guest to shut down, and stop it at a deadline",
        view=OperationView,
        body=ShutdownOrder,
        query=DryRunQuery,
        status=202,
    ),
    _planned_vm_action(VmAction.START, "Start a stopped VM"),
    _planned_vm_action(VmAction.STOP, "Stop a VM at once"),
    _vm_action(VmAction.REBOOT, "Ask the guest to reboot"),
    _vm_action(VmAction.RESET, "Reset a VM as by its button"),
    _vm_action(VmAction.PAUSE, "Pause a running VM"),
    _vm_action(VmAction.RESUME, "Resume a paused VM"),
    Route(
        method="POST",
        path=f"{BASE}/vms/{{vm}}/actions/migrate",
        handler=lambda c: (migrations.plan_migration if c.query.dry_run else migrations.migrate_vm)(
            c.context, c.principal, c.path["vm"], c.body
        ),
        permission=Permission.VMS_WRITE,
        summary="Move a running VM to another node, live",
        view=OperationView,
        body=MigrateOrder,
        query=DryRunQuery,
        status=202,
    ),
    Route(
        method="GET",
        path=f"{BASE}/nodes",
        handler=lambda c: nodes.list_nodes(c.context, c.principal, c.query),
        permission=Permission.NODES_READ,
        summary="List nodes, oldest first",
        view=NodeList,
        query=NodeQuery,
    ),
    Route(
        method="GET",
        path=f"{BASE}/nodes/{{node}}",
        handler=lambda c: nodes.get_node(c.context, c.principal, c.path["node"]),
        permission=Permission.NODES_READ,
        summary="Get a node by id or name",
        view=NodeView,
    ),
    Route(
        method="GET",
        path=f"{BASE}/nodes/{{node}}/metrics",
        handler=lambda c: metrics.node_series(c.context, c.principal, c.path["node"]),
        permission=Permission.METRICS_READ,
        summary="Get the last ten minutes of a node's figures",
        view=SeriesView,
    ),
    _cordon(cordoned=True, summary="Keep new VMs away from a node"),
    _cordon(cordoned=False, summary="Let new VMs go to a node again"),
    Route(
        method="DELETE",
        path=f"{BASE}/nodes/{{node}}",
        handler=lambda c: nodes.remove_node(c.context, c.principal, c.path["node"]),
        permission=Permission.NODES_WRITE,
        summary="Forget a node that has nothing any more, and shut it out",
        view=NodeView,
    ),
    Route(
        method="POST",
        path=f"{BASE}/nodes/{{node}}/actions/declare-gone",
        handler=lambda c: nodes.declare_gone(c.context, c.principal, c.path["node"]),
        permission=Permission.NODES_WRITE,
        summary="Say that nothing runs on a node any more, which a restored cluster waits for",
        view=NodeView,
    ),
    Route(
        method="POST",
        path=f"{BASE}/nodes/{{node}}/actions/drain",
        handler=lambda c: (drains.plan_drain if c.query.dry_run else drains.drain_node)(
            c.context, c.principal, c.path["node"], c.body
        ),
        permission=Permission.NODES_WRITE,
        summary="Cordon a node and move its VMs away",
        view=OperationView,
        body=DrainOrder,
        query=DryRunQuery,
        status=202,
    ),
    Route(
        method="GET",
        path=f"{BASE}/migrations",
        handler=lambda c: migrations.list_migrations(c.context, c.principal, c.query),
        permission=Permission.OPERATIONS_READ,
        summary="List migrations, newest first",
        view=MigrationList,
        query=MigrationQuery,
    ),
    Route(
        method="GET",
        path=f"{BASE}/migrations/{{operation}}",
        handler=lambda c: migrations.get_migration(c.context, c.principal, c.path["operation"]),
        permission=Permission.OPERATIONS_READ,
        summary="Get a migration",
        view=MigrationView,
    ),
    Route(
        method="GET",
        path=f"{BASE}/operations",
        handler=lambda c: operations.list_operations(c.context, c.principal, c.query),
        permission=Permission.OPERATIONS_READ,
        summary="List operations, newest first",
        view=OperationList,
        query=OperationQuery,
    ),
    Route(
        method="GET",
        path=f"{BASE}/operations/{{operation}}",
        handler=lambda c: operations.get_operation(
            c.context, c.principal, c.path["operation"], c.query.wait
        ),
        permission=Permission.OPERATIONS_READ,
        summary="Get an operation; waits for its end when asked to",
        view=OperationView,
        query=WaitQuery,
    ),
    Route(
        method="POST",
        path=f"{BASE}/operations/{{operation}}/actions/cancel",
        handler=lambda c: operations.cancel_operation(c.context, c.principal, c.path["operation"]),
        permission=Permission.OPERATIONS_WRITE,
        summary="Undo a migration or drain that is under way",
        view=OperationView,
        status=202,
    ),
    Route(
        method="GET",
        path=f"{BASE}/events",
        handler=lambda c: events.list_events(c.context, c.principal, c.query),
        permission=Permission.EVENTS_READ,
        summary="List events, oldest first, or follow them (Accept: text/event-stream)",
        view=EventList,
        query=EventQuery,
        follows=True,
    ),
    Route(
        method="GET",
        path=f"{BASE}/audit-records",
        handler=lambda c: audit.list_audit_records(c.context, c.principal, c.query),
        permission=Permission.AUDIT_READ,
        summary="List who asked for which change, oldest first",
        view=AuditList,
        query=AuditQuery,
    ),
    Route(
        method="POST",
        path=f"{BASE}/placement-plans",
        handler=lambda c: placement.plan_new_vm(c.context, c.principal, c.body),
        permission=Permission.VMS_READ,
        summary="Plan where a VM would go, node by node; changes nothing",
        view=PlacementView,
        body=NewVm,
    ),
    Route(
        method="GET",
        path=f"{BASE}/metrics",
        handler=lambda c: metrics.list_usage(c.context, c.principal, c.query),
        permission=Permission.METRICS_READ,
        summary="List the latest figures of nodes or VMs",
        view=UsageList,
        query=UsageQuery,
    ),
    Route(
        method="GET",
        path=f"{BASE}/cluster",
        handler=lambda c: cluster.get_cluster(c.context, c.principal),
        permission=Permission.CLUSTER_READ,
        summary="Get the cluster: leader, replicas, store members, counts",
        view=ClusterView,
    ),
    Route(
        method="GET",
        path=f"{BASE}/cluster/backup",
        handler=_backup,
        permission=Permission.CLUSTER_BACKUP,
        summary="Read a backup of the control plane (for novacron cluster restore)",
        text=BYTES.decode(),
        streams=True,
    ),
    Route(
        method="POST",
        path=f"{BASE}/cluster/actions/finalize-upgrade",
        handler=lambda c: cluster.finalize_upgrade(c.context, c.principal),
        permission=Permission.CLUSTER_WRITE,
        summary="Allow what is new in this release, once every replica and agent runs it",
        view=ClusterView,
        query=DryRunQuery,
    ),
    Route(
        method="POST",
        path=f"{BASE}/cluster/actions/step-down",
        handler=lambda c: cluster.step_down(c.context, c.principal),
        permission=Permission.CLUSTER_WRITE,
        summary="Let the leader give its term up to another replica",
        view=ClusterView,
    ),
    Route(
        method="POST",
        path=f"{BASE}/cluster/actions/repair-store",
        handler=lambda c: cluster.repair_store(c.context, c.principal),
        permission=Permission.CLUSTER_WRITE,
        summary="Make room in the store: compact, defragment, take its alarm back",
        view=ClusterView,
    ),
    Route(
        method="POST",
        path=f"{BASE}/join-tokens",
        handler=lambda c: admission.make_join_token(c.context, c.principal, c.body),
        permission=Permission.NODES_WRITE,
        summary="Make a token that lets one node join",
        view=NewJoinTokenView,
        body=NewJoinToken,
        status=201,
    ),
    Route(
        method="GET",
        path=f"{BASE}/join-tokens",
        handler=lambda c: admission.list_join_tokens(c.context, c.principal, c.query),
        permission=Permission.NODES_READ,
        summary="List join tokens",
        view=JoinTokenList,
        query=PageQuery,
    ),
    Route(
        method="DELETE",
        path=f"{BASE}/join-tokens/{{token}}",
        handler=lambda c: admission.withdraw_join_token(c.context, c.principal, c.path["token"]),
        permission=Permission.NODES_WRITE,
        summary="Have nobody join with a token any more",
        view=JoinTokenView,
    ),
    Route(
        method="GET",
        path=f"{BASE}/admissions",
        handler=lambda c: admission.list_admissions(c.context, c.principal, c.query),
        permission=Permission.NODES_READ,
        summary="List which nodes were let in, wait for it, or are revoked",
        view=AdmissionList,
        query=PageQuery,
    ),
    Route(
        method="POST",
        path=f"{BASE}/admissions/{{name}}/actions/approve",
        handler=lambda c: admission.approve(c.context, c.principal, c.path["name"]),
        permission=Permission.NODES_WRITE,
        summary="Let a node in that waits for it",
        view=AdmissionView,
    ),
    Route(
        method="POST",
        path=f"{BASE}/admissions/{{name}}/actions/revoke",
        handler=lambda c: admission.revoke(c.context, c.principal, c.path["name"], c.body),
        permission=Permission.NODES_WRITE,
        summary="Have no certificate speak for a node any more",
        view=AdmissionView,
        body=RevokeOrder,
    ),
    Route(
        method="GET",
        path=f"{BASE}/ca",
        handler=_ca,
        permission=None,
        summary="Read the cell's CA, for a node that knows its fingerprint",
        text=PEM.decode(),
    ),
    Route(
        method="POST",
        path=f"{BASE}/enrolments",
        handler=lambda c: admission.enrol(c.context, c.body),
        permission=None,
        summary="Join as a node, with a join token",
        view=EnrolmentView,
        body=Enrolment,
    ),
    Route(
        method="GET",
        path="/healthz",
        handler=_healthz,
        permission=None,
        summary="Tell that the process answers",
        text="application/json",
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=_readyz,
        permission=None,
        summary="Tell whether this replica can serve, need by need",
        view=cluster.Readiness,
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=_scrape,
        permission=Permission.METRICS_READ,
        summary="Scrape this replica's metrics (Prometheus text format)",
        text=CONTENT_TYPE,
        streams=True,
    ),
)
