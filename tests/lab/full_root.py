"""The root file system of full nodes: a Debian that boots under systemd, built once per machine.

It is what an operator's fresh machine is after its packages were installed, with nothing of
NovaCron in it. Nodes mount it read-only below an overlay of their own. It is of the same release of
Debian as this machine, since a release's wheels fit the Python that they were built with.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

from tests.lab.layout import CACHE_DIR, LabError

ROOTS_DIR = CACHE_DIR / "full-root"
# What every machine with ssh has, and what the roles would install: nodes of a lab reach no mirror.
PACKAGES = (
    *("systemd-sysv", "dbus", "openssh-server", "sudo", "iproute2", "iputils-ping", "procps"),
    *("ca-certificates", "python3", "python3-apt", "python3-venv", "nftables", "chrony", "openssl"),
    *("libvirt-daemon-system", "libvirt-clients", "qemu-system-x86", "qemu-utils"),
    *("etcd-server", "etcd-client"),
)
# A slow mirror and a slow disk; the usual is a minute.
BUILD_LIMIT_S = 1_200.0
# A wait for what does not come would hold up each start of a node.
MASKED = ("systemd-networkd-wait-online.service", "apt-daily.timer", "apt-daily-upgrade.timer")


def ensure_root() -> Path:
    """Return the root's directory, building it first where it is missing. Raises LabError."""
    suite = _suite()
    key = hashlib.sha256(" ".join((suite, *PACKAGES, *MASKED)).encode()).hexdigest()[:16]
    root = ROOTS_DIR / key
    ROOTS_DIR.mkdir(parents=True, exist_ok=True)
    with (ROOTS_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            draft = root.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            _build(suite, draft)
            draft.rename(root)
    return root


def _suite() -> str:
    release = platform.freedesktop_os_release()
    suite = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not suite:
        raise LabError("full nodes are built on Debian 12 or 13, for the same release")
    return suite


def _build(suite: str, root: Path) -> None:
    outcome = subprocess.run(
        (
            "mmdebstrap",
            "--variant=minbase",
            # Its directory is in a cache; nobody else's files are in it.
            "--skip=check/empty",
            f"--include={','.join(PACKAGES)}",
            f"--customize-hook=chroot $1 systemctl mask {' '.join(MASKED)}",
            suite,
            str(root),
        ),
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    if outcome.returncode != 0:
        shutil.rmtree(root, ignore_errors=True)
        raise LabError(f"the root of full nodes was not built: {outcome.stderr[-2_000:]}")
