"""Five nodes, three with etcd and a replica: playbooks that are cut off, power that fails."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tests.lab.full_lab import FullLab
from tests.lab.link import wait_until
from tests.lab.site import BOOT, REST_LIMIT_S, Site
from tests.release.build import build

pytestmark = [pytest.mark.lab, pytest.mark.long]

NODES = 5
CONTROL = 3
CUTS = 5
# From before its first task to long after its last.
CUT_S = (3.0, 60.0)


@pytest.fixture(scope="module")
def lab() -> Iterator[FullLab]:
    with FullLab(NODES) as built:
        yield built


@pytest.fixture(scope="module")
def site(lab: FullLab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    dist = tmp_path_factory.mktemp("dist")
    build(lambda line: None, dist)
    return Site(lab.nodes, lab.nodes[:CONTROL], dist)


def test_a_playbook_that_is_cut_off_is_run_again(site: Site) -> None:
    moments = random.Random(5)
    for _ in range(CUTS):
        cut_s = moments.uniform(*CUT_S)
        status = site.play_for(cut_s, "site").status
        print(f"cut off after {cut_s:.1f} s: {status}")
    began = time.monotonic()
    site.play("site").checked()
    print(f"from there to its end: {time.monotonic() - began:.0f} s")
    site.until_all_ready()
    for options in ((), ("--check", "--diff")):
        again = site.play("site", *options).checked()
        assert again.changed == {node.name: 0 for node in site.nodes}, again.text


def test_power_that_fails_and_comes_back_leaves_everything_as_it_is_wanted(
    lab: FullLab, site: Site
) -> None:
    site.hand_out_artefacts()
    for number in range(1, NODES + 1):
        site.novacron(f"vm create web-{number} {BOOT}")
    for node in reversed(lab.nodes):
        node.crash(lab.link)
        node.boot(lab.link)
        node.wait_running(lab.link)
        site.until_all_ready()
        wait_until(
            lambda: {vm["status"]["phase"] for vm in site.asked("vm ls")["items"]} == {"Running"},
            f"all VMs to run after {node.name} was back",
            limit_s=REST_LIMIT_S,
        )
        told = node.run("systemctl --failed --no-legend --plain")
        assert "novacron" not in told, told
        assert "etcd" not in told, told
