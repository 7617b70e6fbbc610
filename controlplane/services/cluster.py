"""Use cases of the cluster as a whole: what it is, what is ready, the end of its upgrades, and a
change of its leader.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.cluster import RecordStoreRepair, StepDown
from controlplane.commands.restored import must_tell
from controlplane.commands.upgrade import FinalizeUpgrade, still_behind, why_too_old
from controlplane.services.context import Context, Leadership, Permission, Principal
from controlplane.services.revisions import cluster_revision
from controlplane.services.scope import authorize
from controlplane.services.views import (
    ClusterView,
    LeaderView,
    MemberView,
    NodeCounts,
    ReplicaView,
    RestoreView,
    StoreView,
)
from controlplane.services.vms import author
from controlplane.state import ClusterState
from controlplane.store.port import MemberStatus, Room
from shared.errors import FieldError, NoLeader, NovacronError, Unavailable
from shared.model import SCHEMA_LEVEL, Cluster, NodeState, Replica

# A member that takes longer than this is shown as it is, unreachable: the page must not hang on it.
MEMBERS_TIMEOUT_S = 5.0
# Nearly all of 10,000 nodes are in the way when an upgrade begins; a page shows the first.
BLOCKERS_SHOWN_MAX = 100
NAMES_SHOWN_MAX = 100


class Check(Struct, frozen=True, kw_only=True):
    """``needed``: without it the replica is not ready; the others are told for who looks."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether this replica can answer, and which of its needs are met."""

    ready: bool
    checks: tuple[Check, ...]


async def get_cluster(context: Context, principal: Principal) -> ClusterView:
    """Return the cell's record, leader, replicas, members and counts.

    Raises Forbidden, Unavailable while this replica has not read the cluster's record.
    """
    authorize(principal, Permission.CLUSTER_READ)
    return await show_cluster(context, principal)


async def finalize_upgrade(context: Context, principal: Principal) -> ClusterView:
    """Let the cluster have all that this release writes, and return it; does nothing a second time.

    Raises Forbidden, UpgradeBlocked with everyone of an older release, what committing raises.
    """
    authorize(principal, Permission.CLUSTER_WRITE)
    command = FinalizeUpgrade(
        replicas=context.replicas(), agents=context.agents(), by=author(principal)
    )
    await context.submit(command)
    return await show_cluster(context, principal)


async def step_down(context: Context, principal: Principal) -> ClusterView:
    """Let the replica that leads give its term up to another; return the cluster as it was.

    The term ends a moment after this has been committed under it. Raises Forbidden, NoLeader,
    StateConflict when another one leads by then, what committing raises.
    """
    authorize(principal, Permission.CLUSTER_WRITE)
    leadership = context.leadership()
    if not leadership.term:
        raise NoLeader("nobody leads at present, so nobody can step down")
    before = await show_cluster(context, principal)
    await context.submit(
        StepDown(term=leadership.term, leader=leadership.replica, by=author(principal))
    )
    return replace(before, revision=cluster_revision(context.state))


async def repair_store(context: Context, principal: Principal) -> ClusterView:
    """Make room in the store, and return the cluster; takes seconds, or minutes where it is large.

    It is written down once there is room for that. Raises Forbidden, StateConflict, StoreFull when
    all that is stored is more than the quota, what the store and committing raise.
    """
    authorize(principal, Permission.CLUSTER_WRITE)
    repaired = await context.space.repair()
    command = RecordStoreRepair(
        before_bytes=repaired.before_bytes,
        after_bytes=repaired.after_bytes,
        skipped=repaired.skipped,
        by=author(principal),
    )
    await context.submit(command)
    return await show_cluster(context, principal)


