"""Whole clusters through crashes of every part; and bugs planted in them, which must be found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.sim.cli import coverage_table, main
from tests.sim.faults.injector import Pair
from tests.sim.faults.kinds import FAULTS
from tests.sim.planted import PLANTED, PlantedBug
from tests.sim.simulation import SimulationSettings, simulate
from tests.sim.upgrade import EVERY

ROOT = Path(__file__).parents[2]
# Some 0.8 s each; in parts, so that a failure comes early and a shard takes some of them.
PARTS = 10
SEEDS_PER_PART = 10
# A planted bug is searched for in so many seeds, from one that is known to be near.
SEARCH_MAX = 1000
# Many faults in a short time, so that every kind comes within a few seeds.
BUSY = SimulationSettings(faults=60, duration_s=200.0)
BUSY_SEEDS = range(100, 107)


@pytest.mark.parametrize("part", range(PARTS))
def test_seeds_hold(part: int) -> None:
    assert main(["--start", str(part * SEEDS_PER_PART), "--seeds", str(SEEDS_PER_PART)]) == 0


def test_the_same_seed_is_the_same_history() -> None:
    first, second = simulate(11), simulate(11)
    assert first.digest == second.digest
    assert first.trace_lines > 100
    assert simulate(12).digest != first.digest


def test_the_history_does_not_depend_on_the_process() -> None:
    """Neither the hash of strings nor the addresses of objects may decide anything."""
    seeds = (3, EVERY - 1)
    script = (
        "from tests.sim.simulation import simulate; "
        f"print([simulate(seed).digest for seed in {seeds}])"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_every_kind_of_fault_meets_operations() -> None:
    coverage: Counter[Pair] = Counter()
    for seed in BUSY_SEEDS:
        outcome = simulate(seed, BUSY)
        assert not outcome.violated, f"seed {seed}: {outcome.complaint}"
        coverage.update(outcome.coverage)
    met = {fault for fault, phase in coverage if phase != "at rest"}
    assert met == {fault.__name__ for fault in FAULTS}
    assert "vm.create:run" in coverage_table(coverage)


def test_a_failure_prints_the_command_that_replays_it(capsys: pytest.CaptureFixture[str]) -> None:
    bug = next(each for each in PLANTED if each.plant.__name__ == "stop_removes")
    with bug.plant():
        assert main(["--start", "0", "--seeds", "1"]) == 1
    assert "./dev sim --start 0 --seeds 1" in capsys.readouterr().out


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.plant.__name__)
def test_a_planted_bug_is_found(bug: PlantedBug) -> None:
    with bug.plant():
        for seed in range(bug.first, bug.first + SEARCH_MAX):
            outcome = simulate(seed, only=bug.found_by)
            if outcome.violated:
                assert outcome.violated == bug.found_by.__name__
                return
    pytest.fail(f"{SEARCH_MAX} seeds did not find it")
