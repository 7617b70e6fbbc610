"""A full node: systemd as PID 1, sshd, libvirtd and disks of its own, as an operator's machine is.

It is a container of systemd-nspawn on an overlay of the shared root (`full_root.py`), on the lab's
bridge. It is reached over SSH alone. Everything it writes is below its directory, so that it comes
back from a power failure with what it had on its disks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from tests.lab import network, runtime
from tests.lab.commands import run
from tests.lab.layout import CGROUP_PREFIX, STATE_DIR, LabError
from tests.lab.link import SupervisorLink, wait_until
from tests.lab.processes import ProcessKey, find_by_mount, kill_all
from tests.lab.state import anchor_program
from tests.lab.supervisor import Program

SSH_DIR = STATE_DIR / "ssh"
KEY_FILE = SSH_DIR / "key"
# Says that the node's namespaces are there, and that it waits for its cable.
READY_FILE = "waits-for-its-cable"
# A node boots in two seconds; five at once on two cores take a while longer.
BOOT_LIMIT_S = 120.0
COMMAND_LIMIT_S = 120.0
SSH_OPTIONS = (
    *("-F", "none", "-i", str(KEY_FILE), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"),
    # A lab's nodes are new each time, and all have the root's host keys.
    *("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={os.devnull}"),
    *("-o", "LogLevel=ERROR"),
)

# nspawn takes the cgroup that it is started in for its own, so each node is put into one.
INIT = """\
set -e
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
    [ -e $hierarchy/cgroup.procs ] || continue
    mkdir -p $hierarchy/{cgroup}
    echo $$ >$hierarchy/{cgroup}/cgroup.procs
done
mount -t overlay overlay -o lowerdir={root},upperdir={dir}/upper,workdir={dir}/scratch {dir}/mounted
touch {dir}/{ready}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
exec systemd-nspawn --quiet --boot --register=no --keep-unit --console=read-only \\
    --machine={name} --uuid={machine_id} --capability=all --bind=/dev/net/tun \\
    --resolv-conf=off --timezone=off --link-journal=no --directory={dir}/mounted
"""


class FullNode(Struct, frozen=True, kw_only=True):
    """One node; ``directory`` holds all that it writes, as the machine sees it."""

    name: str
    address: str

    @property
    def directory(self) -> Path:
        return STATE_DIR / "nodes" / self.name

    def prepare(self, root: Path, others: Iterable[FullNode]) -> None:
        """Write what makes it this machine and no other; ``others`` are the names it knows."""
        upper = self.directory / "upper"
        keys = upper / "root" / ".ssh"
        for part in (upper / "etc", keys, self.directory / "scratch", self.directory / "mounted"):
            part.mkdir(parents=True)
        for private in (keys, keys.parent):
            private.chmod(0o700)
        shutil.copy(KEY_FILE.with_suffix(".pub"), keys / "authorized_keys")
        (upper / "etc" / "hostname").write_text(f"{self.name}\n")
        hosts = "".join(f"{node.address} {node.name}\n" for node in others)
        (upper / "etc" / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        script = INIT.format(
            name=self.name,
            ready=READY_FILE,
            dir=self.directory,
            root=root,
            cgroup=f"{CGROUP_PREFIX}{self.name}",
            machine_id=uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.name}.lab.novacron.invalid").hex,
        )
        (self.directory / "init.sh").write_text(script)

    def boot(self, link: SupervisorLink) -> None:
        """Switch the node on; see ``wait_running``."""
        ready = self.directory / READY_FILE
        ready.unlink(missing_ok=True)
        anchor = link.start(
            Program(
                name=anchor_program(self.name),
                arguments=(
                    *("unshare", "--mount", "--net", "--propagation=private", "/bin/sh"),
                    str(self.directory / "init.sh"),
                ),
                environment=runtime.environment(Path("/")),
                restart=False,
            )
        )
        link.wait_for(anchor_program(self.name), ready.exists, f"{self.name} to mount its files")
        network.plug_node(self.name, self.address, anchor)

    def wait_running(self, link: SupervisorLink) -> None:
        """Return once systemd has started everything and sshd lets root in. Raises LabError."""
        link.wait_for(
            anchor_program(self.name), self._is_running, f"{self.name} to boot", BOOT_LIMIT_S
        )

    def crash(self, link: SupervisorLink) -> None:
        """Fail as its power supply would: its processes and guests are gone, its disks stay."""
        network.unplug_node(self.name)
        link.stop(anchor_program(self.name), grace_s=0.0)
        kill_all(self.processes)
        wait_until(lambda: not self.processes(), f"{self.name} to be gone")

    def processes(self) -> list[ProcessKey]:
        """Return every living process in the node: guests, too."""
        return find_by_mount(f"{STATE_DIR.name}/nodes/{self.name}/upper")

    def run(self, command: str, limit_s: float = COMMAND_LIMIT_S) -> str:
        """Run a shell command as root and return what it printed; raises LabError."""
        outcome = self.attempt(command, limit_s)
        if outcome.returncode != 0:
            said = (outcome.stderr or outcome.stdout).strip()
            raise LabError(f"{self.name}: `{command}` failed: {said}")
        return outcome.stdout

    def copy(self, source: Path, target: Path) -> None:
        """Put a file on the node."""
        run("scp", "-q", *SSH_OPTIONS, str(source), f"root@{self.address}:{target}")

    def attempt(
        self, command: str, limit_s: float = COMMAND_LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root that may fail."""
        return subprocess.run(
            ("ssh", *SSH_OPTIONS, f"root@{self.address}", command),
            check=False,
            capture_output=True,
            text=True,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
        )

    def _is_running(self) -> bool:
        # "degraded" is what systemd calls a machine that runs while a unit of it has failed.
        said = self.attempt("systemctl is-system-running").stdout.strip()
        return said in ("running", "degraded")


def make_key() -> None:
    """Make the key that all nodes of this lab let in."""
    SSH_DIR.mkdir(mode=0o700)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(KEY_FILE))
