"""`novacron op`: operations, and waiting for them again."""

from __future__ import annotations

from collections.abc import Sequence

import click

from controlplane.cli import output as out
from controlplane.cli.client import Answer, Query, path_of
from controlplane.cli.invocation import (
    Duration,
    Invocation,
    output_option,
    pass_invocation,
    wait_options,
    watch_options,
)
from controlplane.cli.listing import show_list, show_one
from controlplane.cli.output import Format, Table
from controlplane.cli.views import OperationView, ProblemView, StepView
from controlplane.cli.wait import Waiting, run_operations
from controlplane.cli.watching import show

# History holds a month of them; a person reads the newest.
DEFAULT_LIMIT = 50


@click.group()
def op() -> None:
    """Operations: what was accepted, and how it goes."""


@op.command("ls")
@click.option("--state", help="Only in this state, such as running.")
@click.option("--kind", "kinds", multiple=True, help="Only such as vm.start, or vm.* for all.")
@click.option("--target", metavar="VM", help="Only on this VM.")
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
def list_operations(
    invocation: Invocation,
    state: str | None,
    kinds: tuple[str, ...],
    target: str | None,
    limit: int,
    form: str | None,
    watch: bool,
    interval: float,
) -> None:
    """List operations, newest first."""
    output = invocation.output(form)
    given = (("state", state), ("target", target))
    query: Query = (
        *((key, value) for key, value in given if value is not None),
        *(("kind", kind) for kind in kinds),
    )
    show(
        invocation.terminal,
        lambda: show_list(
            invocation,
            output,
            "operations",
            query,
            OperationView,
            lambda operations: _operation_table(invocation, operations),
            at_most=limit,
        ),
        watch=watch,
        interval_s=interval,
    )


@op.command("show")
@click.argument("operation_id", metavar="OPERATION")
@output_option
@watch_options
@pass_invocation
def show_operation(
    invocation: Invocation, operation_id: str, form: str | None, watch: bool, interval: float
) -> None:
    """Show one operation."""
    output = invocation.output(form)
    show(
        invocation.terminal,
        lambda: show_one(
            invocation,
            output,
            path_of("operations", operation_id),
            OperationView,
            _operation_fields,
        ),
        watch=watch,
        interval_s=interval,
    )


@op.command("wait")
@click.argument("operation_ids", metavar="OPERATION...", nargs=-1, required=True)
@click.option("--timeout", type=Duration(), help="Stop waiting after this long.")
@output_option
@pass_invocation
def wait_for_operations(
    invocation: Invocation,
    operation_ids: tuple[str, ...],
    timeout: float | None,
    form: str | None,
) -> None:
    """Wait until operations have ended; fails when one failed."""
    output = invocation.output(form)

    def done(operation_id: str, operation: OperationView) -> None:
        named = output.form is Format.NAME
        output.line(operation_id if named else f"{operation_id} {operation.state}")

    run_operations(
        invocation,
        output,
        tuple(dict.fromkeys(operation_ids)),
        lambda operation_id: invocation.client.get(path_of("operations", operation_id)),
        done,
        Waiting.begin(invocation.terminal, no_wait=False, timeout=timeout),
        looks_only=True,
    )


def cancel_operations(metavar: str) -> click.Command:
    """Return the command that cancels operations, under the name its group has for them."""

    @click.command("cancel")
    @click.argument("operation_ids", metavar=f"{metavar}...", nargs=-1, required=True)
    @output_option
    @wait_options
    @pass_invocation
    def cancel(
        invocation: Invocation,
        operation_ids: tuple[str, ...],
        form: str | None,
        no_wait: bool,
        timeout: float | None,
    ) -> None:
        """Undo migrations or drains that are under way, and wait until that is done."""
        output = invocation.output(form)

        def submit(operation_id: str) -> Answer:
            return invocation.client.post(path_of("operations", operation_id, "actions", "cancel"))

        def done(operation_id: str, operation: OperationView) -> None:
            named = output.form is Format.NAME
            output.line(operation_id if named else f"{operation_id} {operation.state}")

        waiting = Waiting.begin(invocation.terminal, no_wait=no_wait, timeout=timeout)
        run_operations(
            invocation,
            output,
            tuple(dict.fromkeys(operation_ids)),
            submit,
            done,
            waiting,
            wanted=frozenset({"cancelled", "succeeded"}),
        )

    return cancel


op.add_command(cancel_operations("OPERATION"))


def _operation_table(invocation: Invocation, operations: Sequence[OperationView]) -> Table:
    now = invocation.terminal.now()
    rows = tuple(
        (
            each.id,
            each.kind,
            each.target,
            each.state,
            each.phase or out.NOTHING,
            out.age(each.created_at, now),
        )
        for each in operations
    )
    return Table(("ID", "KIND", "TARGET", "STATE", "PHASE", "AGE"), rows)


def steps_told(steps: Sequence[StepView]) -> str:
    return "\n".join(f"{s.name}: {s.state} {out.stamp(s.at)}" for s in steps) or out.NOTHING


def error_told(error: ProblemView | None) -> str:
    if error is None:
        return out.NOTHING
    faults = [f"{e.pointer or '/'}: {e.message}" for e in error.errors]
    return "\n".join([f"{error.title} ({error.code})", error.detail, *faults])


def _still_there(seen: OperationView) -> list[tuple[str, str]]:
    """Return what a drain waits for; of one that has ended the error tells what is left."""
    if seen.ended or seen.details is None or not seen.details.left:
        return []
    return [("Left", "\n".join(f"{each.name}: {each.reason}" for each in seen.details.left))]


def _operation_fields(seen: OperationView) -> list[tuple[str, str]]:
    return [
        ("Id", seen.id),
        ("Kind", seen.kind),
        ("Target", seen.target),
        ("State", seen.state),
        ("Phase", seen.phase or out.NOTHING),
        ("Steps", steps_told(seen.steps)),
        ("Error", error_told(seen.error)),
        *_still_there(seen),
        ("Part of", seen.parent or out.NOTHING),
        ("By", seen.by or out.NOTHING),
        ("Created", out.stamp(seen.created_at)),
        ("Changed", out.stamp(seen.updated_at)),
        ("Deadline", out.stamp(seen.deadline_at)),
    ]
