"""`--dry-run`: what a change would do, as the control plane plans it; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
import msgspec

from controlplane.cli.client import Answer, Query
from controlplane.cli.errors import Unschedulable
from controlplane.cli.invocation import Invocation, for_each
from controlplane.cli.output import NOTHING, Format, Output, Table
from controlplane.cli.views import DryRunView, PlannedVmView

DRY_RUN: Query = (("dry_run", "true"),)

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only say what would be done; change nothing."
)


def show_dry_runs(
    invocation: Invocation,
    form: str | None,
    names: tuple[str, ...],
    submit: Callable[[str], Answer],
) -> None:
    """Ask for the plan of each target's change and print all; raises what was refused.

    Raises Unschedulable when something of it cannot be done.
    """
    output = invocation.output(form)
    answers: list[Answer] = []
    try:
        for_each(names, lambda name: answers.append(submit(name)))
    finally:
        _print(output, answers, single=len(names) == 1)
    check_possible([answer.decode(DryRunView) for answer in answers])


def check_possible(plans: Sequence[DryRunView]) -> None:
    blocked = [vm for plan in plans for vm in plan.vms if vm.reasons]
    if blocked:
        told = "; ".join(f"{vm.vm_name}: {_reasons(vm)}" for vm in blocked)
        raise Unschedulable(told, "make room, or ask for less")


def _print(output: Output, answers: Sequence[Answer], *, single: bool) -> None:
    if output.form is Format.JSON:
        if single and answers:
            output.json(answers[0].body)
        elif not single:
            items = [msgspec.Raw(answer.body) for answer in answers]
            output.json(msgspec.json.encode({"items": items}))
        return
    vms = [vm for answer in answers for vm in answer.decode(DryRunView).vms]
    if output.form is Format.NAME:
        output.names([vm.vm_name for vm in vms])
    elif vms:
        output.table(_table(vms))


def _table(vms: Sequence[PlannedVmView]) -> Table:
    rows = tuple(
        (
            vm.vm_name,
            "BLOCKED" if vm.reasons else vm.action,
            vm.node_name or vm.node or NOTHING,
            vm.target_name or vm.target or NOTHING,
            _reasons(vm) or NOTHING,
        )
        for vm in vms
    )
    return Table(("VM", "ACTION", "NODE", "TARGET", "NOTE"), rows, states=("ACTION",))


def _reasons(vm: PlannedVmView) -> str:
    return "; ".join(reason.message or reason.code for reason in vm.reasons)
