"""`novacron node`: nodes as lists and descriptions, and whether new VMs may go there."""

from __future__ import annotations

from collections.abc import Sequence

import click

from controlplane.cli import node_join
from controlplane.cli import output as out
from controlplane.cli.client import path_of
from controlplane.cli.events import show_events
from controlplane.cli.invocation import (
    Invocation,
    confirm,
    for_each,
    label_option,
    output_option,
    pass_invocation,
    watch_options,
)
from controlplane.cli.listing import label_query, show_list, show_one
from controlplane.cli.node_drain import drain
from controlplane.cli.output import Format, Table
from controlplane.cli.top import show_usage, show_usage_of
from controlplane.cli.views import InventoryView, NodeView, Reference
from controlplane.cli.watching import show

_NO_INVENTORY = InventoryView()


@click.group()
def node() -> None:
    """The nodes that run VMs. A name or an id names one."""


@node.command("ls")
@label_option
@output_option
@watch_options
@pass_invocation
def list_nodes(
    invocation: Invocation,
    labels: tuple[tuple[str, str], ...],
    form: str | None,
    watch: bool,
    interval: float,
) -> None:
    """List nodes."""
    output = invocation.output(form)
    show(
        invocation.terminal,
        lambda: show_list(
            invocation,
            output,
            "nodes",
            label_query(labels),
            NodeView,
            lambda nodes: _node_table(invocation, nodes),
        ),
        watch=watch,
        interval_s=interval,
    )


@node.command("show")
@click.argument("name", metavar="NODE")
@output_option
@watch_options
@pass_invocation
def show_node(
    invocation: Invocation, name: str, form: str | None, watch: bool, interval: float
) -> None:
    """Show one node."""
    output = invocation.output(form)
    show(
        invocation.terminal,
        lambda: show_one(
            invocation,
            output,
            path_of("nodes", name),
            NodeView,
            lambda seen: _node_fields(invocation, seen),
        ),
        watch=watch,
        interval_s=interval,
    )


@node.command()
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@click.option("--reason", default="", help="Why, for whoever wonders later.")
@output_option
@pass_invocation
def cordon(invocation: Invocation, nodes: tuple[str, ...], reason: str, form: str | None) -> None:
    """Send no new VMs to nodes; those there stay."""
    _mark(invocation, nodes, "cordon", {"reason": reason}, form)


@node.command()
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@output_option
@pass_invocation
def uncordon(invocation: Invocation, nodes: tuple[str, ...], form: str | None) -> None:
    """Let new VMs go to nodes again."""
    _mark(invocation, nodes, "uncordon", {}, form)


node.add_command(drain)
for each in node_join.COMMANDS:
    node.add_command(each)


