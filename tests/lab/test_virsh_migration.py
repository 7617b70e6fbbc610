"""The lab's nodes can do what a migration needs, shown by hand: without agents or control plane.

A guest moves while its counter goes on: with a disk that both nodes see, with one that is copied
over TLS. Who is not the right QEMU of the cell cannot take part, and a disk on shared storage is
leased to one node at a time. Guests stay when a test ends; they end with the lab.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.domain_xml import DomainLayout, build_domain_xml
from agent.hypervisor import DomainDefinition
from shared.ids import domain_uuid
from shared.model import BootSpec, DiskSpec, VmSpec
from tests.lab import witness
from tests.lab.audit import virsh
from tests.lab.byte_relay import ByteRelay
from tests.lab.cluster import Lab, LabPlan
from tests.lab.commands import attempt, run
from tests.lab.layout import NODE_ARTEFACT_DIR, NODE_QEMU_PKI_DIR, SHARED_POOL_DIR
from tests.lab.link import wait_until
from tests.lab.nodes import POOLS, LightNode
from tests.lab.state import virtlockd_program
from tests.lab.virsh_migration import VirshMigration

pytestmark = [pytest.mark.lab, pytest.mark.long]

SIZE_GIB = 1
COUNTS_BEFORE = 3


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(LabPlan(nodes=2, replicas=0, disk_leases=True)) as built:
        yield built


def test_a_guest_moves_with_a_shared_disk_and_the_lease_on_it(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.nodes
    _make_volume(first, "shared", "leased")
    _start(first, "leased", "shared")
    assert _lease_holder(lab, "leased") == first.name
    assert "leased-again" not in _started_on_same_disk(second, "leased")

    assert _migrate(lab, "leased", shared=True).returncode == 0

    _check_moved(lab, "leased", tmp_path)
    assert _lease_holder(lab, "leased") == second.name
    assert "leased-again" not in _started_on_same_disk(first, "leased")


def test_a_guest_moves_with_a_copy_of_its_disk(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.nodes
    for node in lab.nodes:
        _make_volume(node, "default", "copied")
    _start(first, "copied", "default")

    assert _migrate(lab, "copied", copied=("vda",)).returncode == 0

    _check_moved(lab, "copied", tmp_path)
    virsh(second, "destroy", "copied")
    path = _disk_path("copied", "default")
    said = run("qemu-img", "compare", str(first.inside(path)), str(second.inside(path)))
    assert "identical" in said


def test_each_side_must_be_the_qemu_it_is_taken_for(lab: Lab) -> None:
    first, second = lab.nodes
    _start(first, "wary", None)

    # Refused by the source: the destination shows another name.
    assert _migrate(lab, "wary", expected_name=first.name).returncode != 0
    assert "wary" not in _names(second, "--all")

    # Refused by the destination: the source shows nothing.
    with _certificate_taken_away(first):
        assert _migrate(lab, "wary").returncode != 0
    assert "wary" not in _names(second, "--all")

    assert _names(first, "--state-running") >= {"wary"}
    assert _migrate(lab, "wary").returncode == 0
    assert _names(second, "--state-running") >= {"wary"}


def test_a_lease_of_somebody_else_keeps_a_guest_from_running(lab: Lab) -> None:
    node = lab.node("n1")
    _make_volume(node, "shared", "taken")
    virsh(node, "define", str(_definition(node, "taken", "taken", "shared")))
    with (SHARED_POOL_DIR / "taken.qcow2").open("r+b") as disk:
        # What a virtlockd elsewhere takes, on the same byte; QEMU's own locks are on others.
        fcntl.lockf(disk, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        refused = attempt("virsh", "-c", node.libvirt_uri, "start", "taken")
        assert "Lockspace resource" in refused.stderr
    virsh(node, "start", "taken")


@contextlib.contextmanager
def _certificate_taken_away(node: LightNode) -> Iterator[None]:
    pki = node.directory / "etc-libvirt" / NODE_QEMU_PKI_DIR.name
    shown = [pki / "client-cert.pem", pki / "client-key.pem"]
    for path in shown:
        path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        for path in shown:
            path.with_suffix(".away").rename(path)


def _migrate(
    lab: Lab,
    name: str,
    *,
    copied: tuple[str, ...] = (),
    shared: bool = False,
    expected_name: str = "",
) -> subprocess.CompletedProcess[str]:
    source, destination = lab.nodes
    with ByteRelay(lab, source, destination) as relay:
        asked = VirshMigration(
            domain=name,
            source=source,
            destination=destination,
            relay_uri=relay.uri,
            copied=copied,
            shared=shared,
            expected_name=expected_name,
        )
        return attempt(*asked.command())


def _check_moved(lab: Lab, name: str, scratch: Path) -> None:
    """Check that one boot of the guest counts on at the destination, and that the source is rid."""
    source, destination = lab.nodes
    logs = [_console_log(node, name) for node in lab.nodes]
    counted = witness.boots(logs[0])[0].counts[-1]
    # The destination's log begins in the middle of the boot that the source's tells of.
    joined = scratch / "joined.log"

    def counts() -> tuple[int, ...]:
        joined.write_bytes(b"".join(log.read_bytes() for log in logs))
        (boot,) = witness.boots(joined)
        assert witness.counts_up(boot)
        return boot.counts

    wait_until(lambda: counts()[-1] > counted + COUNTS_BEFORE, f"{name} to count on")
    assert counts()[0] == 1
    assert witness.boots(logs[0])[0].counts[-1] == counted
    assert name in _names(destination, "--persistent", "--state-running")
    assert name not in _names(source, "--all")


def _start(node: LightNode, name: str, pool: str | None) -> None:
    """Define and start a guest, and return once it counts."""
    virsh(node, "define", str(_definition(node, name, name, pool)))
    virsh(node, "start", name)
    log = _console_log(node, name)

    def counts() -> bool:
        booted = witness.boots(log)
        return bool(booted) and len(booted[-1].counts) >= COUNTS_BEFORE

    wait_until(counts, f"{name} to count")


def _started_on_same_disk(node: LightNode, name: str) -> set[str]:
    """Try to run a second domain on a guest's disk; returns what runs on the node then."""
    again = f"{name}-again"
    definition = _definition(node, again, name, "shared")
    refused = attempt("virsh", "-c", node.libvirt_uri, "create", str(definition))
    assert "lock" in refused.stderr
    return _names(node, "--state-running")


