"""Use cases of migrations: ask for one, list them, read one.

A migration is an operation; what is shown under ``/migrations`` are the same records.
"""

from __future__ import annotations

from controlplane.commands.migrations import RequestMigration
from controlplane.sagas.migrate import MIGRATION
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.requests import MigrateOrder
from controlplane.services.scope import authorize, find_node, find_vm
from controlplane.services.views import OperationView
from controlplane.services.vms import accepted, author


async def migrate_vm(
    context: Context, principal: Principal, reference: str, order: MigrateOrder
) -> OperationView:
    """Accept a live migration; without a destination the scheduler chooses one.

    Raises Forbidden, NotFound, StateConflict, and what committing raises.
    """
    authorize(principal, Permission.VMS_WRITE)
    vm_id = find_vm(context, principal, reference).record.id
    wanted = None if order.destination is None else find_node(context, order.destination)
    command = RequestMigration(
        vm_id=vm_id,
        destination=None if wanted is None else wanted.record.id,
        steps=MIGRATION.names,
        no_return=MIGRATION.no_return,
        by=author(principal),
    )
    return await accepted(context, principal, command)