@node.command("declare-gone")
@click.argument("name", metavar="NODE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
@pass_invocation
def declare_gone(invocation: Invocation, name: str, yes: bool, form: str | None) -> None:
    """Say that nothing runs on a node any more, and never will again.

    Only after a restore of the cluster, which waits for every node to tell what runs on it. Make
    sure that the node is off: guests that it still runs may be started a second time elsewhere.
    """
    question = f"Is node {name} off, and will no guest on it ever go on?"
    confirm(invocation, question, yes=yes)
    output = invocation.output(form)
    answer = invocation.client.post(path_of("nodes", name, "actions", "declare-gone"))
    if output.form is Format.JSON:
        output.json(answer.body)
    else:
        gone = answer.decode(NodeView).name or name
        output.line(gone if output.form is Format.NAME else f"{gone} is given up for gone")


@node.command("rm")
@click.argument("name", metavar="NODE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
@pass_invocation
def remove(invocation: Invocation, name: str, yes: bool, form: str | None) -> None:
    """Forget a node that has no VMs any more, and refuse its certificate.

    It comes back with a new join token only. Drain it before.
    """
    confirm(invocation, f"Forget node {name}?", yes=yes)
    output = invocation.output(form)
    answer = invocation.client.delete(path_of("nodes", name))
    if output.form is Format.JSON:
        output.json(answer.body)
    else:
        gone = answer.decode(NodeView).name or name
        output.line(gone if output.form is Format.NAME else f"{gone} is removed")


@node.command("events")
@click.argument("name", metavar="NODE")
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@output_option
@pass_invocation
def show_node_events(invocation: Invocation, name: str, follow: bool, form: str | None) -> None:
    """Show what happened to a node."""
    reference = invocation.client.get_as(Reference, path_of("nodes", name))
    query = (("object", reference.id),)
    show_events(invocation, invocation.output(form), query, since="", follow=follow)


@node.command("top")
@click.argument("name", metavar="[NODE]", required=False)
@output_option
@watch_options
@pass_invocation
def show_node_usage(
    invocation: Invocation, name: str | None, form: str | None, watch: bool, interval: float
) -> None:
    """Show what nodes use, the busiest first, or what one uses."""
    output = invocation.output(form)

    def view() -> None:
        if name is None:
            show_usage(invocation, output, "node")
        else:
            show_usage_of(invocation, output, path_of("nodes", name, "metrics"), name)

    show(invocation.terminal, view, watch=watch, interval_s=interval)


def _mark(
    invocation: Invocation,
    nodes: tuple[str, ...],
    action: str,
    body: dict[str, str],
    form: str | None,
) -> None:
    output = invocation.output(form)

    def mark(name: str) -> None:
        answer = invocation.client.post(path_of("nodes", name, "actions", action), body)
        if output.form is Format.JSON:
            output.json(answer.body)
        else:
            changed = answer.decode(NodeView).name or name
            output.line(changed if output.form is Format.NAME else f"{changed} {action}ed")

    for_each(nodes, mark)


def _node_table(invocation: Invocation, nodes: Sequence[NodeView]) -> Table:
    now = invocation.terminal.now()
    return Table(
        ("NAME", "STATE", "SINCE", "VMS", "VCPU", "MEMORY", "VIRT", "ADDRESS", "AGE"),
        tuple(
            (
                each.name,
                _state(each),
                out.age(each.state_since, now),
                str(each.allocated.vms),
                f"{each.allocated.vcpus:g}/{inventory.cpus}",
                f"{out.mebibytes(each.allocated.memory_mib)}/{out.mebibytes(inventory.memory_mib)}",
                inventory.virtualization or out.NOTHING,
                each.address or out.NOTHING,
                out.age(each.created_at, now),
            )
            for each in nodes
            for inventory in (each.inventory or _NO_INVENTORY,)
        ),
    )


def _state(each: NodeView) -> str:
    return f"{each.state}, cordoned" if each.cordoned else each.state


def _node_fields(invocation: Invocation, seen: NodeView) -> list[tuple[str, str]]:
    now = invocation.terminal.now()
    has = seen.inventory or _NO_INVENTORY
    taken = seen.allocated
    pools = [f"{p.name}: {p.free_gib:.1f} of {p.capacity_gib:.1f} GiB free" for p in has.pools]
    return [
        ("Name", seen.name),
        ("Id", seen.id),
        ("State", f"{seen.state}, for {out.age(seen.state_since, now)}"),
        ("Cordoned", _cordon(seen)),
        *_since_restore(seen),
        ("Address", seen.address or out.NOTHING),
        ("VMs", str(taken.vms)),
        ("CPUs", f"{has.cpus}, {taken.vcpus:g} vCPUs allocated"),
        ("Memory", f"{out.mebibytes(has.memory_mib)}, {out.mebibytes(taken.memory_mib)} allocated"),
        ("CPU model", has.cpu.model or out.NOTHING),
        ("Virtualization", has.virtualization or out.NOTHING),
        ("Pools", "\n".join(pools) or out.NOTHING),
        ("Networks", ", ".join(has.networks) or out.NOTHING),
        ("Artefacts", ", ".join(has.artefacts) or out.NOTHING),
        ("Versions", ", ".join(f"{k} {v}" for k, v in has.versions.items()) or out.NOTHING),
        ("Labels", out.labels(seen.labels)),
        ("Boot id", seen.boot_id or out.NOTHING),
        ("Created", f"{out.stamp(seen.created_at)} ({out.age(seen.created_at, now)} ago)"),
    ]


def _since_restore(seen: NodeView) -> list[tuple[str, str]]:
    """Return what is to be known of a node since the cluster was restored."""
    fields = []
    if seen.gone or seen.must_tell:
        told = "given up for gone" if seen.gone else "has not told yet what runs there"
        fields.append(("Restored", told))
    if seen.unrecorded_vms:
        fields.append(("Unrecorded", "\n".join(seen.unrecorded_vms)))
    return fields


def _cordon(seen: NodeView) -> str:
    if not seen.cordoned:
        return "no"
    return f"cordoned: {seen.cordon_reason}" if seen.cordon_reason else "cordoned"