async def show_cluster(context: Context, principal: Principal) -> ClusterView:
    """Return the cluster to whoever may see it. Raises Unavailable."""
    members = await _members(context)
    state = context.state
    cluster = state.cluster()
    if cluster is None:
        raise Unavailable("this replica has not read the cluster's record yet")
    leadership = context.leadership()
    states = [stored.record.state for stored in state.nodes.values()]
    return ClusterView(
        id=cluster.id,
        cell=cluster.cell,
        epoch=cluster.epoch,
        version=context.version,
        schema_level=cluster.schema_level,
        upgrade_pending=cluster.schema_level < SCHEMA_LEVEL,
        upgrade_blockers=_blockers(context, cluster),
        leader=_leader(leadership),
        replicas=tuple(_replica(replica) for replica in context.replicas()),
        members=tuple(_member(member) for member in members),
        store=StoreView(room=context.space.room, detail=context.space.detail),
        nodes=NodeCounts(
            ready=states.count(NodeState.READY), silent=states.count(NodeState.SILENT)
        ),
        vms=state.vm_count(principal.scope.tenant),
        restore=_restore(state, cluster),
        revision=cluster_revision(state),
    )


def readiness(context: Context) -> Readiness:
    """Return whether this replica can serve: it knows a leader, and can read what the store has."""
    leadership = context.leadership()
    state = context.state
    too_old = why_too_old(state.cluster())
    checks = (
        Check(
            name="leader",
            ok=bool(leadership.term),
            detail=f"{leadership.replica} leads" if leadership.term else "no leader is known",
        ),
        Check(
            name="store",
            ok=state.revision > 0,
            detail=f"read up to revision {state.revision}" if state.revision else "not read yet",
        ),
        Check(
            name="cluster",
            ok=state.cluster() is not None,
            detail="made" if state.cluster() is not None else "not made yet",
        ),
        Check(name="release", ok=not too_old, detail=too_old or context.version),
        # Reads go on without room: no reason to send clients elsewhere, where it is no better.
        Check(
            name="room",
            ok=context.space.room is not Room.FULL,
            detail=context.space.detail,
            needed=False,
        ),
    )
    return Readiness(ready=all(each.ok for each in checks if each.needed), checks=checks)


def _blockers(context: Context, cluster: Cluster) -> tuple[FieldError, ...]:
    """Return what stands in the way of the upgrade's end; the last one counts what is left out."""
    if cluster.schema_level >= SCHEMA_LEVEL:
        return ()
    nodes = (stored.record for stored in context.state.nodes.values())
    found = still_behind(nodes, context.replicas(), context.agents())
    shown = tuple(islice(found, BLOCKERS_SHOWN_MAX))
    more = sum(1 for _ in found)
    if not more:
        return shown
    return (*shown, FieldError("", "more", f"and {more} more"))


def _restore(state: ClusterState, cluster: Cluster) -> RestoreView | None:
    restored = cluster.restored
    if restored is None:
        return None
    nodes = [stored.record for stored in state.nodes.values()]
    untold = [node for node in nodes if must_tell(cluster, node) and not node.recovery.gone]
    return RestoreView(
        backup_at=restored.backup_at,
        at=restored.at,
        recovering=restored.recovering,
        waits_for=tuple(sorted(node.name for node in untold))[:NAMES_SHOWN_MAX],
        gone=tuple(sorted(node.name for node in nodes if node.recovery.gone))[:NAMES_SHOWN_MAX],
        unproven=len(state.unproven_vm_ids()),
        unrecorded=sum(len(node.recovery.unrecorded) for node in nodes),
    )


async def _members(context: Context) -> tuple[MemberStatus, ...]:
    """Return what the members say; nothing when the store cannot even be asked."""
    try:
        async with asyncio.timeout(MEMBERS_TIMEOUT_S):
            return await context.store.members()
    except (TimeoutError, NovacronError):
        return ()


def _leader(leadership: Leadership) -> LeaderView | None:
    if not leadership.term:
        return None
    return LeaderView(
        replica=leadership.replica,
        url=leadership.url,
        term=leadership.term,
        since=leadership.since,
    )


def _replica(replica: Replica) -> ReplicaView:
    return ReplicaView(
        name=replica.name,
        url=replica.url,
        agent_address=replica.agent_address,
        version=replica.version,
    )


def _member(member: MemberStatus) -> MemberView:
    return MemberView(
        id=member.member_id,
        endpoint=member.endpoint,
        reachable=member.reachable,
        version=member.version,
        is_leader=member.is_leader,
        raft_term=member.raft_term,
        revision=member.revision,
        db_size_bytes=member.db_size_bytes,
        db_in_use_bytes=member.db_in_use_bytes,
        alarms=member.alarms,
        problem=member.problem,
    )
