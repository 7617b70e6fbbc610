"""The smallest guest: a Debian cloud kernel and a busybox initramfs, built once per machine.

Owns the cache directory it is given. Needs no root and installs nothing: packages are downloaded
with apt-get and unpacked into a temporary directory. The guest prints ``boot <uptime>`` and then
``count <n>`` every 200 ms on its first serial port, powers off at its power button, and writes to
its disk once per boot only. Switches on its kernel command line:

    nova.exit=poweroff@S    powers off S seconds after init started; also reboot@S and panic@S
    nova.address=A/B        gives the first NIC this address
    nova.pulse=S            instead of counting prints ``pulse <boot> <n> <n>`` every S seconds

A pulse can be told from one that was torn: the number is there twice, beside the name of the boot
that it belongs to. It costs the guest next to nothing, so that it may be short.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

KERNEL_NAME = "tiny-kernel"
INITRD_NAME = "tiny-initrd"
DEFAULT_CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache" / "guest"

_KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
_TOOL_PACKAGES = ("busybox-static", "cpio")
# A mirror that does not answer for this long is taken to be out of reach.
_DOWNLOAD_TIMEOUT_S = 600
_TOOL_TIMEOUT_S = 120

# In the order in which they must be loaded; one that the package lacks is built into its kernel.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_balloon",
    "virtio-rng",
    "evdev",
    "button",
    "pvpanic",
    "pvpanic-mmio",
)

_INIT = """#!/bin/sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
# The kernel's messages come out of the same port, and would tear the lines below.
echo 1 >/proc/sys/kernel/printk

read -r uptime rest </proc/uptime
echo "boot $uptime"

while read -r module; do
    insmod "/lib/modules/$module.ko" 2>/dev/null
done </lib/modules/order

for word in $(cat /proc/cmdline); do
    case "$word" in
        nova.exit=*@*) leave="${word#nova.exit=}" ;;
        nova.address=*) address="${word#nova.address=}" ;;
        nova.pulse=*) pulse="${word#nova.pulse=}" ;;
    esac
done

end_by() {
    echo "ending by $1"
    case "$1" in
        poweroff) poweroff -f ;;
        reboot) reboot -f ;;
        panic) echo c >/proc/sysrq-trigger ;;
    esac
}
if [ -n "$leave" ]; then
    (sleep "${leave#*@}"; end_by "${leave%@*}") &
fi

acpid -f -c /etc/acpi -l /dev/null >/dev/null 2>&1 &

if [ -b /dev/vda ]; then
    boots=$(dd if=/dev/vda bs=16 count=1 2>/dev/null | tr -cd 0-9)
    boots=$((${boots:-0} + 1))
    printf '%-15d\\n' "$boots" | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
    echo "disk boots $boots"
fi
if [ -d /sys/class/net/eth0 ]; then
    ip link set eth0 up
    [ -n "$address" ] && ip address add "$address" dev eth0
    echo "nic $(cat /sys/class/net/eth0/address)"
fi

count=0
if [ -n "$pulse" ]; then
    read -r boot </proc/sys/kernel/random/boot_id
    boot="${boot%%-*}"
    # A pipe that nobody writes to: waiting on it starts no process, unlike usleep.
    mkfifo /pulse
    exec 3<>/pulse
    while true; do
        count=$((count + 1))
        echo "pulse $boot $count $count"
        read -r -t "$pulse" rest <&3
    done
fi
while true; do
    count=$((count + 1))
    echo "count $count"
    usleep 200000
done
"""

_POWER_BUTTON = """#!/bin/sh
echo "power button" >/dev/ttyS0
poweroff -f
"""


def ensure_guest_artefacts(cache_dir: Path = DEFAULT_CACHE_DIR) -> Path:
    """Return the directory that holds ``tiny-kernel`` and ``tiny-initrd``, building it once.

    Safe to call from many processes. Raises RuntimeError, with the words of the tool that failed.
    """
    built = cache_dir / _recipe_digest()
    if built.is_dir():
        return built
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / "lock"):
        if not built.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix="build-") as scratch:
                _build(Path(scratch)).rename(built)
    return built


def _recipe_digest() -> str:
    recipe = "\0".join((_INIT, _POWER_BUTTON, *_MODULES))
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(scratch: Path) -> Path:
    packages = scratch / "packages"
    packages.mkdir()
    for package in (*_TOOL_PACKAGES, _kernel_package()):
        _download(package, scratch, packages)
    out = scratch / "out"
    out.mkdir(mode=0o755)
    (kernel,) = (packages / "boot").glob("vmlinuz-*")
    shutil.copyfile(kernel, out / KERNEL_NAME)
    root = scratch / "root"
    _fill_root(root, packages)
    (out / INITRD_NAME).write_bytes(_archive(root, packages))
    for artefact in out.iterdir():
        artefact.chmod(0o644)
    return out


def _kernel_package() -> str:
    """Return the package that the metapackage stands for."""
    listed = _run("apt-cache", "depends", "--important", _KERNEL_METAPACKAGE)
    for line in listed.decode().splitlines():
        kind, _, package = line.strip().partition(": ")
        if kind == "Depends" and package.startswith("linux-image-"):
            return package
    raise RuntimeError(f"{_KERNEL_METAPACKAGE} depends on no kernel; is apt's list there?")


def _download(package: str, scratch: Path, target: Path) -> None:
    # apt's own user cannot write below a private directory: it would warn and go on as root.
    _run(
        "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package,
        cwd=scratch, timeout_s=_DOWNLOAD_TIMEOUT_S,
    )  # fmt: skip
    (archive,) = scratch.glob(f"{package}_*.deb")
    _run("dpkg", "-x", str(archive), str(target))


def _fill_root(root: Path, packages: Path) -> None:
    for directory in ("bin", "dev", "proc", "sys", "etc/acpi/PWRF", "lib/modules"):
        (root / directory).mkdir(parents=True)
    busybox = next(p for p in packages.rglob("busybox") if p.is_file() and p.parent.name == "bin")
    shutil.copy(busybox, root / "bin" / "busybox")
    for applet in _run(str(busybox), "--list").decode().split():
        link = root / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    _write_script(root / "init", _INIT)
    _write_script(root / "etc/acpi/PWRF/00000080", _POWER_BUTTON)
    order = [name for name in _MODULES if _copy_module(name, packages, root / "lib/modules")]
    (root / "lib/modules/order").write_text("".join(f"{name}\n" for name in order))


def _copy_module(name: str, packages: Path, target: Path) -> bool:
    found = sorted(packages.rglob(f"{name}.ko*"))
    if not found:
        return False
    content = found[0].read_bytes()
    if found[0].suffix == ".xz":
        content = lzma.decompress(content)
    (target / f"{name}.ko").write_bytes(content)
    return True


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _archive(root: Path, packages: Path) -> bytes:
    cpio = next(p for p in packages.rglob("cpio") if p.is_file() and p.parent.name == "bin")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = _run(
        str(cpio), "--create", "--format=newc", "--quiet", "--owner=0:0",
        cwd=root, stdin="".join(f"{name}\n" for name in names).encode(),
    )  # fmt: skip
    return gzip.compress(archive, mtime=0)


def _run(
    *command: str, cwd: Path | None = None, stdin: bytes = b"", timeout_s: float = _TOOL_TIMEOUT_S
) -> bytes:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(command)} failed: {words}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{' '.join(command)} failed: {error}") from error
    return done.stdout
