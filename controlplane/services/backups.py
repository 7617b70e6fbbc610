"""The use case of a backup of the control plane: anyone who may can take one from any replica."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from controlplane.backup.take import take
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.scope import authorize
from shared.errors import Unavailable


async def back_up(context: Context, principal: Principal) -> AsyncGenerator[bytes]:
    """Return the pieces of a backup, as they are read.

    Raises Forbidden, Unavailable while this replica has not read the cluster's record.
    """
    authorize(principal, Permission.CLUSTER_BACKUP)
    cluster = context.state.cluster()
    if cluster is None:
        raise Unavailable("this replica has not read the cluster's record yet")
    now = context.clock.now()
    return take(context.store, context.history, cluster, context.version, now)
