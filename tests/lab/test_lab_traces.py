"""A lab leaves nothing behind: after its end, after a signal at any step, after being killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.lab import leftovers
from tests.lab.cluster import Lab, LabPlan
from tests.lab.commands import run
from tests.lab.layout import MARK, REPOSITORY, STATE_DIR
from tests.lab.link import wait_until
from tests.lab.processes import find_by_environment, find_by_mount, kill_all, send
from tests.lab.state import SUPERVISOR, read_pids

pytestmark = pytest.mark.lab

NODES_ONLY = LabPlan(nodes=2, replicas=0)
# What `./dev lab up` does, with a line on standard output when the named step begins.
BUILD = """\
import sys
from tests.lab import cluster, network, runtime, signals
from tests.lab.nodes import LightNode

signals.raise_when_asked_to_end()
owner, name = {"claim": (runtime, "prepare"), "bridge": (network, "create_bridge"),
    "boot": (LightNode, "boot"), "wait": (LightNode, "wait_for_libvirtd"),
    "written": (cluster.Lab, "_write_state"), "up": (cluster.Lab, "release")}[sys.argv[1]]
whole = getattr(owner, name)

def announced(*arguments, **named):
    print(name, flush=True)
    return whole(*arguments, **named)

setattr(owner, name, announced)
lab = cluster.Lab(cluster.LabPlan(nodes=2, replicas=0))
try:
    lab.up()
    if sys.argv[1] == "up":
        print("up", flush=True)
    signals.signal.pause()
finally:
    lab.down()
"""


def _traces() -> dict[str, object]:
    """Return what a lab could leave on this machine."""
    return {
        "namespaces": run("ip", "netns", "list"),
        "devices": run("ip", "-brief", "link", "show"),
        "mounts": run("findmnt", "--list", "--noheadings"),
        "directory": STATE_DIR.exists(),
        "processes": find_by_environment(MARK) + find_by_mount(f"{STATE_DIR.name}/nodes/"),
    }


def test_a_lab_leaves_no_trace() -> None:
    before = _traces()
    with Lab(NODES_ONLY):
        during = _traces()
    assert during != before
    assert _traces() == before
    assert leftovers.find() == []


@pytest.mark.parametrize("step", ["claim", "bridge", "boot", "wait", "written", "up"])
def test_an_interrupted_lab_leaves_no_trace(step: str) -> None:
    before = _traces()
    with _builder(step) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        builder.send_signal(signal.SIGINT)
        assert builder.wait() != 0
    assert _traces() == before


def test_a_killed_builder_takes_its_lab_along() -> None:
    before = _traces()
    with _builder("up") as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        builder.kill()
        builder.wait()
    wait_until(lambda: _traces() == before, "the supervisor to remove the lab")


def test_down_removes_a_lab_whose_supervisor_was_killed() -> None:
    before = _traces()
    assert _dev_lab("up", "--nodes=1", "--replicas=0").returncode == 0
    supervisor = next(p for p in read_pids() if p.name == SUPERVISOR)
    send(supervisor.key, signal.SIGKILL)
    refused = _dev_lab("up", "--nodes=1", "--replicas=0")
    assert refused.returncode == 1
    assert "./dev lab down" in refused.stderr
    assert _dev_lab("down").returncode == 0
    assert _traces() == before


def test_a_lab_that_died_whole_does_not_stand_in_the_way_of_the_next() -> None:
    before = _traces()
    assert _dev_lab("up", "--nodes=1", "--replicas=0").returncode == 0
    _kill_all_at_once()
    assert leftovers.find() != []
    built = _dev_lab("up", "--nodes=1", "--replicas=0")
    assert built.returncode == 0, built.stderr
    assert f"directory {STATE_DIR}" in built.stderr
    assert _dev_lab("down").returncode == 0
    assert _traces() == before


def _kill_all_at_once() -> None:
    """End a lab like a power cut: nothing of it lives to clear up."""
    living = leftovers.processes()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for key in living:
            send(key, number)
    kill_all(leftovers.processes)


def _builder(step: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, step],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _dev_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.lab", "lab", *arguments],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
