"""`novacron top`: what nodes and VMs use right now."""

from __future__ import annotations

import click
import msgspec

from controlplane.cli import output as out
from controlplane.cli.client import BASE, decode
from controlplane.cli.invocation import Invocation, output_option, pass_invocation, watch_options
from controlplane.cli.output import Format, Output, Table
from controlplane.cli.views import FiguresView, UsageView
from controlplane.cli.watching import show

_COLUMNS = ("NAME", "CPU%", "MEMORY", "DISK READ", "DISK WRITE", "NET IN", "NET OUT")
_NO_FIGURES = FiguresView()


@click.command()
@click.argument("kind", type=click.Choice(["all", "nodes", "vms"]), default="all")
@output_option
@watch_options
@pass_invocation
def top(invocation: Invocation, kind: str, form: str | None, watch: bool, interval: float) -> None:
    """Show what nodes and VMs use, the busiest first."""
    output = invocation.output(form)
    kinds = ("node", "vm") if kind == "all" else (kind.removesuffix("s"),)

    def view() -> None:
        if output.form is Format.JSON and len(kinds) > 1:
            _show_both_as_json(invocation, output)
            return
        for index, each in enumerate(kinds):
            if index and output.form is Format.TABLE:
                output.line("")
            show_usage(invocation, output, each)

    show(invocation.terminal, view, watch=watch, interval_s=interval)


def show_usage(invocation: Invocation, output: Output, kind: str) -> None:
    """Print the latest figures of all nodes or all VMs."""
    listing = invocation.client.collect(f"{BASE}/metrics", (("kind", kind),))
    if output.form is Format.JSON:
        output.listing(listing)
        return
    usages = sorted((decode(item, UsageView) for item in listing.items), key=_busiest_first)
    if output.form is Format.NAME:
        output.names([usage.name or usage.object for usage in usages])
    else:
        rows = tuple(_row(usage.name or usage.object, usage.latest) for usage in usages)
        output.table(Table((kind.upper(), *_COLUMNS[1:]), rows, states=()))


def show_usage_of(invocation: Invocation, output: Output, path: str, name: str) -> None:
    """Print the latest figures of one node or VM."""
    answer = invocation.client.get(path)
    if output.form is Format.JSON:
        output.json(answer.body)
    elif output.form is Format.NAME:
        output.names([name])
    else:
        usage = answer.decode(UsageView)
        output.table(Table(_COLUMNS, (_row(name, usage.latest),), states=()))


def _show_both_as_json(invocation: Invocation, output: Output) -> None:
    found = {
        f"{kind}s": invocation.client.collect(f"{BASE}/metrics", (("kind", kind),)).items
        for kind in ("node", "vm")
    }
    output.json(msgspec.json.encode(found))


def _busiest_first(usage: UsageView) -> tuple[float, str]:
    return (-((usage.latest or _NO_FIGURES).cpu_percent or 0.0), usage.name)


def _row(name: str, latest: FiguresView | None) -> tuple[str, ...]:
    figures = latest or _NO_FIGURES
    return (
        name,
        out.percent(figures.cpu_percent),
        out.size(figures.memory_bytes),
        out.rate(figures.disk_read_bytes_per_s),
        out.rate(figures.disk_write_bytes_per_s),
        out.rate(figures.network_receive_bytes_per_s),
        out.rate(figures.network_transmit_bytes_per_s),
    )
