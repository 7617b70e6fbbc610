"""From bare machines to a cluster with one playbook; the second time nothing changes.

What is installed is then used as it will be: units that are confined, guests that move, services
that die.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.ansible import Site
from tests.lab.full_lab import FullLab
from tests.lab.full_node import FullNode
from tests.lab.guest_image import INITRD_NAME, KERNEL_NAME, ensure_guest_artefacts
from tests.lab.link import wait_until
from tests.release.build import build

pytestmark = pytest.mark.lab

NODES = 3
SETTINGS: dict[str, object] = {
    # Machines in containers: their cgroups are read-only, and there is no AppArmor.
    "agent_qemu_settings": {
        "cgroup_controllers": [],
        "security_driver": "none",
        "namespaces": [],
        "stdio_handler": "file",
    },
    "agent_cpus": 4,
    "agent_memory_mib": 2048,
}
# What an operator types on the first machine.
NOVACRON = (
    "NOVACRON_ENDPOINT=https://n1:8443,https://n2:8443,https://n3:8443 "
    "NOVACRON_CA=/etc/novacron/pki/ca.crt NOVACRON_TOKEN=$(cat /etc/novacron/pki/admin.token) "
    "/opt/novacron/current/controlplane/bin/novacron "
)
EXPOSURE_MAX = {"novacron-agent": 2.0, "novacron-controlplane": 1.5, "etcd": 2.0}
WATCHDOG_S = 5
# Far longer than anything here takes on a busy machine.
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def lab() -> Iterator[FullLab]:
    with FullLab(NODES) as built:
        yield built


@pytest.fixture(scope="module")
def site(lab: FullLab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    dist = tmp_path_factory.mktemp("dist")
    build(lambda line: None, dist)
    return Site(lab.nodes, lab.nodes, dist, SETTINGS)


def novacron(lab: FullLab, words: str) -> str:
    return lab.node("n1").run(NOVACRON + words, limit_s=LIMIT_S)


def test_check_mode_before_the_first_run_changes_nothing_and_does_not_fail(
    lab: FullLab, site: Site
) -> None:
    site.play("site", "--check", "--diff").checked()
    for node in lab.nodes:
        assert node.run("ls /opt; ls -d /etc/novacron || true") == ""


def test_one_playbook_makes_a_cluster(lab: FullLab, site: Site) -> None:
    outcome = site.play("site").checked()
    assert "PRIVATE KEY" not in outcome.text
    assert lab.node("n1").run("cat /etc/novacron/pki/admin.token").strip() not in outcome.text
    wait_until(lambda: _ready_nodes(lab) == NODES, "all nodes to be ready", limit_s=LIMIT_S)
    cluster = json.loads(novacron(lab, "cluster status -o json"))
    assert len(cluster["replicas"]) == NODES
    assert [member["reachable"] for member in cluster["members"]] == [True] * NODES


def test_the_second_run_changes_nothing(site: Site) -> None:
    outcome = site.play("site", "--diff").checked()
    assert outcome.changed == {"n1": 0, "n2": 0, "n3": 0}, outcome.text
    checked = site.play("site", "--check", "--diff").checked()
    assert checked.changed == {"n1": 0, "n2": 0, "n3": 0}, checked.text


@pytest.mark.usefixtures("site")
def test_units_are_valid_and_confined_while_they_work(lab: FullLab) -> None:
    node = lab.node("n1")
    units = [f"/etc/systemd/system/{name}.service" for name in EXPOSURE_MAX if name != "etcd"]
    assert node.attempt(f"systemd-analyze verify {' '.join(units)}").stderr == ""
    for unit, most in EXPOSURE_MAX.items():
        assert node.run(f"systemctl is-active {unit}").strip() == "active"
        told = node.run(f"systemd-analyze security --no-pager {unit}")
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
        assert found is not None
        assert float(found[1]) <= most, told


@pytest.mark.usefixtures("site")
def test_a_guest_outlives_whatever_happens_to_the_agent(lab: FullLab) -> None:
    _hand_out_artefacts(lab)
    novacron(lab, f"vm create web-1 --vcpus 1 --memory 192MiB {_BOOT}")
    node = _node_of(lab, "web-1")
    guest = _guest(node)
    agent = _main_pid(node, "novacron-agent")

    node.run("systemctl restart novacron-agent")
    assert _guest(node) == guest
    restarted = _main_pid(node, "novacron-agent")
    assert restarted != agent
    node.run(f"kill -9 {restarted}")
    wait_until(
        lambda: _main_pid(node, "novacron-agent") not in ("0", restarted),
        "systemd to start the agent again",
        limit_s=LIMIT_S,
    )
    wait_until(lambda: _ready_nodes(lab) == NODES, "its node to be ready", limit_s=LIMIT_S)
    assert _guest(node) == guest


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("unit", ["novacron-agent", "novacron-controlplane"])
def test_one_that_stands_still_is_started_anew(lab: FullLab, unit: str) -> None:
    node = lab.node("n2")
    node.run(
        f"mkdir -p /run/systemd/system/{unit}.service.d && printf '[Service]\\nWatchdogSec="
        f"{WATCHDOG_S}s\\n' >/run/systemd/system/{unit}.service.d/test.conf && "
        f"systemctl daemon-reload && systemctl restart {unit}"
    )
    stopped = _main_pid(node, unit)
    node.run(f"kill -STOP {stopped}")
    wait_until(
        lambda: _main_pid(node, unit) not in ("0", stopped),
        "the watchdog to notice",
        limit_s=LIMIT_S,
    )
    assert "watchdog" in node.run(f"journalctl --no-pager -u {unit}").lower()
    node.run(f"rm -r /run/systemd/system/{unit}.service.d && systemctl daemon-reload")
    wait_until(lambda: _ready_nodes(lab) == NODES, "all nodes to be ready", limit_s=LIMIT_S)


@pytest.mark.usefixtures("site")
def test_a_leader_that_is_stopped_hands_over(lab: FullLab) -> None:
    before = json.loads(novacron(lab, "cluster status -o json"))["leader"]
    node = lab.node(before["replica"])
    node.run("systemctl stop novacron-controlplane")
    after = json.loads(novacron(lab, "cluster status -o json"))["leader"]
    assert after["replica"] != before["replica"]
    told = node.run(
        "journalctl --no-pager -u novacron-controlplane NOVACRON_LOGGER=controlplane.election"
    )
    assert "resigned the term" in told
    node.run("systemctl start novacron-controlplane")


@pytest.mark.usefixtures("site")
def test_a_guest_moves_between_machines(lab: FullLab) -> None:
    novacron(lab, f"vm create db-1 --vcpus 1 --memory 192MiB --disk root=1 {_BOOT}")
    source = _node_of(lab, "db-1")
    novacron(lab, "vm migrate db-1")
    destination = _node_of(lab, "db-1")
    assert destination.name != source.name
    # Nobody but nodes of the cell reaches what guests move through.
    assert "8445" in destination.run("nft list table inet novacron")
    domain = json.loads(novacron(lab, "vm show db-1 -o json"))["id"]
    assert domain in destination.run("virsh -q list --name")
    assert domain not in source.run("virsh -q list --all --name")


_BOOT = f"--kernel {KERNEL_NAME} --initrd {INITRD_NAME}"


def _ready_nodes(lab: FullLab) -> int:
    listed = lab.node("n1").attempt(NOVACRON + "cluster status -o json")
    if listed.returncode:
        return 0
    ready: int = json.loads(listed.stdout)["nodes"]["ready"]
    return ready


def _hand_out_artefacts(lab: FullLab) -> None:
    """Put the tiny guest where an operator would; agents notice within a minute, or at a start."""
    artefacts = ensure_guest_artefacts()
    for node in lab.nodes:
        for name in (KERNEL_NAME, INITRD_NAME):
            node.copy(artefacts / name, Path("/var/lib/novacron/artefacts") / name)
        node.run("systemctl restart novacron-agent")
    wait_until(lambda: _ready_nodes(lab) == NODES, "all nodes to be ready", limit_s=LIMIT_S)


def _node_of(lab: FullLab, vm: str) -> FullNode:
    node_id = json.loads(novacron(lab, f"vm show {vm} -o json"))["status"]["node"]
    return lab.node(json.loads(novacron(lab, f"node show {node_id} -o json"))["name"])


def _guest(node: FullNode) -> str:
    """Return the process that runs the node's one guest, and since when."""
    return node.run("ps -C qemu-system-x86_64 -o pid=,lstart=").strip()


def _main_pid(node: FullNode, unit: str) -> str:
    return node.run(f"systemctl show --property=MainPID --value {unit}").strip()
