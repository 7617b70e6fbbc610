"""From bare machines to a cluster with one playbook; the second time nothing changes.

What is installed is then used as it will be: units that are confined, guests that move, services
that die.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.version import VERSION
from tests.lab.full_lab import FullLab
from tests.lab.full_node import FullNode
from tests.lab.link import wait_until
from tests.lab.site import BOOT, REST_LIMIT_S, Site, guests_of, upgrade_and_back
from tests.release.build import build

pytestmark = pytest.mark.lab

NODES = 3
EXPOSURE_MAX = {"novacron-agent": 2.0, "novacron-controlplane": 1.5, "etcd": 2.0}
WATCHDOG_S = 5
# The same code by another name: what playbooks do with it is the same as with another.
NEXT = f"{VERSION}.1"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    dist = tmp_path_factory.mktemp("dist")
    for version in (VERSION, NEXT):
        build(lambda line: None, dist, version)
    with FullLab(NODES) as lab:
        yield Site(lab.nodes, lab.nodes, dist)


def test_check_mode_before_the_first_run_changes_nothing_and_does_not_fail(site: Site) -> None:
    site.play("site", "--check", "--diff").checked()
    for node in site.nodes:
        assert node.run("ls /opt; ls -d /etc/novacron || true") == ""


def test_one_playbook_makes_a_cluster(site: Site) -> None:
    outcome = site.play("site").checked()
    assert "PRIVATE KEY" not in outcome.text
    assert site.nodes[0].run("cat /etc/novacron/pki/admin.token").strip() not in outcome.text
    site.until_all_ready()
    cluster = site.asked("cluster status")
    assert len(cluster["replicas"]) == NODES
    assert [member["reachable"] for member in cluster["members"]] == [True] * NODES


def test_the_second_run_changes_nothing(site: Site) -> None:
    nobody = {node.name: 0 for node in site.nodes}
    outcome = site.play("site", "--diff").checked()
    assert outcome.changed == nobody, outcome.text


def test_units_are_valid_and_confined_while_they_work(site: Site) -> None:
    node = site.nodes[0]
    units = [f"/etc/systemd/system/{name}.service" for name in EXPOSURE_MAX if name != "etcd"]
    assert node.attempt(f"systemd-analyze verify {' '.join(units)}").stderr == ""
    for unit, most in EXPOSURE_MAX.items():
        assert node.run(f"systemctl is-active {unit}").strip() == "active"
        told = node.run(f"systemd-analyze security --no-pager {unit}")
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
        assert found is not None
        assert float(found[1]) <= most, told


def test_an_agent_renews_what_vouches_for_its_node_confined_as_it_is(site: Site) -> None:
    node = site.nodes[1]
    files = ("/var/lib/novacron/agent/tls/agent.pem", "/etc/pki/qemu/server-cert.pem")
    before = {file: node.run(f"cat {file}") for file in files}
    node.run("systemctl reload novacron-agent")
    wait_until(
        lambda: all(node.run(f"cat {file}") != before[file] for file in files),
        "new certificates",
        limit_s=REST_LIMIT_S,
    )
    site.until_all_ready()


def test_a_guest_outlives_whatever_happens_to_the_agent(site: Site) -> None:
    site.hand_out_artefacts()
    site.novacron(f"vm create web-1 {BOOT}")
    node = site.node_of("web-1")
    guest = guests_of(node)
    agent = _main_pid(node, "novacron-agent")

    node.run("systemctl restart novacron-agent")
    assert guests_of(node) == guest
    restarted = _main_pid(node, "novacron-agent")
    assert restarted != agent
    node.run(f"kill -9 {restarted}")
    wait_until(
        lambda: _main_pid(node, "novacron-agent") not in ("0", restarted),
        "systemd to start the agent again",
        limit_s=REST_LIMIT_S,
    )
    site.until_all_ready()
    assert guests_of(node) == guest


@pytest.mark.parametrize("unit", ["novacron-agent", "novacron-controlplane"])
def test_one_that_stands_still_is_started_anew(site: Site, unit: str) -> None:
    node = site.nodes[1]
    place = f"/run/systemd/system/{unit}.service.d"
    node.run(
        f"mkdir -p {place} && printf '[Service]\\nWatchdogSec={WATCHDOG_S}s\\n' >{place}/test.conf"
        f" && systemctl daemon-reload && systemctl restart {unit}"
    )
    stopped = _main_pid(node, unit)
    node.run(f"kill -STOP {stopped}")
    wait_until(
        lambda: _main_pid(node, unit) not in ("0", stopped),
        "the watchdog to notice",
        limit_s=REST_LIMIT_S,
    )
    assert "watchdog" in node.run(f"journalctl --no-pager -u {unit}").lower()
    node.run(f"rm -r {place} && systemctl daemon-reload")
    site.until_all_ready()


def test_a_leader_that_is_stopped_hands_over(site: Site) -> None:
    before = site.asked("cluster status")["leader"]
    node = next(node for node in site.nodes if node.name == before["replica"])
    node.run("systemctl stop novacron-controlplane")
    after = site.asked("cluster status")["leader"]
    assert after["replica"] != before["replica"]
    told = "-u novacron-controlplane NOVACRON_LOGGER=controlplane.election"
    assert "resigned the term" in node.run(f"journalctl --no-pager {told}")
    node.run("systemctl start novacron-controlplane")


def test_a_guest_moves_between_machines(site: Site) -> None:
    site.novacron(f"vm create db-1 --disk root=1 {BOOT}")
    source = site.node_of("db-1")
    site.novacron("vm migrate db-1")
    destination = site.node_of("db-1")
    assert destination.name != source.name
    # Nobody but nodes of the cell reaches what guests move through.
    assert "8445" in destination.run("nft list table inet novacron")
    domain = site.asked("vm show db-1")["id"]
    assert domain in destination.run("virsh -q list --name")
    assert domain not in source.run("virsh -q list --all --name")


def test_an_upgrade_stops_no_guest_and_fails_no_client(site: Site, tmp_path: Path) -> None:
    upgrade_and_back(site, "web-1", tmp_path, NEXT)


def _main_pid(node: FullNode, unit: str) -> str:
    return node.run(f"systemctl show --property=MainPID --value {unit}").strip()
