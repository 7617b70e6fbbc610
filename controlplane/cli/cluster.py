"""`novacron cluster`: the control plane, its leader, store and backups, the end of an upgrade."""

from __future__ import annotations

import click

from controlplane.cli import output as out
from controlplane.cli.client import BASE, Answer
from controlplane.cli.cluster_backup import backup
from controlplane.cli.cluster_restore import restore
from controlplane.cli.dry_run import DRY_RUN, dry_run_option
from controlplane.cli.invocation import (
    Invocation,
    output_option,
    pass_invocation,
    watch_options,
)
from controlplane.cli.output import Format, Output, Table
from controlplane.cli.views import ClusterView, LeaderView, RestoreView
from controlplane.cli.watching import show

NOBODY = "nobody leads"
# A large database is gone through member by member, at most 3 minutes each.
REPAIR_EXTRA_S = 900.0


@click.group()
def cluster() -> None:
    """The control plane itself."""


@cluster.command()
@output_option
@watch_options
@pass_invocation
def status(invocation: Invocation, form: str | None, watch: bool, interval: float) -> None:
    """Show who leads, which replicas there are, and how many nodes and VMs."""
    output = invocation.output(form)

    def view() -> None:
        answer = _fetch(invocation)
        if not _shown_otherwise(output, answer):
            output.description(_status_fields(answer.decode(ClusterView)))

    show(invocation.terminal, view, watch=watch, interval_s=interval)


@cluster.command()
@output_option
@watch_options
@pass_invocation
def members(invocation: Invocation, form: str | None, watch: bool, interval: float) -> None:
    """List the members of the store."""
    output = invocation.output(form)

    def view() -> None:
        answer = _fetch(invocation)
        seen = answer.decode(ClusterView)
        if output.form is Format.NAME:
            output.names([member.endpoint for member in seen.members])
        elif not _shown_otherwise(output, answer):
            output.table(_member_table(seen))

    show(invocation.terminal, view, watch=watch, interval_s=interval)


@cluster.command()
@output_option
@watch_options
@pass_invocation
def leader(invocation: Invocation, form: str | None, watch: bool, interval: float) -> None:
    """Show which replica leads, in which term and since when."""
    output = invocation.output(form)

    def view() -> None:
        answer = _fetch(invocation)
        seen = answer.decode(ClusterView).leader or LeaderView()
        if output.form is Format.NAME:
            output.names([seen.replica] if seen.replica else [])
        elif not _shown_otherwise(output, answer):
            output.description(_leader_fields(seen))

    show(invocation.terminal, view, watch=watch, interval_s=interval)


@cluster.command("step-down")
@output_option
@pass_invocation
def step_down(invocation: Invocation, form: str | None) -> None:
    """Let the leader give its term up, so that another replica leads.

    Guests and what is under way are not touched. Where there is one replica it leads again.
    """
    output = invocation.output(form)
    answer = invocation.client.post(f"{BASE}/cluster/actions/step-down")
    if _shown_otherwise(output, answer):
        return
    seen = answer.decode(ClusterView).leader or LeaderView()
    output.line(f"{seen.replica} gives up its term {seen.term}; see: novacron cluster leader")


@cluster.command("repair-store")
@output_option
@pass_invocation
def repair_store(invocation: Invocation, form: str | None) -> None:
    """Make room in etcd when it is full: compact, defragment, and take its alarm back.

    One member after the other answers nobody for a while, seconds as a rule. Guests are not
    touched. When all that is stored is more than etcd's quota, start etcd with a larger one.
    """
    output = invocation.output(form)
    path = f"{BASE}/cluster/actions/repair-store"
    answer = invocation.client.post(path, extra_timeout_s=REPAIR_EXTRA_S)
    if _shown_otherwise(output, answer):
        return
    for each in answer.decode(ClusterView).members:
        sizes = f"{out.size(each.db_size_bytes)}, {out.size(each.db_in_use_bytes)} in use"
        output.line(f"{each.endpoint}: {sizes if each.reachable else each.problem}")


cluster.add_command(backup)
cluster.add_command(restore)


@cluster.command("finalize-upgrade")
@dry_run_option
@output_option
@pass_invocation
def finalize_upgrade(invocation: Invocation, dry_run: bool, form: str | None) -> None:
    """Allow what is new in this release, once every replica and agent runs it.

    Until then the release before may be put back; from then on, no more. Asked again, it does
    nothing.
    """
    output = invocation.output(form)
    path = f"{BASE}/cluster/actions/finalize-upgrade"
    answer = invocation.client.post(path, query=DRY_RUN if dry_run else ())
    if _shown_otherwise(output, answer):
        return
    seen = answer.decode(ClusterView)
    if seen.upgrade_pending:
        output.line(f"nothing stands in the way; the schema level is {seen.schema_level} still")
    else:
        output.line(f"the cluster is at schema level {seen.schema_level}, as {seen.version} needs")


