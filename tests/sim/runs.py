"""Many seeds: on several processes, in parts, with what has been run kept in a file.

The file has one line for each seed that was run. A later run with the same file leaves these out
and counts what they met, so that thousands of seeds need not be run in one go.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
from msgspec import Struct

from tests.sim.faults.injector import Pair
from tests.sim.replica import leaves
from tests.sim.simulation import Outcome, simulate


class Ran(Struct, frozen=True, kw_only=True):
    """What became of a seed, as it is kept; ``complaint`` is empty when all held."""

    seed: int
    complaint: str
    virtual_s: float
    outcomes: dict[str, int]
    coverage: list[tuple[str, str, int]]


class Total:
    """What all seeds together came to."""

    def __init__(self) -> None:
        self.seeds = 0
        self.failed: list[int] = []
        self.virtual_s = 0.0
        self.outcomes: Counter[str] = Counter()
        self.coverage: Counter[Pair] = Counter()

    def add(self, ran: Ran) -> None:
        self.seeds += 1
        self.virtual_s += ran.virtual_s
        self.outcomes.update(ran.outcomes)
        self.coverage.update({(fault, phase): count for fault, phase, count in ran.coverage})
        if ran.complaint:
            self.failed.append(ran.seed)


def run_all(seeds: Sequence[int], jobs: int, kept: Path | None) -> Iterator[Ran]:
    """Yield what became of each seed, those first that ``kept`` knows; the others as they end."""
    known = _read(kept, set(seeds))
    yield from known
    done = {ran.seed for ran in known}
    for ran in _run([seed for seed in seeds if seed not in done], jobs):
        if kept is not None:
            with kept.open("ab") as file:
                file.write(msgspec.json.encode(ran) + b"\n")
        yield ran


def ran_as(outcome: Outcome) -> Ran:
    return Ran(
        seed=outcome.seed,
        complaint=outcome.complaint,
        virtual_s=outcome.virtual_s,
        outcomes=dict(outcome.outcomes),
        coverage=[(*pair, count) for pair, count in outcome.coverage.items()],
    )


def _run(seeds: Sequence[int], jobs: int) -> Iterator[Ran]:
    if jobs == 1:
        yield from map(_run_one, seeds)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, logging.disable, (logging.CRITICAL,)) as pool:
        yield from pool.map(_run_one, seeds)


def _run_one(seed: int) -> Ran:
    try:
        return ran_as(simulate(seed))
    except Exception as error:  # of the simulation's own: the other seeds are run all the same
        why = "; ".join(repr(leaf) for leaf in leaves(error))
        return Ran(seed=seed, complaint=f"not judged: {why}", virtual_s=0, outcomes={}, coverage=[])


def _read(kept: Path | None, seeds: set[int]) -> list[Ran]:
    """Return the seeds that were run before; a line that was cut off is run again."""
    if kept is None or not kept.exists():
        return []
    lines = kept.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        kept.write_bytes(b"".join(lines[:-1]))
        del lines[-1]
    ran = {each.seed: each for each in (msgspec.json.decode(line, type=Ran) for line in lines)}
    return [ran[seed] for seed in sorted(ran.keys() & seeds)]
