"""`novacron vm`: VMs as lists and descriptions, their logs, events and figures."""

from __future__ import annotations

from collections.abc import Sequence

import click

from controlplane.cli import output as out
from controlplane.cli.client import path_of
from controlplane.cli.events import show_events
from controlplane.cli.invocation import (
    Invocation,
    label_option,
    output_option,
    pass_invocation,
    watch_options,
)
from controlplane.cli.listing import label_query, show_list, show_one
from controlplane.cli.output import Table
from controlplane.cli.top import show_usage, show_usage_of
from controlplane.cli.views import DiskView, GroupRuleView, NicView, Reference, VmView
from controlplane.cli.vm_actions import ACTIONS, remove
from controlplane.cli.vm_create import create
from controlplane.cli.vm_explain import explain
from controlplane.cli.vm_label import label
from controlplane.cli.watching import show

LOG_BYTES = 16 * 1024
# The API's own bound for one answer.
LOG_BYTES_MAX = 1024 * 1024


@click.group()
def vm() -> None:
    """Virtual machines. A name or an id names one."""


@vm.command("ls")
@label_option
@click.option("--node", help="Only on this node.")
@click.option("--phase", help="Only in this state, such as Running.")
@output_option
@watch_options
@pass_invocation
def list_vms(
    invocation: Invocation,
    labels: tuple[tuple[str, str], ...],
    node: str | None,
    phase: str | None,
    form: str | None,
    watch: bool,
    interval: float,
) -> None:
    """List VMs."""
    output = invocation.output(form)
    given = (("node", node), ("phase", phase))
    query = (*label_query(labels), *((key, value) for key, value in given if value is not None))
    show(
        invocation.terminal,
        lambda: show_list(
            invocation, output, "vms", query, VmView, lambda vms: _vm_table(invocation, vms)
        ),
        watch=watch,
        interval_s=interval,
    )


@vm.command("show")
@click.argument("name", metavar="VM")
@output_option
@watch_options
@pass_invocation
def show_vm(
    invocation: Invocation, name: str, form: str | None, watch: bool, interval: float
) -> None:
    """Show one VM."""
    output = invocation.output(form)
    show(
        invocation.terminal,
        lambda: show_one(
            invocation,
            output,
            path_of("vms", name),
            VmView,
            lambda seen: _vm_fields(invocation, seen),
        ),
        watch=watch,
        interval_s=interval,
    )


@vm.command("logs")
@click.argument("name", metavar="VM")
@click.option(
    "--bytes",
    "count",
    type=click.IntRange(1, LOG_BYTES_MAX),
    default=LOG_BYTES,
    show_default=True,
    help="How much of its end.",
)
@pass_invocation
def show_log(invocation: Invocation, name: str, count: int) -> None:
    """Print the end of a VM's serial console, as the guest wrote it."""
    answer = invocation.client.get(
        path_of("vms", name, "console-log"), (("offset", -count), ("limit", count))
    )
    invocation.terminal.print_bytes(answer.body)


@vm.command("events")
@click.argument("name", metavar="VM")
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@output_option
@pass_invocation
def show_vm_events(invocation: Invocation, name: str, follow: bool, form: str | None) -> None:
    """Show what happened to a VM."""
    reference = invocation.client.get_as(Reference, path_of("vms", name))
    query = (("object", reference.id),)
    show_events(invocation, invocation.output(form), query, since="", follow=follow)


@vm.command("top")
@click.argument("name", metavar="[VM]", required=False)
@output_option
@watch_options
@pass_invocation
def show_vm_usage(
    invocation: Invocation, name: str | None, form: str | None, watch: bool, interval: float
) -> None:
    """Show what VMs use, the busiest first, or what one uses."""
    output = invocation.output(form)

    def view() -> None:
        if name is None:
            show_usage(invocation, output, "vm")
        else:
            show_usage_of(invocation, output, path_of("vms", name, "metrics"), name)

    show(invocation.terminal, view, watch=watch, interval_s=interval)


vm.add_command(create)
vm.add_command(remove)
vm.add_command(explain)
vm.add_command(label)
for action in ACTIONS:
    vm.add_command(action)


def _vm_table(invocation: Invocation, vms: Sequence[VmView]) -> Table:
    now = invocation.terminal.now()
    rows = tuple(
        (
            each.name,
            each.status.state,
            each.status.where or out.NOTHING,
            str(each.spec.vcpus),
            out.mebibytes(each.spec.memory_mib),
            out.age(each.created_at, now),
        )
        for each in vms
    )
    return Table(("NAME", "STATE", "NODE", "VCPU", "MEMORY", "AGE"), rows)


def _vm_fields(invocation: Invocation, seen: VmView) -> list[tuple[str, str]]:
    spec, status = seen.spec, seen.status
    now = invocation.terminal.now()
    return [
        ("Name", seen.name),
        ("Id", seen.id),
        ("State", f"{status.state}, wanted {spec.power}"),
        ("Node", status.where or out.NOTHING),
        ("Migration", status.migration or out.NOTHING),
        ("Left on", ", ".join(status.left_on) or out.NOTHING),
        ("Generation", str(status.generation)),
        ("Size", f"{spec.vcpus} vCPUs, {out.mebibytes(spec.memory_mib)}"),
        ("Boot", f"{spec.boot.kernel}, {spec.boot.initrd or 'no initrd'}"),
        ("Command line", spec.boot.cmdline or out.NOTHING),
        ("Disks", "\n".join(map(_disk, spec.disks)) or out.NOTHING),
        ("NICs", "\n".join(map(_nic, spec.nics)) or out.NOTHING),
        ("Addresses", "\n".join(status.addresses) or out.NOTHING),
        ("Labels", out.labels(seen.labels)),
        ("Node labels", out.labels(spec.placement.node_labels)),
        ("Affinity", _rules(spec.placement.affinity)),
        ("Anti-affinity", _rules(spec.placement.anti_affinity)),
        ("Conditions", _conditions(seen)),
        ("Fault", _fault(seen)),
        ("Created", f"{out.stamp(seen.created_at)} ({out.age(seen.created_at, now)} ago)"),
        ("Changed", f"{out.stamp(seen.updated_at)} ({out.age(seen.updated_at, now)} ago)"),
    ]


def _disk(disk: DiskView) -> str:
    return f"{disk.name}: {disk.size_gib} GiB in pool {disk.pool}"


def _nic(nic: NicView) -> str:
    return f"{nic.network} ({nic.mac})" if nic.mac else nic.network


def _rules(rules: Sequence[GroupRuleView]) -> str:
    return ", ".join(f"{r.group} ({'hard' if r.hard else 'soft'})" for r in rules) or out.NOTHING


def _conditions(seen: VmView) -> str:
    lines = [
        f"{each.type}: {'yes' if each.status else 'no'}"
        + (f" ({each.reason})" if each.reason else "")
        + (f": {each.message}" if each.message else "")
        for each in seen.status.conditions
    ]
    return "\n".join(lines) or out.NOTHING


def _fault(seen: VmView) -> str:
    fault = seen.status.fault
    return out.NOTHING if fault is None else f"{fault.title}: {fault.detail}"
