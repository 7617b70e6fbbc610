"""`novacron cluster backup`: a file that is written whole and checked, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import click

from controlplane.backup.format import Reading, Summary
from controlplane.cli import output as out
from controlplane.cli.client import BASE
from controlplane.cli.errors import CliError
from controlplane.cli.invocation import Invocation, pass_invocation
from shared.durable_files import sync_directory
from shared.errors import RecordUnreadable

NOT_IN_IT = (
    "not in it: the CA's keys and the rest of what `novacron init` made, replicas' and agents' own "
    "files, images and kernels on nodes, and the disks of VMs. Keep those, too. It holds all "
    "records and the hashes of all tokens: keep it where only you can read it."
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Put it in the place of a file that is there.")
@pass_invocation
def backup(invocation: Invocation, file: Path, force: bool) -> None:
    """Write a backup of the control plane to FILE.

    Any replica makes it, from etcd at one moment and from its copy of history. The file is complete
    and checked when it is there, with mode 0600.
    """
    check_free(file, force=force)
    with invocation.client.download(f"{BASE}/cluster/backup") as pieces:
        summary = write_backup(file, pieces, force=force)
    header = summary.header
    invocation.terminal.print(str(file))
    invocation.terminal.tell(
        f"cell {header.cell} at {out.stamp(header.made_at)}: {summary.keys} keys of etcd, "
        f"{summary.entries} entries of history, {out.size(summary.size_bytes)}"
    )
    invocation.terminal.tell(NOT_IN_IT)


def check_free(file: Path, *, force: bool) -> None:
    """Raise CliError for a file that is there and may not be replaced."""
    if not force and os.path.lexists(file):
        raise _taken(file)


def write_backup(file: Path, pieces: Iterable[bytes], *, force: bool) -> Summary:
    """Write a backup beside its place, check it, and only then put it there.

    Raises CliError when what came is damaged, or something has taken the place meanwhile.
    """
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")  # mode 0600
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            summary = _write_checked(opened, pieces)
            opened.flush()
            os.fsync(opened.fileno())
        if force:
            draft.replace(file)
        else:
            file.hardlink_to(draft)  # unlike a rename it never replaces
    except FileExistsError as error:
        raise _taken(file) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
    sync_directory(file.parent)
    return summary


def _write_checked(opened: BinaryIO, pieces: Iterable[bytes]) -> Summary:
    reading = Reading()
    try:
        for piece in pieces:
            for _ in reading.feed(piece):
                pass  # each frame is checked on its way
            opened.write(piece)
        return reading.finished()
    except RecordUnreadable as damaged:
        raise CliError(f"no whole backup has come: {damaged}", "ask again") from damaged


def _taken(file: Path) -> CliError:
    return CliError(f"{file} is there already", "give another name, or --force to replace it")
