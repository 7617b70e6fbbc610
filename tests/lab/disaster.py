"""The loss of the lab's etcd, and the command that an operator runs on a replica's machine then."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.lab import etcd, layout, runtime
from tests.lab.cluster import Lab
from tests.lab.commands import COMMAND_LIMIT_S


def lose_etcd(lab: Lab) -> None:
    """End replicas and members, delete all members' data, and start the members empty."""
    for replica in lab.replicas:
        lab.link.stop(replica.name)
    for member in lab.members:
        lab.link.stop(member.name)
        shutil.rmtree(member.directory)
    etcd.start(lab.members, lab.link)
    etcd.wait_for(lab.members, lab.link)


def restore(lab: Lab, backup: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `novacron cluster restore` in the place of the first replica, as its user."""
    replica = lab.replicas[0]
    file = replica.directory / backup.name
    shutil.copyfile(backup, file)
    os.chown(file, layout.REPLICA_UID, layout.REPLICA_UID)
    command = (
        *runtime.unprivileged(layout.REPLICA_UID),
        *(runtime.python(), "-m", "controlplane.cli.main", "cluster", "restore", str(file)),
        *("--config", str(replica.config_file), "--yes", *options),
    )
    script = "\n".join(("set -e", *runtime.mounts(), 'exec "$@"'))
    return subprocess.run(
        ("unshare", "--mount", "/bin/sh", "-c", script, "restore", *command),
        env=runtime.environment(replica.directory),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
        check=False,
    )
