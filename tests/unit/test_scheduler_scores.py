"""How well nodes fit: each score by itself, and what a plan tells of them."""

from __future__ import annotations

import msgspec
import pytest

from controlplane.scheduler import scores
from controlplane.scheduler.filters import context_of
from controlplane.scheduler.place import Plan, plan
from controlplane.scheduler.request import SchedulerSettings, request_of
from controlplane.scheduler.scores import SCORES, Measure
from controlplane.scheduler.snapshot import build_snapshot
from shared.model import Vm
from tests.unit.cluster_text import make_node, make_vm

SETTINGS = SchedulerSettings(cpu_overcommit=1.0, memory_reserve_mib=0)
# 256 MiB and one vCPU need 309 MiB: a tenth of 3090.
NODE = make_node("n1", cpus="10", memory="3090", pools="default:100:80,fast:10:10")
SMALL = {"vcpus": "1", "memory": "256"}


def measure(function: Measure, wanted: dict[str, str], *others: Vm) -> float:
    snapshot = build_snapshot([NODE], others, SETTINGS)
    request = request_of(make_vm("a", **(SMALL | wanted)))
    return function(request, snapshot.nodes[NODE.id], context_of(snapshot, request))


def test_spread_is_what_stays_free_of_the_scarcer_resource() -> None:
    assert measure(scores.spread, {}) == pytest.approx(0.9)
    assert measure(scores.spread, {"vcpus": "5"}) == pytest.approx(0.5)


def test_evenness_falls_as_cpu_and_memory_part() -> None:
    assert measure(scores.evenness, {}) == pytest.approx(1.0)
    lopsided = measure(scores.evenness, {"vcpus": "10"})
    assert lopsided == pytest.approx(1 - (1.0 - (256 + 48 + 40 + 1) / 3090))


def test_groups_follow_soft_rules_only() -> None:
    here = make_vm("b", on="n1", apart="web", **{"with": "db"}, **SMALL)
    assert measure(scores.groups, {"with": "db"}) == 0.0
    assert measure(scores.groups, {"with": "db"}, here) == 1.0
    assert measure(scores.groups, {"apart": "web"}) == 1.0
    assert measure(scores.groups, {"apart": "web"}, here) == 0.5
    assert measure(scores.groups, {"with": "db", "apart": "web"}, here) == 0.75


def test_pool_room_is_that_of_the_fullest_pool() -> None:
    assert measure(scores.pool_room, {"disks": "default:30"}) == pytest.approx(0.5)
    assert measure(scores.pool_room, {"disks": "default:30,fast:9"}) == pytest.approx(0.1)


def test_the_plan_explains_its_scores() -> None:
    request = request_of(make_vm("a", disks="default:10", apart="web", **SMALL))
    result = plan(build_snapshot([NODE], [], SETTINGS), request)
    (candidate,) = result.candidates
    assert [term.name for term in candidate.scores] == [score.name for score in SCORES]
    assert all(0.0 <= term.value <= 1.0 and term.meaning for term in candidate.scores)
    total = sum(term.value * term.weight for term in candidate.scores)
    assert candidate.score == pytest.approx(total / sum(t.weight for t in candidate.scores))
    assert result.summary() == "node n1 is the best of 1 that fit"


def test_scores_that_do_not_concern_a_request_do_not_dilute_it() -> None:
    (candidate,) = plan(
        build_snapshot([NODE], [], SETTINGS), request_of(make_vm("a", **SMALL))
    ).candidates
    assert [term.name for term in candidate.scores] == ["spread", "evenness"]


def test_a_refusal_is_summed_up_and_survives_json() -> None:
    small = make_node("n2", cpus="1", memory="128", state="silent")
    result = plan(
        build_snapshot([small, make_node("n3", cpus="1", memory="128")], [], SETTINGS),
        request_of(make_vm("a", **SMALL)),
    )
    assert result.summary() == ("none of 2 nodes fits: insufficient_memory on 2, node_silent on 1")
    assert msgspec.json.decode(msgspec.json.encode(result), type=Plan) == result
    nothing = plan(build_snapshot([], [], SETTINGS), request_of(make_vm("a", **SMALL)))
    assert (nothing.node, nothing.summary()) == (None, "there is no node")
