"""`novacron login`: checks where the API is and who we are there, and remembers both."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from msgspec.structs import replace

from controlplane.cli.client import BASE, Client
from controlplane.cli.context import (
    DEFAULT_CONTEXT,
    Context,
    check_token,
    config_path,
    load_config,
    parse_endpoint,
    read_ca,
    save_config,
)
from controlplane.cli.errors import CliError
from controlplane.cli.invocation import Invocation, pass_invocation
from controlplane.cli.views import ClusterView


@click.command()
@click.option(
    "--endpoint",
    "endpoints",
    metavar="URL",
    multiple=True,
    required=True,
    help="Where a replica answers, such as https://10.0.0.1:8443; may be given for each.",
)
@click.option("--ca", type=Path, help="The cell's CA certificate; without it, the system's.")
@click.option("--token-file", type=Path, required=True, help="The token; - reads stdin.")
@click.option("--name", help="What to call this login.  [default: the current one]")
@pass_invocation
def login(
    invocation: Invocation,
    endpoints: tuple[str, ...],
    ca: Path | None,
    token_file: Path,
    name: str | None,
) -> None:
    """Check an endpoint and a token, and remember them.

    The CA and the token are copied into the configuration file, which only its owner can read.
    """
    context = Context(
        endpoints=tuple(parse_endpoint(url).url for url in endpoints),
        ca="" if ca is None else read_ca(ca),
        token=_read_token(token_file),
    )
    client = Client(context, invocation.terminal, invocation.rng)
    try:
        cluster = client.get_as(ClusterView, f"{BASE}/cluster")
    finally:
        client.close()
    path = config_path(invocation.environ)
    config = load_config(path)
    chosen = name or invocation.context_name or config.current or DEFAULT_CONTEXT
    contexts = {**config.contexts, chosen: context}
    save_config(path, replace(config, current=chosen, contexts=contexts))
    invocation.terminal.print(f"logged in to cell {cluster.cell} as context {chosen!r}")


def _read_token(path: Path) -> str:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read the token from {path}: {error}") from error
    return check_token(text, str(path))
