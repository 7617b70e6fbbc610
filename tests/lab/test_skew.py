"""The release before and this one beside each other on real nodes, both ways, and back.

Each test is one cell's upgrade, told in order. A witness outside the product watches every QEMU: no
guest may notice any of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from controlplane.cli.client import path_of
from controlplane.cli.errors import ApiProblem
from controlplane.cli.views import ClusterView, OperationView, ProblemView, VmView
from shared.model import SCHEMA_LEVEL
from shared.units import MIB
from shared.version import VERSION
from tests import previous_release
from tests.lab.cluster import Lab, LabPlan
from tests.lab.runtime import Release
from tests.lab.story import NewVm
from tests.lab.trial import Trial, new_vm
from tests.lab.witness import Witness, counts_up

pytestmark = pytest.mark.lab

CLUSTER = path_of("cluster")
FINALIZE = path_of("cluster", "actions", "finalize-upgrade")


@contextmanager
def trial_of(plan: LabPlan, directory: Path) -> Iterator[Trial]:
    with Lab(plan) as lab, Witness(directory / "looks") as watching:
        trial = Trial(lab, watching)
        with closing(trial.api):
            yield trial


def test_agents_of_the_release_before_serve_until_they_are_replaced(tmp_path: Path) -> None:
    plan = LabPlan(nodes=3, previous=frozenset({"n1", "n2"}))
    with trial_of(plan, tmp_path) as trial:
        old = previous_release.VERSION
        assert _agents(trial) == {"n1": old, "n2": old, "n3": VERSION}
        placed = (("a", "first"), ("b", "second"), ("c", "third"), ("a", "resting"))
        for zone, name in placed:
            _create(trial, name, zone=zone)
            # From here on it may run anywhere.
            labels = {"placement": {"node_labels": {"zone": None}}}
            trial.api.client.patch(path_of("vms", name), {"spec": labels})
        _live_a_life(trial, "passing", zone="a")
        _done(trial, trial.api.act("resting", "stop"))

        _refuses_to_move(trial, "first", {"the VM's own node cannot migrate: old agent"})
        _refuses_to_move(trial, "third", {"the node cannot migrate: old agent"})
        _drain_says_why(trial, "n1", {"first": "old agent", "resting": "older release"})

        before, since = _running(trial), trial.witness.now()
        for name in ("n1", "n2"):
            trial.lab.replace_agent(name, Release.PRESENT)
            trial.eventually(
                lambda: _agents(trial),
                lambda found, name=name: found[name] == VERSION,  # type: ignore[misc]
                f"an agent of {VERSION} on {name}",
            )
            trial.settle()
        _ran_on(trial, before, since)
        # What the release before has used up is known to the agent that follows on its state.
        _done(trial, trial.api.act("resting", "start"))
        assert trial.api.vm("resting").status.generation == 2
        _live_a_life(trial, "later", zone="a")
        _moves(trial, "first")
        _done(trial, trial.api.drain("n1"))
        _deletes_all(trial)


@pytest.mark.long
def test_the_release_before_leads_agents_of_this_one_and_is_replaced(tmp_path: Path) -> None:
    plan = LabPlan(nodes=2, previous=frozenset({"r1"}))
    with trial_of(plan, tmp_path) as trial:
        assert _cluster(trial).version == previous_release.VERSION
        for zone, name in (("a", "first"), ("b", "second")):
            _create(trial, name, zone="" if name == "first" else zone)
        _live_a_life(trial, "passing", zone="b")

        before, since = _running(trial), trial.witness.now()
        trial.lab.replace_replica("r1", Release.PRESENT)
        trial.settle()
        seen = _cluster(trial)
        assert (seen.version, seen.schema_level) == (VERSION, 1)
        assert (seen.upgrade_pending, seen.upgrade_blockers) == (True, ())
        _waits_for_the_end(trial)
        _live_a_life(trial, "between", zone="b")

        # What this release wrote at level 1 is read by the one before, which may be put back.
        trial.lab.replace_replica("r1", Release.PREVIOUS)
        trial.settle()
        assert _cluster(trial).version == previous_release.VERSION
        _ran_on(trial, before, since)
        _live_a_life(trial, "back", zone="b")

        trial.lab.replace_replica("r1", Release.PRESENT)
        trial.settle()
        finalized = trial.api.client.post(FINALIZE).decode(ClusterView)
        assert (finalized.schema_level, finalized.upgrade_pending) == (SCHEMA_LEVEL, False)
        _ran_on(trial, before, since)
        _moves(trial, "first")
        _deletes_all(trial)


def _cluster(trial: Trial) -> ClusterView:
    return trial.api.client.get_as(ClusterView, CLUSTER)


def _agents(trial: Trial) -> dict[str, str]:
    """Return each node's agent's version."""
    return {
        node.name: node.inventory.versions["agent"]
        for node in trial.api.nodes()
        if node.inventory is not None
    }


def _done(trial: Trial, operation: OperationView) -> None:
    ended = trial.api.wait(operation)
    assert (ended.state, ended.error) == ("succeeded", None)


def _create(trial: Trial, name: str, *, zone: str) -> None:
    _done(trial, _post(trial, new_vm(name, zone=zone)))


def _post(trial: Trial, body: NewVm) -> OperationView:
    """Create a VM in words that the release before knows, too."""
    words = msgspec.to_builtins(body)
    del words["spec"]["migration"]
    return trial.api.client.post(path_of("vms"), words).decode(OperationView)


def _live_a_life(trial: Trial, name: str, *, zone: str) -> None:
    """Create a VM, stop, start and delete it."""
    _done(trial, _post(trial, new_vm(name, zone=zone, disk=True)))
    trial.wait_counting([trial.api.vm(name)])
    _done(trial, trial.api.act(name, "stop"))
    assert trial.api.vm(name).status.phase == "Stopped"
    _done(trial, trial.api.act(name, "start"))
    vm = trial.api.vm(name)
    assert (vm.status.phase, vm.status.generation) == ("Running", 2)
    _done(trial, trial.api.delete_vm(name))
    trial.settle()
    seen = trial.witness.account()
    assert seen.running(vm.id) == []
    assert len(seen.guests(vm.id)) == 2


def _deletes_all(trial: Trial) -> None:
    """Delete every VM, and hold that nothing of any is left on any node."""
    for name in trial.vms():
        _done(trial, trial.api.delete_vm(name))
    trial.settle()


def _running(trial: Trial) -> dict[str, VmView]:
    found = {name: vm for name, vm in trial.vms().items() if vm.status.phase == "Running"}
    trial.wait_counting(found.values())
    return found


def _ran_on(trial: Trial, before: dict[str, VmView], since: float) -> None:
    """Hold that the guests of before have noticed nothing."""
    now = trial.vms()
    trial.wait_counting([now[name] for name in before])
    until = trial.witness.now()
    seen = trial.witness.account()
    for name, vm in before.items():
        assert now[name].status.generation == vm.status.generation
        assert seen.same_process(vm.id, since, until), f"{name} did not run through"
        (boot,) = trial.counts(vm)
        assert counts_up(boot)
    assert seen.doubles(trial.ever_created()) == []


def _moves(trial: Trial, name: str) -> None:
    """Move a guest live: it counts on without booting, and runs once only."""
    before, counted = trial.api.vm(name), _counts(trial, name)[-1]
    _done(trial, trial.api.act(name, "migrate"))
    now = trial.api.vm(name)
    assert now.status.node != before.status.node
    trial.eventually(
        lambda: _counts(trial, name), lambda counts: counts[-1] > counted, f"{name} to count on"
    )
    seen = trial.witness.account()
    assert len(seen.guests(now.id)) == 2
    assert len(seen.running(now.id)) == 1


def _counts(trial: Trial, name: str) -> list[int]:
    """Return what a guest that has booted once has counted, whatever nodes it has run on."""
    query = (("offset", 0), ("limit", MIB))
    log = trial.api.client.get(path_of("vms", name, "console-log"), query).body
    assert len(re.findall(rb"^boot ", log, re.MULTILINE)) == 1
    return [int(number) for number in re.findall(rb"^count (\d+)\r?$", log, re.MULTILINE)]


def _refuses_to_move(trial: Trial, name: str, reasons: set[str]) -> None:
    ended = trial.api.wait(trial.api.act(name, "migrate"))
    assert ended.error is not None
    assert ended.error.code == "unschedulable"
    told = {error.message for error in ended.error.errors if error.code == "cannot_migrate"}
    assert told == reasons
    assert trial.api.vm(name).status.phase == "Running"


def _drain_says_why(trial: Trial, node: str, reasons: dict[str, str]) -> None:
    planned = {vm.vm_name: vm for vm in trial.api.plan_drain(node).vms}
    assert planned.keys() == reasons.keys()
    assert all(vm.reasons for vm in planned.values())
    ended = trial.api.wait(trial.api.drain(node))
    assert ended.error is not None
    assert ended.error.code == "drain_incomplete"
    told = {error.pointer.removeprefix("/vms/"): error.message for error in ended.error.errors}
    assert told.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in told[name]
    trial.api.uncordon(node)


def _waits_for_the_end(trial: Trial) -> None:
    """Hold that what the release before would lose is refused, with what to do."""
    for ask in (
        lambda: trial.api.act("first", "migrate"),
        lambda: trial.api.drain("n1"),
        lambda: trial.api.client.patch(
            path_of("vms", "first"), {"spec": {"migration": {"strict": True}}}
        ),
    ):
        with pytest.raises(ApiProblem) as refused:
            ask()
        problem: ProblemView = refused.value.problem
        assert (problem.status, problem.code) == (409, "upgrade_unfinished")
        assert "novacron cluster finalize-upgrade" in problem.detail
