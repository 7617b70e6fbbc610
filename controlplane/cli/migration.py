"""`novacron migration`: VMs on the move, and those that have moved."""

from __future__ import annotations

from collections.abc import Sequence

import click

from controlplane.cli import output as out
from controlplane.cli.client import Query, path_of
from controlplane.cli.invocation import Invocation, output_option, pass_invocation, watch_options
from controlplane.cli.listing import show_list, show_one
from controlplane.cli.op import cancel_operations, error_told, steps_told
from controlplane.cli.output import Table
from controlplane.cli.views import MigrationView
from controlplane.cli.watching import show

# History holds a month of them; a person reads the newest.
DEFAULT_LIMIT = 50


@click.group()
def migration() -> None:
    """Live migrations. An operation's id names one."""


@migration.command("ls")
@click.option("--vm", metavar="VM", help="Only of this VM.")
@click.option("--state", help="Only in this state, such as running.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=DEFAULT_LIMIT,
    show_default=True,
    help="At most this many, the newest.",
)
@output_option
@watch_options
@pass_invocation
def list_migrations(
    invocation: Invocation,
    vm: str | None,
    state: str | None,
    limit: int,
    form: str | None,
    watch: bool,
    interval: float,
) -> None:
    """List migrations, newest first."""
    output = invocation.output(form)
    given = (("vm", vm), ("state", state))
    query: Query = tuple((key, value) for key, value in given if value is not None)
    show(
        invocation.terminal,
        lambda: show_list(
            invocation,
            output,
            "migrations",
            query,
            MigrationView,
            lambda migrations: _table(invocation, migrations),
            at_most=limit,
        ),
        watch=watch,
        interval_s=interval,
    )


@migration.command("show")
@click.argument("migration_id", metavar="MIGRATION")
@output_option
@watch_options
@pass_invocation
def show_migration(
    invocation: Invocation, migration_id: str, form: str | None, watch: bool, interval: float
) -> None:
    """Show one migration."""
    output = invocation.output(form)
    show(
        invocation.terminal,
        lambda: show_one(
            invocation, output, path_of("migrations", migration_id), MigrationView, _fields
        ),
        watch=watch,
        interval_s=interval,
    )


migration.add_command(cancel_operations("MIGRATION"))


def _table(invocation: Invocation, migrations: Sequence[MigrationView]) -> Table:
    now = invocation.terminal.now()
    return Table(
        ("ID", "VM", "FROM", "TO", "STATE", "PHASE", "DONE", "DOWNTIME", "AGE"),
        tuple(
            (
                each.id,
                each.vm_name or each.vm,
                each.source_name or each.source,
                each.destination_name or each.destination or out.NOTHING,
                each.state,
                each.phase or out.NOTHING,
                _percent(each),
                out.NOTHING if each.figures is None else f"{each.figures.downtime_ms} ms",
                out.age(each.created_at, now),
            )
            for each in migrations
        ),
    )


def _percent(each: MigrationView) -> str:
    if each.progress is None or each.progress.percent is None:
        return out.NOTHING
    return f"{each.progress.percent:.0f}%"


def _fields(seen: MigrationView) -> list[tuple[str, str]]:
    figures = seen.figures
    took = out.NOTHING
    if figures is not None:
        moved = figures.transferred_bytes / 1024**2
        took = f"{figures.total_ms} ms, {figures.downtime_ms} ms of downtime, {moved:.0f} MiB moved"
    return [
        ("Id", seen.id),
        ("VM", seen.vm_name or seen.vm),
        ("From", seen.source_name or seen.source),
        ("To", seen.destination_name or seen.destination or out.NOTHING),
        ("State", seen.state),
        ("Phase", seen.phase or out.NOTHING),
        ("Done", _percent(seen)),
        ("Steps", steps_told(seen.steps)),
        ("Took", took),
        ("Error", error_told(seen.error)),
        ("Drain", seen.parent or out.NOTHING),
        ("By", seen.by or out.NOTHING),
        ("Created", out.stamp(seen.created_at)),
        ("Changed", out.stamp(seen.updated_at)),
    ]
