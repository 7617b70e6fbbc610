"""Use cases of audit records: who asked for which change, in the order in which they were made."""

from __future__ import annotations

from controlplane.services.context import Context, Permission, Principal
from controlplane.services.pages import walk
from controlplane.services.requests import AuditQuery
from controlplane.services.revisions import epoch_of
from controlplane.services.scope import authorize, object_ids
from controlplane.services.stretches import page_start, stretch_after
from controlplane.services.views import AuditList, audit_view
from controlplane.store.history import EntryFilter, EntryType
from shared.model import AuditRecord


async def list_audit_records(
    context: Context, principal: Principal, query: AuditQuery
) -> AuditList:
    """Return a page of audit records, oldest first, those after ``since`` only.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable, HistoryGone.
    """
    authorize(principal, Permission.AUDIT_READ)
    filters = ("audit", principal.scope.tenant, query.since, query.object, query.action)
    objects = object_ids(context, principal, query.object)
    here = walk(context.state, query.cursor, *filters, objects=objects)
    wanted = EntryFilter(
        type=EntryType.AUDIT,
        tenant=principal.scope.tenant,
        since=await page_start(context, here, query.since),
        until=here.at.seq,
        objects=here.objects,
        kinds=query.action,
        limit=query.limit,
    )
    stretch = await stretch_after(context, wanted)
    epoch = epoch_of(context.state)
    found = (entry for entry in stretch.entries if isinstance(entry, AuditRecord))
    return AuditList(
        items=tuple(audit_view(record, epoch) for record in found),
        next_cursor=None if stretch.complete else here.cursor(str(stretch.seq)),
        revision=str(here.at),
    )
