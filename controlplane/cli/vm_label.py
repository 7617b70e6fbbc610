"""`novacron vm label`: labels of VMs that exist, put and taken away."""

from __future__ import annotations

from typing import Any

import click

from controlplane.cli import output as out
from controlplane.cli.client import path_of
from controlplane.cli.invocation import Invocation, output_option, pass_invocation
from controlplane.cli.output import Format
from controlplane.cli.views import VmView


class LabelChange(click.ParamType[tuple[str, str | None]]):
    """``key=value`` puts a label, ``key-`` takes it away."""

    name = "key=value|key-"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str | None]:
        if isinstance(value, tuple):
            return value
        key, equals, rest = str(value).partition("=")
        if key and equals:
            return key, rest
        if not (key.endswith("-") and len(key) > 1):
            self.fail(f"{value!r} is not of the form key=value or key-", param, ctx)
        return key[:-1], None


@click.command("label")
@click.argument("name", metavar="VM")
@click.argument("changes", metavar="KEY=VALUE|KEY-...", type=LabelChange(), nargs=-1, required=True)
@output_option
@pass_invocation
def label(
    invocation: Invocation,
    name: str,
    changes: tuple[tuple[str, str | None], ...],
    form: str | None,
) -> None:
    """Put labels on a VM, or take them away (KEY-)."""
    output = invocation.output(form)
    answer = invocation.client.patch(path_of("vms", name), {"labels": dict(changes)})
    seen = answer.decode(VmView)
    if output.form is Format.JSON:
        output.json(answer.body)
    elif output.form is Format.NAME:
        output.names([seen.name])
    else:
        output.line(f"{seen.name}: {out.labels(seen.labels)}")
