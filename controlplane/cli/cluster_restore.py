"""`novacron cluster restore`: on a replica's machine, with every replica stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from controlplane.cli import output as out
from controlplane.cli.invocation import Invocation, confirm, pass_invocation
from shared.clock import SystemClock

if TYPE_CHECKING:
    from controlplane.restore import Plan

# An event of the log is for a person; a screen holds so many names.
NAMES_SHOWN_MAX = 20


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The replica's configuration; /etc/novacron/controlplane.toml if not given.",
)
@click.option("--replace", is_flag=True, help="Delete the cluster that etcd holds already.")
@click.option(
    "--also-await",
    "also_awaited",
    metavar="NODE",
    multiple=True,
    help="A node that joined after the backup: nothing is started before it has told, too.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_invocation
def restore(
    invocation: Invocation,
    file: Path,
    config_file: Path | None,
    replace: bool,
    also_awaited: tuple[str, ...],
    yes: bool,
) -> None:
    """Make FILE the truth again: write it into etcd, in a new epoch.

    Runs on a replica's machine as the replica's user, with every replica stopped. Guests that run
    go on, and win over what the backup says. One that was cut off is run again.
    """
    # Only here: it loads what speaks to etcd.
    from controlplane.restore import Asked, restore

    asked = Asked(file=file, config_file=config_file, replace=replace, also_awaited=also_awaited)

    def agree(plan: Plan) -> None:
        for line in _told(plan):
            invocation.terminal.tell(line)
        confirm(invocation, "Restore it?", yes=yes)

    plan = restore(asked, invocation.environ, SystemClock(), invocation.rng, agree)
    invocation.terminal.print(str(plan.restoration.cluster.epoch))
    for line in _done(plan):
        invocation.terminal.tell(line)


def _told(plan: Plan) -> list[str]:
    header, restoration = plan.summary.header, plan.restoration
    present = plan.present
    lines = [
        f"the backup is of cell {header.cell}, made {out.stamp(header.made_at)} by "
        f"{header.release}: {restoration.vms} VMs on {len(restoration.nodes)} nodes",
    ]
    if present.cut_off:
        lines.append("etcd holds the remains of a restore that was cut off: they are deleted")
    elif not present.is_empty:
        lines.append(f"etcd holds {present.keys} keys: all of them are deleted")
    if restoration.ended:
        lines.append(f"{restoration.ended} operations were under way then: they are ended")
    if restoration.left_out:
        lines.append(f"cannot be read, and are left out: {_names(restoration.left_out)}")
    return lines


def _done(plan: Plan) -> list[str]:
    restoration = plan.restoration
    return [
        f"restored, as epoch {restoration.cluster.epoch}. Start the replicas, of this release or a "
        "newer one; then see novacron cluster status",
        f"nothing is started, bound or moved before these nodes have told what runs on them: "
        f"{_names(restoration.nodes) or 'none'}",
    ]


def _names(names: tuple[str, ...]) -> str:
    more = len(names) - NAMES_SHOWN_MAX
    return ", ".join(names[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
