"""`novacron node drain`: empty a node, after a look at what that would do; Ctrl-C only detaches."""

from __future__ import annotations

import click

from controlplane.cli.client import Answer, path_of
from controlplane.cli.dry_run import DRY_RUN, dry_run_option, show_dry_runs
from controlplane.cli.invocation import (
    Invocation,
    output_option,
    pass_invocation,
    wait_options,
)
from controlplane.cli.output import Format
from controlplane.cli.views import OperationView
from controlplane.cli.wait import Waiting, run_operations


@click.command()
@click.argument("name", metavar="NODE")
@click.option("--reason", default="", help="Why, for whoever wonders later.")
@click.option("--skip", multiple=True, metavar="VM", help="Leave this VM where it is; repeatable.")
@dry_run_option
@output_option
@wait_options
@pass_invocation
def drain(
    invocation: Invocation,
    name: str,
    reason: str,
    skip: tuple[str, ...],
    dry_run: bool,
    form: str | None,
    no_wait: bool,
    timeout: float | None,
) -> None:
    """Cordon a node and move its VMs away, live.

    It counts as drained only when nothing of any VM is left on it. Ctrl-C ends the waiting, not
    the drain: it says how to take it up again, and `novacron op cancel` undoes it.
    """

    def submit(node: str) -> Answer:
        path = path_of("nodes", node, "actions", "drain")
        body = {"reason": reason, "skip": list(skip)}
        return invocation.client.post(path, body, DRY_RUN if dry_run else ())

    if dry_run:
        show_dry_runs(invocation, form, (name,), submit)
        return
    output = invocation.output(form)

    def done(node: str, operation: OperationView) -> None:
        output.line(node if output.form is Format.NAME else f"{node} drained; it stays cordoned")

    waiting = Waiting.begin(invocation.terminal, no_wait=no_wait, timeout=timeout)
    run_operations(invocation, output, (name,), submit, done, waiting)
