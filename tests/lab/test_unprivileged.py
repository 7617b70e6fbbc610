"""Who may do what on a node: the agent is nobody special, and neither is QEMU.

The agent's only way to libvirt is the group of its socket (see also ``test_lab``); files of VMs are
libvirt's. Looked up in /proc, while a VM that the agent started runs.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import Lab, LabPlan
from tests.lab.commands import attempt
from tests.lab.layout import (
    AGENT_UID,
    LIBVIRT_GROUP,
    MEMBER_UID,
    NODE_CONFIG_DIR,
    NODE_STATE_DIR,
    QEMU_USER,
    REPLICA_UID,
)
from tests.lab.nodes import POOLS
from tests.lab.runtime import unprivileged
from tests.lab.state import agent_program, anchor_program
from tests.lab.trial import Trial, new_vm
from tests.lab.witness import Witness

pytestmark = pytest.mark.lab

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    record = tmp_path_factory.mktemp("witness") / "looks"
    with Lab(LabPlan(nodes=1)) as lab, Witness(record) as watching:
        trial = Trial(lab, watching)
        created = trial.api.wait(trial.api.create_vm(new_vm("plain", disk=True)))
        assert created.state == "succeeded"
        yield trial
        trial.api.close()


@pytest.mark.parametrize(
    ("program", "uid"),
    [("n1.agent", AGENT_UID), ("r1", REPLICA_UID), ("etcd1", MEMBER_UID)],
)
def test_our_processes_have_no_privilege(trial: Trial, program: str, uid: int) -> None:
    facts = _status(trial.lab.link.pid_of(program))
    assert set(facts["Uid"].split()) == {str(uid)}
    assert set(facts["Gid"].split()) == {str(uid)}
    assert {name: int(facts[name], 16) for name in CAPABILITY_SETS} == dict.fromkeys(
        CAPABILITY_SETS, 0
    )
    assert facts["NoNewPrivs"] == "1"


def test_the_agent_is_in_the_group_of_libvirt_and_no_other(trial: Trial) -> None:
    facts = _status(trial.lab.link.pid_of(agent_program("n1")))
    assert facts["Groups"].split() == [str(grp.getgrnam(LIBVIRT_GROUP).gr_gid)]
    socket = trial.lab.node("n1").libvirt_socket.stat()
    assert stat.S_ISSOCK(socket.st_mode)
    assert stat.S_IMODE(socket.st_mode) == 0o770
    assert (socket.st_uid, socket.st_gid) == (0, grp.getgrnam(LIBVIRT_GROUP).gr_gid)


def test_a_guest_of_the_agent_runs_without_root(trial: Trial) -> None:
    (guest,) = trial.witness.account().running(trial.api.vm("plain").id)
    facts = _status(guest.pid)
    assert set(facts["Uid"].split()) == {str(pwd.getpwnam(QEMU_USER).pw_uid)}
    assert int(facts["CapEff"], 16) == 0


def test_the_agent_cannot_touch_files_of_vms(trial: Trial) -> None:
    anchor = trial.lab.link.pid_of(anchor_program("n1"))
    as_agent = (
        *("nsenter", f"--target={anchor}", "--mount", "--"),
        *unprivileged(AGENT_UID, grp.getgrnam(LIBVIRT_GROUP).gr_gid),
    )
    vm = trial.api.vm("plain")
    files = [
        f"{POOLS['default']}/{vm.id}-data.qcow2",
        f"{POOLS['novacron-console']}/{vm.id}.log",
    ]
    for file in files:
        assert trial.lab.node("n1").inside(file).is_file()
        assert attempt(*as_agent, "cat", file).returncode != 0, f"the agent can read {file}"
        assert attempt(*as_agent, "rm", "-f", file).returncode != 0, f"the agent can remove {file}"
        assert trial.lab.node("n1").inside(file).is_file()


def test_keys_are_their_owners_alone(trial: Trial) -> None:
    node = trial.lab.node("n1")
    keys = {
        node.inside(NODE_CONFIG_DIR) / "agent.key": AGENT_UID,
        trial.lab.replicas[0].directory / "controlplane.key": REPLICA_UID,
        node.directory / "etc-libvirt/pki/server-key.pem": pwd.getpwnam(QEMU_USER).pw_uid,
    }
    for path, uid in keys.items():
        facts = path.stat()
        assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (uid, 0o400), path
    assert node.inside(NODE_STATE_DIR).stat().st_uid == AGENT_UID
    assert os.access(node.inside(NODE_STATE_DIR), os.R_OK)


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
