"""Many seeds: what was run is kept, and not run again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sim import runs
from tests.sim.aim import TARGETS
from tests.sim.cli import missing_pairs
from tests.sim.faults.kinds import FAULTS
from tests.sim.runs import Ran, Total, run_all
from tests.sim.simulation import Outcome

BAD = 3


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have seeds run at once; return those that were."""
    seeds: list[int] = []

    def simulate(seed: int) -> Outcome:
        seeds.append(seed)
        if seed < 0:
            raise KeyError(seed)
        return Outcome(
            seed=seed,
            violated="x" if seed == BAD else "",
            complaint="x: it broke" if seed == BAD else "",
            digest="",
            virtual_s=10.0,
            trace_lines=1,
            outcomes=Counter({"create succeeded": 2}),
            coverage=Counter({("crash_agent", "vm.create:run"): seed}),
        )

    monkeypatch.setattr(runs, "simulate", simulate)
    return seeds


def total_of(found: list[Ran]) -> Total:
    total = Total()
    for each in found:
        total.add(each)
    return total


def test_what_was_run_is_left_out_and_counted(ran: list[int], tmp_path: Path) -> None:
    kept = tmp_path / "runs"
    first = list(run_all(range(4), 1, kept))
    assert ran == [0, 1, 2, 3]
    second = list(run_all(range(2, 6), 1, kept))
    assert ran == [0, 1, 2, 3, 4, 5]
    assert [each.seed for each in second] == [2, 3, 4, 5]
    assert second[:2] == first[2:]
    total = total_of(second)
    assert (total.seeds, total.failed, total.virtual_s) == (4, [BAD], 40.0)
    assert total.outcomes == {"create succeeded": 8}
    assert total.coverage == {("crash_agent", "vm.create:run"): 14}


def test_a_line_that_was_cut_off_is_run_again(ran: list[int], tmp_path: Path) -> None:
    kept = tmp_path / "runs"
    list(run_all(range(2), 1, kept))
    kept.write_bytes(kept.read_bytes()[:-5])
    assert [each.seed for each in run_all(range(3), 1, kept)] == [0, 1, 2]
    assert ran == [0, 1, 1, 2]
    assert len(kept.read_bytes().splitlines()) == 3


def test_a_seed_that_breaks_the_simulation_fails_and_stops_no_other(ran: list[int]) -> None:
    found = list(run_all([-1, 0], 1, None))
    assert ran == [-1, 0]
    assert found[0].complaint == "not judged: KeyError(-1)"
    assert total_of(found).failed == [-1]


def test_pairs_that_were_not_met_are_named() -> None:
    pairs = [(fault.__name__, f"{each.kind}:{each.phase}") for fault in FAULTS for each in TARGETS]
    met = Counter(dict.fromkeys(pairs[1:], 1))
    assert missing_pairs(met).splitlines() == [
        f"{len(pairs) - 1} of {len(pairs)} pairs of fault and saga step were met",
        f"  not met: {pairs[0][0]} at {pairs[0][1]}",
    ]
