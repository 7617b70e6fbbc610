"""`novacron init`: the first thing anyone runs, and the only command that needs no API."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click

from controlplane.cell_files import CellFiles, Rotation
from controlplane.cli.invocation import Duration, Invocation, KeyValue, pass_invocation
from shared.clock import SystemClock
from shared.ids import looks_like_id

_NAME = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?\Z")
_HOST = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")


@click.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where to write; made if it is missing.",
)
@click.option(
    "--replica",
    "replicas",
    type=KeyValue(),
    metavar="NAME=HOST",
    multiple=True,
    help="A replica of the control plane, and the name or address it is reached at.",
)
@click.option(
    "--node",
    "nodes",
    type=KeyValue(),
    metavar="NAME=ADDRESS",
    multiple=True,
    help="A node, and its address.",
)
@click.option(
    "--member",
    "members",
    type=KeyValue(),
    metavar="NAME=HOST",
    multiple=True,
    help="A member of etcd, and the name or address it is reached at.",
)
@click.option(
    "--reissue", is_flag=True, help="Make the named replicas' and members' certificates anew."
)
@click.option(
    "--rotate-ca",
    type=click.Choice([each.value for each in Rotation]),
    help="Take the CAs one step further to new keys (docs/operations.md says when).",
)
@click.option("--token-ttl", type=Duration(), help="How long the admin token is valid.")
@click.option("--dry-run", is_flag=True, help="Say what is missing, and make nothing.")
@pass_invocation
def init(
    invocation: Invocation,
    directory: Path,
    replicas: tuple[tuple[str, str], ...],
    nodes: tuple[tuple[str, str], ...],
    members: tuple[tuple[str, str], ...],
    reissue: bool,
    rotate_ca: str | None,
    token_ttl: float | None,
    dry_run: bool,
) -> None:
    """Make a cell's CAs, certificates and first admin token.

    Run again with more names, it adds what is missing and changes nothing that exists, unless with
    --reissue or --rotate-ca.
    """
    if dry_run and (reissue or rotate_ca):
        raise click.UsageError("--dry-run tells what is missing: not with --reissue, --rotate-ca")
    _check("--replica", replicas)
    _check("--node", nodes)
    _check("--member", members)
    files = CellFiles(directory, SystemClock(), invocation.rng)
    terminal = invocation.terminal
    if dry_run:
        missing = files.missing(dict(replicas), dict(nodes), dict(members))
        for path in missing:
            terminal.print(str(path))
        terminal.tell(f"{len(missing)} files would be made in {directory}")
        return
    cluster = files.ensure_cell(None if token_ttl is None else timedelta(seconds=token_ttl))
    if rotate_ca is not None:
        files.rotate(Rotation(rotate_ca))
    if reissue:
        files.reissue(
            [f"replicas/{name}/{part}" for name, _ in replicas for part in ("controlplane", "etcd")]
        )
        files.reissue([f"members/{name}/etcd" for name, _ in members])
    for name, address in replicas:
        files.add_replica(name, address)
    for name, address in nodes:
        files.add_node(name, address)
    for name, address in members:
        files.add_member(name, address)
    for path in files.made:
        terminal.print(str(path))
    terminal.tell(f"cell {cluster.cell}: {len(files.made)} files made in {directory}")
    if files.token_file in files.made:
        terminal.tell(
            f"once a replica runs: novacron login --endpoint https://HOST:8443 "
            f"--ca {files.ca_file} --token-file {files.token_file}"
        )


def _check(option: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Raise UsageError for a name that is no file name or certificate name; tells all of them."""
    faults = [f"{name!r} is given twice" for name in _repeated(pairs)]
    for name, address in pairs:
        if not _NAME.match(name) or looks_like_id(name):
            faults.append(f"{name!r} is no name: lowercase letters, digits, dots and hyphens")
        if not _is_address(address):
            faults.append(f"{address!r} is neither a host name nor an IP address")
    if faults:
        raise click.UsageError(f"{option}: {'; '.join(faults)}")


def _repeated(pairs: Sequence[tuple[str, str]]) -> list[str]:
    names = [name for name, _ in pairs]
    return sorted({name for name in names if names.count(name) > 1})


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.match(text) is not None
    return True
