"""`novacron vm start|stop|…|rm`: changes of VMs that exist, one or several at once."""

from __future__ import annotations

from collections.abc import Callable

import click

from controlplane.cli.client import Answer, path_of
from controlplane.cli.dry_run import DRY_RUN, dry_run_option, show_dry_runs
from controlplane.cli.invocation import (
    Duration,
    Invocation,
    confirm,
    output_option,
    pass_invocation,
    wait_options,
)
from controlplane.cli.output import Format
from controlplane.cli.views import OperationView
from controlplane.cli.wait import Waiting, run_operations

DEFAULT_SHUTDOWN_DEADLINE_S = 60.0

# Verbs that the API can be asked for the plan of.
_PLANNED = frozenset({"start", "stop"})
# action: (one line of help, what is said when it is done)
_PLAIN_ACTIONS = {
    "start": ("Start stopped VMs.", "started"),
    "stop": ("Switch VMs off at once, without telling the guest.", "stopped"),
    "reboot": ("Ask the guests to reboot.", "rebooted"),
    "reset": ("Reset VMs at once, without telling the guest.", "reset"),
    "pause": ("Freeze VMs where they are.", "paused"),
    "resume": ("Let paused VMs go on.", "resumed"),
}


def _action_command(name: str, line: str, past: str) -> click.Command:
    @click.command(name, help=line)
    @click.argument("vms", metavar="VM...", nargs=-1, required=True)
    @output_option
    @wait_options
    @pass_invocation
    def command(
        invocation: Invocation,
        vms: tuple[str, ...],
        form: str | None,
        no_wait: bool,
        timeout: float | None,
        dry_run: bool = False,
    ) -> None:
        def submit(vm: str) -> Answer:
            path = path_of("vms", vm, "actions", name)
            return invocation.client.post(path, query=DRY_RUN if dry_run else ())

        if dry_run:
            show_dry_runs(invocation, form, distinct(vms), submit)
        else:
            _change(invocation, vms, form, submit, past, no_wait, timeout)

    return dry_run_option(command) if name in _PLANNED else command


@click.command()
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
@click.option(
    "--deadline",
    type=Duration(),
    default=DEFAULT_SHUTDOWN_DEADLINE_S,
    show_default="60s",
    help="After this long without effect the VM is stopped.",
)
@dry_run_option
@output_option
@wait_options
@pass_invocation
def shutdown(
    invocation: Invocation,
    vms: tuple[str, ...],
    deadline: float,
    dry_run: bool,
    form: str | None,
    no_wait: bool,
    timeout: float | None,
) -> None:
    """Ask the guests to power off; stop those that do not."""

    def submit(vm: str) -> Answer:
        path = path_of("vms", vm, "actions", "shutdown")
        query = DRY_RUN if dry_run else ()
        return invocation.client.post(path, {"deadline_s": deadline}, query)

    if dry_run:
        show_dry_runs(invocation, form, distinct(vms), submit)
    else:
        _change(invocation, vms, form, submit, "shut down", no_wait, timeout)


@click.command()
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
@click.option("--to", "destination", metavar="NODE", help="To this node; else the best one.")
@dry_run_option
@output_option
@wait_options
@pass_invocation
def migrate(
    invocation: Invocation,
    vms: tuple[str, ...],
    destination: str | None,
    dry_run: bool,
    form: str | None,
    no_wait: bool,
    timeout: float | None,
) -> None:
    """Move running VMs to another node, live."""

    def submit(vm: str) -> Answer:
        path = path_of("vms", vm, "actions", "migrate")
        body = {} if destination is None else {"destination": destination}
        return invocation.client.post(path, body, DRY_RUN if dry_run else ())

    if dry_run:
        show_dry_runs(invocation, form, distinct(vms), submit)
    else:
        _change(invocation, vms, form, submit, "moved", no_wait, timeout)


@click.command("rm")
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@output_option
@wait_options
@pass_invocation
def remove(
    invocation: Invocation,
    vms: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    form: str | None,
    no_wait: bool,
    timeout: float | None,
) -> None:
    """Delete VMs and their disks."""

    def submit(vm: str) -> Answer:
        return invocation.client.delete(path_of("vms", vm), DRY_RUN if dry_run else ())

    if dry_run:
        show_dry_runs(invocation, form, distinct(vms), submit)
        return
    confirm(invocation, f"Delete {', '.join(vms)} with all disks?", yes=yes)
    _change(invocation, vms, form, submit, "deleted", no_wait, timeout)


ACTIONS: tuple[click.Command, ...] = (
    *(_action_command(name, line, past) for name, (line, past) in _PLAIN_ACTIONS.items()),
    shutdown,
    migrate,
)


def _change(
    invocation: Invocation,
    vms: tuple[str, ...],
    form: str | None,
    submit: Callable[[str], Answer],
    past: str,
    no_wait: bool,
    timeout: float | None,
) -> None:
    output = invocation.output(form)
    waiting = Waiting.begin(invocation.terminal, no_wait=no_wait, timeout=timeout)

    def done(vm: str, operation: OperationView) -> None:
        output.line(vm if output.form is Format.NAME else f"{vm} {past}")

    run_operations(invocation, output, distinct(vms), submit, done, waiting)


def distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return each name once: the second request for one VM could only be refused."""
    return tuple(dict.fromkeys(names))
