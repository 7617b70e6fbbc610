"""The demo as a newcomer runs it: it ends well, tells what it should, and leaves nothing behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.cli.client import BASE
from tests.lab import leftovers, story
from tests.lab.layout import REPOSITORY, STATE_DIR
from tests.lab.link import wait_until
from tests.lab.story import VMS

pytestmark = pytest.mark.lab

# Packages and the guest image are there already; guests under emulation boot in seconds.
DEMO_LIMIT_S = 240.0
COMMAND = (sys.executable, "-m", "tests.lab", "demo")


def test_the_demo_tells_its_story_and_leaves_nothing() -> None:
    done = subprocess.run(
        (*COMMAND, "--once"),
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=DEMO_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert leftovers.find() == []
    told = done.stdout
    for name in ("n1", "n2", "n3"):
        assert re.search(rf"^{name} +10\.88\.0\.\d+ +ready: ", told, re.MULTILINE)
    for vm in VMS:
        assert re.search(rf"^{vm.name} +runs on n[123] after [\d.]+ s; n[123] ", told, re.MULTILINE)
    # Anti-affinity is kept, and the impossible is refused with each node's reason.
    where = dict(re.findall(r"^(web-\d) +runs on (n[123])", told, re.MULTILINE))
    assert len(set(where.values())) == 3
    assert re.search(rf"^{story.GIANT.name} +asked for .*: Pending, ", told, re.MULTILINE)
    for action in ("stop: Stopped", "start: Running", "pause: Paused", "delete: done"):
        assert re.search(rf"^\S+ +{action} after [\d.]+ s", told, re.MULTILINE), action
    _check_paused_counter(told)
    for name in (story.BUSINESS, story.STORE):
        assert re.search(rf"^{name} +n\d -> n\d after [\d.]+ s, \d+ ms of it without", told, re.M)
    moved = re.findall(r"its guest counted on from (\d+) to (\d+), every number once", told)
    assert len(moved) == 2
    assert all(int(before) < int(last) for before, last in moved)
    assert re.search(r"^web-\d +BLOCKED: n\d: .*web.*; n\d: ", told, re.MULTILINE)
    assert re.search(r"^n\d +drained: empty and cordoned after [\d.]+ s", told, re.MULTILINE)
    assert re.search(r"^create +6 time\(s\): median [\d.]+ s", told, re.MULTILINE)
    assert "nothing is left" in done.stderr


@pytest.mark.long
def test_ctrl_c_ends_a_demo_that_stays_up(tmp_path: Path) -> None:
    out = tmp_path / "told"
    with (
        out.open("w") as told,
        subprocess.Popen(COMMAND, cwd=REPOSITORY, stdout=told, stderr=subprocess.DEVNULL) as demo,
    ):
        try:
            wait_until(
                lambda: "stays up until Ctrl-C" in out.read_text(),
                "the end of the story",
                limit_s=DEMO_LIMIT_S,
                alive=lambda: demo.poll() is None,
            )
            address = re.search(r"Yours now: (https://\S+) \(CA (\S+), token", out.read_text())
            assert address is not None
            assert Path(address.group(2)).is_file()
            assert BASE not in address.group(1)
        finally:
            demo.send_signal(signal.SIGINT)
            code = demo.wait(DEMO_LIMIT_S)
    assert code == 0
    assert not STATE_DIR.exists()
    assert leftovers.find() == []


def _check_paused_counter(told: str) -> None:
    """Hold that a paused guest stood still while nobody touched the others."""
    paused = re.search(r"counter while paused: (\d+), then (\d+)", told)
    assert paused is not None
    assert paused.group(1) == paused.group(2)
    untouched = re.search(r"nobody touched, counted on from (\d+) to (\d+)", told)
    assert untouched is not None
    assert int(untouched.group(2)) > int(untouched.group(1))
