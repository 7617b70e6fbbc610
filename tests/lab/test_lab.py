"""The lab itself, at the level of nodes: what it builds, what it refuses, that nothing stays."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import network
from tests.lab.cluster import Lab, LabPlan
from tests.lab.commands import attempt, run
from tests.lab.layout import AGENT_UID, LIBVIRT_GROUP, QEMU_USER, LabError
from tests.lab.link import wait_until
from tests.lab.nodes import POOLS, LightNode
from tests.lab.processes import ProcessKey, is_alive
from tests.lab.runtime import unprivileged
from tests.lab.state import anchor_program, libvirtd_program

pytestmark = pytest.mark.lab

NODES_ONLY = LabPlan(nodes=2, replicas=0)
# A guest without a kernel: its firmware runs, which is all that is asked of it here.
BARE_DOMAIN = """\
<domain type='qemu'><name>bare</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type></os>
<devices><interface type='bridge'><source bridge='br-lan'/><model type='virtio'/></interface>
<serial type='file'><source path='/var/lib/libvirt/novacron-console/bare.log'/></serial>
</devices></domain>
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(NODES_ONLY) as built:
        yield built


def test_each_node_has_a_libvirtd_of_its_own(lab: Lab) -> None:
    uuids = set()
    for node in lab.nodes:
        capabilities = _virsh(node, "capabilities")
        uuids.add(capabilities.partition("<uuid>")[2].partition("</uuid>")[0])
        assert _virsh(node, "pool-list", "--name").split() == sorted(POOLS)
    assert len(uuids) == len(lab.nodes)


def test_the_socket_admits_the_group_of_libvirt_and_nobody_else(lab: Lab) -> None:
    node = lab.node("n1")
    facts = node.libvirt_socket.stat()
    gid = int(run("getent", "group", LIBVIRT_GROUP).split(":")[2])
    assert (facts.st_gid, facts.st_mode & 0o777) == (gid, 0o770)
    connect = ("virsh", "-c", node.libvirt_uri, "list")
    assert attempt(*unprivileged(AGENT_UID, gid), *connect).returncode == 0
    assert attempt(*unprivileged(AGENT_UID), *connect).returncode != 0


def test_qemu_runs_without_root_and_dies_with_its_node(lab: Lab) -> None:
    node = lab.node("n2")
    before = node.boot_id()
    definition = node.directory / "bare.xml"
    definition.write_text(BARE_DOMAIN)
    _virsh(node, "create", str(definition))
    qemu = next(k for k in node.processes() if "qemu-system" in _executable(k.pid))
    qemu_uid = int(run("id", "-u", QEMU_USER))
    assert Path(f"/proc/{qemu.pid}").stat().st_uid == qemu_uid

    lab.restart_node("n2")

    assert not is_alive(qemu)
    assert _virsh(node, "list", "--name").split() == []
    anchor = lab.link.pid_of(anchor_program("n2"))
    seen = run("nsenter", f"--target={anchor}", "--mount", "--", "cat", _BOOT_ID).strip()
    assert seen == node.boot_id() != before
    assert seen != Path(_BOOT_ID).read_text().strip()


def test_a_killed_libvirtd_comes_back_unless_told_otherwise(lab: Lab) -> None:
    program = libvirtd_program("n1")
    first = _process(lab, program)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: lab.link.lives(program) and _process(lab, program) != first, "a second")

    lab.link.set_restart(program, False)
    second = _process(lab, program)
    os.kill(second.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(second), "its end")
    assert not lab.link.lives(program)
    lab.link.set_restart(program, True)
    wait_until(lambda: lab.link.lives(program) and _process(lab, program) != second, "a third")


def test_a_cable_can_be_cut_and_one_way_be_closed(lab: Lab) -> None:
    first, second = lab.nodes
    anchor = lab.link.pid_of(anchor_program("n1"))
    assert _reaches(anchor, second.address)
    network.set_cable("n2", up=False)
    assert not _reaches(anchor, second.address)
    network.set_cable("n2", up=True)
    network.drop_between(anchor, second.address)
    assert not _reaches(anchor, second.address)
    assert _reaches(anchor, "10.88.0.1")
    network.heal(anchor)
    assert _reaches(anchor, second.address)
    assert first.address != second.address


def test_a_second_lab_is_refused_and_told_how_to_clear_the_first(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"`\./dev lab down` removes it"):
        Lab(NODES_ONLY).up()
    assert all(n.libvirtd_pid is not None for n in lab.state().nodes)


def _virsh(node: LightNode, *arguments: str) -> str:
    return run("virsh", "-c", node.libvirt_uri, *arguments)


def _process(lab: Lab, program: str) -> ProcessKey:
    recorded = lab.link.program(program)
    assert recorded is not None
    return recorded.key


def _executable(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]


def _reaches(anchor: int, address: str) -> bool:
    """Tell whether an address answers to ARP within the kernel's own tries."""
    inside = ("nsenter", f"--target={anchor}", "--net", "--")
    run(*inside, "ip", "neighbour", "flush", "all")
    probe = f"import socket; s = socket.create_connection(('{address}', 9), timeout=2)"
    said = attempt(*inside, sys.executable, "-c", probe).stderr
    return "ConnectionRefusedError" in said


_BOOT_ID = "/proc/sys/kernel/random/boot_id"