def _lease_holder(lab: Lab, name: str) -> str | None:
    """Return the node whose virtlockd holds the lock on a shared disk, as the kernel tells it."""
    inode = str((SHARED_POOL_DIR / f"{name}.qcow2").stat().st_ino)
    node_of = {str(lab.link.pid_of(virtlockd_program(n.name))): n.name for n in lab.nodes}
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, _, access, pid, place, *_ = line.split()
        if (kind, access) == ("POSIX", "WRITE") and place.rpartition(":")[2] == inode:
            return node_of.get(pid)
    return None


def _definition(node: LightNode, name: str, disk: str, pool: str | None) -> Path:
    """Write the domain that an agent would define, for virsh; returns where."""
    disks = () if pool is None else (DiskSpec(name="data", size_gib=SIZE_GIB, pool=pool),)
    boot = BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline="console=ttyS0 quiet")
    path = node.directory / f"{name}.xml"
    path.write_text(
        build_domain_xml(
            DomainDefinition(
                vm_id=name,
                name=name,
                uuid=domain_uuid(name),
                title=name,
                tenant="default",
                generation=1,
                spec=VmSpec(vcpus=1, memory_mib=192, boot=boot, disks=disks),
            ),
            DomainLayout(
                domain_type="qemu",
                machine="pc-q35-7.2",
                cpu_model="qemu64",
                kernel_path=str(NODE_ARTEFACT_DIR / "tiny-kernel"),
                initrd_path=str(NODE_ARTEFACT_DIR / "tiny-initrd"),
                disk_paths=() if pool is None else (_disk_path(disk, pool),),
                bridges=(),
                console_log_path=f"{POOLS['novacron-console']}/{name}.log",
            ),
        )
    )
    return path


def _make_volume(node: LightNode, pool: str, name: str) -> None:
    size = f"{SIZE_GIB}GiB"
    virsh(node, "vol-create-as", pool, f"{name}.qcow2", size, "--allocation=0", "--format=qcow2")


def _disk_path(name: str, pool: str) -> str:
    return f"{POOLS[pool]}/{name}.qcow2"


def _console_log(node: LightNode, name: str) -> Path:
    return node.inside(POOLS["novacron-console"]) / f"{name}.log"


def _names(node: LightNode, *options: str) -> set[str]:
    return set(virsh(node, "list", "--name", *options).split())
