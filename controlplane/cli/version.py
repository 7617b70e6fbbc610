"""`novacron version`: which release this command is."""

from __future__ import annotations

import click

from controlplane.cli.invocation import Invocation, pass_invocation
from shared.version import VERSION


@click.command()
@pass_invocation
def version(invocation: Invocation) -> None:
    """Print the version of this command."""
    invocation.terminal.print(f"novacron {VERSION}")
