"""Five nodes, three with etcd and a replica: every playbook, cut-offs, and power that fails."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.version import VERSION
from tests.lab.full_lab import FullLab
from tests.lab.link import wait_until
from tests.lab.site import (
    BOOT,
    REST_LIMIT_S,
    ClientWrites,
    Site,
    guests_of,
    upgrade_and_back,
)
from tests.release.build import build

pytestmark = [pytest.mark.lab, pytest.mark.long]

NODES = 5
CONTROL = 3
# The same code by another name: what playbooks do with it is the same as with another.
NEXT = f"{VERSION}.1"
CUTS = 5
# From before its first task to long after its last.
CUT_S = (3.0, 60.0)
ROTATED = (
    "/etc/novacron/tls/ca.crt",
    "/etc/novacron/tls/controlplane.crt",
    "/etc/novacron/tls/agents-ca.crt",
    "/etc/novacron/etcd/ca.crt",
    "/etc/novacron/etcd/etcd.crt",
    "/var/lib/novacron/agent/tls/agent.pem",
    "/etc/pki/qemu/ca-cert.pem",
    "/etc/pki/qemu/server-cert.pem",
)


@pytest.fixture(scope="module")
def lab() -> Iterator[FullLab]:
    with FullLab(NODES) as built:
        yield built


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    for version in (VERSION, NEXT):
        build(lambda line: None, directory, version)
    return directory


@pytest.fixture(scope="module")
def four(lab: FullLab, dist: Path) -> Site:
    """Return the site before its last node is there."""
    return Site(lab.nodes[:-1], lab.nodes[:CONTROL], dist)


@pytest.fixture(scope="module")
def site(lab: FullLab, dist: Path, four: Site) -> Site:
    """Return the site with all nodes in its inventory, of which the last is not there yet."""
    four.play("site").checked()
    four.until_all_ready()
    return Site(lab.nodes, lab.nodes[:CONTROL], dist)


@pytest.fixture(scope="module")
def running(site: Site) -> Site:
    """Return the site with all its nodes, and VMs on them."""
    site.play("site").checked()
    site.hand_out_artefacts()
    for number in range(1, NODES + 1):
        site.novacron(f"vm create web-{number} {BOOT}")
    return site


def test_a_playbook_that_is_cut_off_is_run_again(four: Site) -> None:
    moments = random.Random(5)
    for _ in range(CUTS):
        cut_s = moments.uniform(*CUT_S)
        status = four.play_for(cut_s, "site").status
        print(f"cut off after {cut_s:.1f} s: {status}")
    began = time.monotonic()
    four.play("site").checked()
    print(f"from there to its end: {time.monotonic() - began:.0f} s")
    four.until_all_ready()
    for options in ((), ("--check", "--diff")):
        again = four.play("site", *options).checked()
        assert again.changed == {node.name: 0 for node in four.nodes}, again.text


def test_a_node_is_added(site: Site) -> None:
    """From the start of the playbook to its first VM, without what a mirror takes."""
    node = site.nodes[-1]
    site.put_artefacts(node)
    began = time.monotonic()
    site.play("add_node", "-e", f"novacron_node={node.name}").checked()
    site.novacron(f"vm create first --node-label name={node.name} {BOOT}")
    print(f"a node is added, and its first VM runs: {time.monotonic() - began:.0f} s")
    assert site.node_of("first").name == node.name
    site.until_all_ready()
    site.novacron("vm rm first --yes")
    again = site.play("add_node", "-e", f"novacron_node={node.name}").checked()
    assert set(again.changed.values()) == {0}, again.text


def test_power_that_fails_and_comes_back_leaves_everything_as_it_is_wanted(
    lab: FullLab, running: Site
) -> None:
    for node in reversed(lab.nodes):
        node.crash(lab.link)
        node.boot(lab.link)
        node.wait_running(lab.link)
        running.until_all_ready()
        wait_until(
            lambda: (
                {vm["status"]["phase"] for vm in running.asked("vm ls")["items"]} == {"Running"}
            ),
            f"all VMs to run after {node.name} was back",
            limit_s=REST_LIMIT_S,
        )
        told = node.run("systemctl --failed --no-legend --plain")
        assert "novacron" not in told, told
        assert "etcd" not in told, told


def test_certificates_and_their_cas_are_replaced_under_guests_and_clients(
    running: Site, tmp_path: Path
) -> None:
    guests = {node.name: guests_of(node) for node in running.nodes}
    before = {path: running.keeper.run(f"cat {path}") for path in ROTATED}
    with ClientWrites(running, "web-1", tmp_path) as writes:
        began = time.monotonic()
        running.play("rotate_certificates").checked()
        print(f"new certificates: {time.monotonic() - began:.0f} s")
    assert writes.count() > 0
    began = time.monotonic()
    running.play("rotate_certificates", "-e", "novacron_rotate_ca=true").checked()
    print(f"new CAs: {time.monotonic() - began:.0f} s")
    after = {path: running.keeper.run(f"cat {path}") for path in ROTATED}
    assert not set(before.values()) & set(after.values())
    running.until_all_ready()
    assert {node.name: guests_of(node) for node in running.nodes} == guests
    running.novacron("vm migrate web-1")
    assert running.play("site").checked().changed == {node.name: 0 for node in running.nodes}


def test_a_member_of_etcd_that_lost_its_disk_is_replaced(running: Site) -> None:
    lost = running.nodes[CONTROL - 1]
    lost.run("systemctl stop etcd && rm -r /var/lib/etcd/novacron")
    running.play("replace_etcd_member", "-e", f"novacron_member={lost.name}").checked()
    members = running.asked("cluster status")["members"]
    assert [member["reachable"] for member in members] == [True] * CONTROL
    assert running.play("site").checked().changed == {node.name: 0 for node in running.nodes}


def test_an_upgrade_and_its_rollback_stop_no_guest_and_fail_no_client(
    running: Site, tmp_path: Path
) -> None:
    upgrade_and_back(running, "web-1", tmp_path, NEXT)


def test_a_node_that_is_revoked_is_told_so_and_comes_back_with_a_token(running: Site) -> None:
    node = running.nodes[-1]
    guests = guests_of(node)
    running.novacron(f"node revoke {node.name} --yes --reason stolen")
    wait_until(
        lambda: running.asked(f"node show {node.name}")["state"] == "silent",
        "the node to be silent",
        limit_s=REST_LIMIT_S,
    )
    told = f"node '{node.name}' was revoked at"
    assert told in node.run("journalctl --no-pager -u novacron-agent")
    leader = running.asked("cluster status")["leader"]["replica"]
    replica = next(each for each in running.nodes if each.name == leader)
    assert told in replica.run("journalctl --no-pager -u novacron-controlplane")
    assert guests_of(node) == guests

    token = running.novacron(f"node join-token --node {node.name} -o name").strip()
    join = "runuser -u novacron-agent -- /opt/novacron/current/agent/bin/novacron-agent join"
    node.run(f"echo {token} | {join} --token-file - --endpoint {running.endpoints[0]}")
    node.run("systemctl reload novacron-agent")
    running.until_all_ready()
    assert guests_of(node) == guests
    assert "failed" not in node.run("/opt/novacron/current/agent/bin/novacron-agent doctor")
    assert "failed" not in running.novacron("doctor")


def test_a_backup_is_made_and_restored_under_guests(running: Site, tmp_path: Path) -> None:
    guests = {node.name: guests_of(node) for node in running.nodes}
    running.play("backup", "-e", f"novacron_backup_dir={tmp_path}").checked()
    (backup,) = tmp_path.iterdir()
    assert backup.stat().st_mode & 0o077 == 0
    epoch = running.asked("cluster status")["epoch"]
    restore = ("-e", f"novacron_backup={backup}", "-e", "novacron_replace=true")
    running.play("restore", *restore).checked()
    wait_until(
        lambda: (
            not (running.asked("cluster status")["restore"] or {"recovering": True})["recovering"]
        ),
        "the recovery to end",
        limit_s=REST_LIMIT_S,
    )
    assert running.asked("cluster status")["epoch"] > epoch
    running.until_all_ready()
    assert {node.name: guests_of(node) for node in running.nodes} == guests


def test_a_node_that_is_removed_leaves_no_vm_behind_and_is_let_in_no_more(running: Site) -> None:
    node = running.nodes[-1]
    running.play("remove_node", "-e", f"novacron_node={node.name}").checked()
    assert node.name not in {each["name"] for each in running.asked("node ls")["items"]}
    vms = running.asked("vm ls")["items"]
    assert {vm["status"]["phase"] for vm in vms} == {"Running"}
    assert node.attempt("systemctl is-active novacron-agent").stdout.strip() == "inactive"
    again = running.play("remove_node", "-e", f"novacron_node={node.name}").checked()
    assert set(again.changed.values()) == {0}, again.text
    running.play("add_node", "-e", f"novacron_node={node.name}").checked()
    running.until_all_ready()
