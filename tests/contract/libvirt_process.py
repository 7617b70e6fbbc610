"""A libvirtd of the tests' own, in mount, network and process namespaces that end with it.

Owns one temporary directory and the processes inside its namespaces; never touches the machine's
own libvirt, its bridges or its processes. The first process inside ends when this one lets go of
its standard input, even by dying, and everything inside, QEMUs included, ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

BRIDGE = "br-test"
# For documentation only (RFC 5737): never a network that the machine is in.
PAIR_ADDRESSES = ("192.0.2.1", "192.0.2.2")
_CABLE = "cable"

_START_TIMEOUT_S = 30
_END_TIMEOUT_S = 20
_POLL_S = 0.02

# Private copies of everything that a libvirtd writes; /run needs a lock directory for consoles.
# /dev/kvm becomes what udev makes of it: otherwise libvirt, which asks as root, and QEMU, which is
# not, disagree about it, and libvirt probes QEMU anew on every call. Children are reaped by being
# ignored: libvirt waits for the end of each QEMU, which is an orphan, and not every machine's
# first process reaps at once.
_ENTER = f"""
set -e
mount --make-rprivate /
for directory in run etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mkdir -p "/$directory"
    mount --bind "$1/$directory" "/$directory"
done
if [ -e /dev/kvm ]; then
    mknod -m 0660 "$1/kvm" c 10 232
    chgrp kvm "$1/kvm"
    mount --bind "$1/kvm" /dev/kvm
fi
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
mount -t sysfs sysfs /sys
ip link set lo up
ip link add {BRIDGE} type bridge
ip link set {BRIDGE} up
echo ready
exec env --ignore-signal=CHLD cat
"""

_LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
auth_unix_rw = "none"
unix_sock_rw_perms = "0770"
log_filters = "3:util"
log_outputs = "2:stderr"
"""

# One namespace on one kernel: no cgroups of its own, no security driver, logs as plain files.
_QEMU_CONF = """\
cgroup_controllers = []
namespaces = []
security_driver = "none"
stdio_handler = "file"
"""


class LibvirtProcess:
    """One libvirtd, which can die and come back while its QEMUs live on."""

    def __init__(self, root: Path, holder: subprocess.Popen[bytes]) -> None:
        first = _only_child(holder.pid)
        self.root = root
        self.socket = root / "run/libvirt/libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.pool_dir = root / "images"
        self.console_dir = root / "console"
        self.network_dir = Path(f"/proc/{first}/root/sys/class/net")
        self._first = first
        self._inside = (
            *("nsenter", "--mount", "--uts", "--net", "--pid", "--target", str(first), "--"),
        )
        self._entered: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start libvirtd and wait until its socket answers."""
        assert self._entered is None, "one libvirtd at a time"
        with (self.root / "libvirtd.log").open("ab") as log:
            self._entered = subprocess.Popen(
                [*self._inside, "libvirtd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._entered.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.root / "libvirtd.log").read_text(errors="replace"))
            time.sleep(_POLL_S)

    def signal_libvirtd(self, number: signal.Signals) -> None:
        """Send libvirtd a signal."""
        assert self._entered is not None, "it runs"
        os.kill(_only_child(self._entered.pid), number)
        if number == signal.SIGCONT:
            # nsenter stops itself along with its child.
            self._entered.send_signal(number)

    def kill(self) -> None:
        """Kill libvirtd as a crash would; its QEMUs go on."""
        assert self._entered is not None, "it runs"
        self.signal_libvirtd(signal.SIGKILL)
        self._entered.wait()
        self._entered = None

    def end(self) -> None:
        """Kill libvirtd for good; does nothing when it does not run."""
        if self._entered is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal_libvirtd(signal.SIGCONT)
            self.kill()

    def signal_qemu(self, domain: str, number: signal.Signals) -> None:
        """Send a running domain's QEMU a signal. Raises FileNotFoundError for one not running."""
        pid = int((self.root / f"run/libvirt/qemu/{domain}.pid").read_text())
        subprocess.run([*self._inside, "kill", f"-{number.value}", str(pid)], check=True)

    def plug_into(self, other: LibvirtProcess) -> None:
        """Lay a cable to another one's network: PAIR_ADDRESSES are on its two ends."""
        peer = ("peer", "name", _CABLE, "netns", str(other._first))
        self._ip("link", "add", _CABLE, "type", "veth", *peer)
        for end, address in zip((self, other), PAIR_ADDRESSES, strict=True):
            end._ip("address", "add", f"{address}/24", "dev", _CABLE)
            end._ip("link", "set", _CABLE, "up")

    def virsh(self, *arguments: str) -> str:
        """Do something behind the driver's back."""
        done = subprocess.run(
            ["virsh", "-c", self.uri, *arguments],
            capture_output=True,
            timeout=_START_TIMEOUT_S,
            check=True,
        )
        return done.stdout.decode()

    def _ip(self, *arguments: str) -> None:
        entering = ("nsenter", "--net", "--target", str(self._first), "--")
        subprocess.run([*entering, "ip", *arguments], check=True)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0


@contextlib.contextmanager
def libvirt_process(name: str = "node") -> Iterator[LibvirtProcess]:
    """Run a private libvirtd for the length of the block; nothing of it is left afterwards.

    ``name`` is its node's: libvirt moves nothing between two nodes of one name.
    """
    # Short and outside any test's own directory: a unix socket's path holds 107 bytes only, and
    # QEMU's user must be able to pass through.
    root = Path(tempfile.mkdtemp(prefix="ncv"))
    root.chmod(0o755)
    try:
        holder = _hold_namespaces(root, name)
        process = LibvirtProcess(root, holder)
        try:
            process.start()
            yield process
        finally:
            process.end()
            _end(holder)
    finally:
        shutil.rmtree(root)


@contextlib.contextmanager
def libvirt_pair() -> Iterator[tuple[LibvirtProcess, LibvirtProcess]]:
    """Run two libvirtds whose QEMUs reach each other: under PAIR_ADDRESSES, over a cable."""
    with libvirt_process("one") as one, libvirt_process("two") as two:
        one.plug_into(two)
        yield one, two


def _hold_namespaces(root: Path, name: str) -> subprocess.Popen[bytes]:
    for directory in ("run/lock", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt"):
        (root / directory).mkdir(parents=True)
    (root / "etc/libvirt/qemu").mkdir(parents=True)
    (root / "etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF.format(uuid=uuid.uuid4()))
    (root / "etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    (root / "hosts").write_text(f"127.0.0.1 localhost {name}\n")
    command = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc"]
    holder = subprocess.Popen(
        [*command, "sh", "-c", _ENTER, "sh", str(root), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert holder.stdout is not None, "it is a pipe"
    said = holder.stdout.readline()
    if said != b"ready\n":
        words = (said + holder.communicate()[0]).decode()
        raise RuntimeError(f"no namespaces of our own: {words}")
    return holder


def _end(holder: subprocess.Popen[bytes]) -> None:
    """End the first process inside; the kernel ends the others before that one is gone."""
    assert holder.stdin is not None, "it is a pipe"
    assert holder.stdout is not None, "it is a pipe"
    holder.stdin.close()
    holder.wait(_END_TIMEOUT_S)
    holder.stdout.close()


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