def _fetch(invocation: Invocation) -> Answer:
    return invocation.client.get(f"{BASE}/cluster")


def _shown_otherwise(output: Output, answer: Answer) -> bool:
    if output.form is Format.JSON:
        output.json(answer.body)
    elif output.form is Format.NAME:
        output.names([answer.decode(ClusterView).id])
    return output.form is not Format.TABLE


def _status_fields(seen: ClusterView) -> list[tuple[str, str]]:
    leads = NOBODY
    if seen.leader is not None and seen.leader.replica:
        leads = f"{seen.leader.replica} ({seen.leader.url}), term {seen.leader.term}"
    replicas = [f"{r.name} ({r.url}), version {r.version}" for r in seen.replicas]
    reachable = sum(member.reachable for member in seen.members)
    alarms = [f"{m.endpoint}: {alarm}" for m in seen.members for alarm in m.alarms]
    nodes = ", ".join(f"{count} {state}" for state, count in seen.nodes.items() if count)
    return [
        ("Cluster", seen.id),
        ("Cell", seen.cell),
        ("Version", f"{seen.version}, schema level {seen.schema_level}, epoch {seen.epoch}"),
        *([("Upgrade", _upgrade(seen))] if seen.upgrade_pending else []),
        ("Leader", leads),
        ("Replicas", "\n".join(replicas) or out.NOTHING),
        ("Members", f"{reachable} of {len(seen.members)} reachable"),
        ("Alarms", "\n".join(alarms) or "none"),
        ("Store", seen.store.detail or out.NOTHING),
        ("Nodes", nodes or "none"),
        ("VMs", str(seen.vms)),
        *(() if seen.restore is None else _restore_fields(seen.restore)),
    ]


def _leader_fields(seen: LeaderView) -> list[tuple[str, str]]:
    if not seen.replica:
        return [("Leader", NOBODY)]
    return [
        ("Leader", seen.replica),
        ("URL", seen.url),
        ("Term", str(seen.term)),
        ("Since", out.stamp(seen.since)),
    ]


def _restore_fields(restore: RestoreView) -> list[tuple[str, str]]:
    """Return what a restored cluster waits for, and what nobody but an operator can decide."""
    fields = [("Restored", f"{out.stamp(restore.at)}, to {out.stamp(restore.backup_at)}")]
    if restore.recovering:
        fields.append(("Recovery", _recovery(restore)))
    elif restore.waits_for:
        fields.append(("Yet to tell", ", ".join(restore.waits_for)))
    if restore.gone:
        fields.append(("Gone", ", ".join(restore.gone)))
    if restore.unproven:
        told = "novacron vm ls --phase Unknown, and vm show says why"
        fields.append(("Unproven", f"{restore.unproven} VMs are left alone: {told}"))
    if restore.unrecorded:
        told = "novacron node show names them; they go on and are never touched"
        fields.append(("Unrecorded", f"{restore.unrecorded} VMs that no record is of: {told}"))
    return fields


def _recovery(restore: RestoreView) -> str:
    if not restore.waits_for:
        return "nearly done"
    return (
        f"nothing is started, bound or moved before these nodes have told what runs on them:\n"
        f"{', '.join(restore.waits_for)}\n"
        "(if one of them will never come back: novacron node declare-gone NODE)"
    )


def _upgrade(seen: ClusterView) -> str:
    if not seen.upgrade_blockers:
        return "to be finalized: novacron cluster finalize-upgrade"
    told = [f"{each.pointer}: {each.message}".lstrip(": ") for each in seen.upgrade_blockers]
    return "\n".join(["not finished:", *told])


def _member_table(seen: ClusterView) -> Table:
    rows = tuple(
        (
            each.endpoint,
            "yes" if each.reachable else "no",
            "leader" if each.is_leader else "follower" if each.reachable else out.NOTHING,
            each.version or out.NOTHING,
            out.size(each.db_size_bytes) if each.reachable else out.NOTHING,
            out.size(each.db_in_use_bytes) if each.reachable else out.NOTHING,
            str(each.raft_term) if each.reachable else out.NOTHING,
            str(each.revision) if each.reachable else out.NOTHING,
            ", ".join(each.alarms) or out.NOTHING,
            each.problem or out.NOTHING,
        )
        for each in seen.members
    )
    columns = (
        *("ENDPOINT", "REACHABLE", "ROLE", "VERSION", "SIZE", "IN USE", "RAFT TERM", "REVISION"),
        *("ALARMS", "PROBLEM"),
    )
    return Table(columns, rows, states=("REACHABLE",))
