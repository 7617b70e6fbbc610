"""`./dev sim`: run seeds, tell which failed and how to see that again."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.sim.aim import TARGETS
from tests.sim.faults.injector import Pair
from tests.sim.faults.kinds import FAULTS
from tests.sim.process import current
from tests.sim.runs import Ran, Total, ran_as, run_all
from tests.sim.simulation import simulate
from tests.sim.virtual_loop import true_time_s


def main(arguments: Sequence[str]) -> int:
    """Return 0 when every seed held, 1 otherwise."""
    options = _parse(arguments)
    _log(options.logs)
    began_s = time.monotonic()
    total = Total()
    for ran in _runs(options):
        total.add(ran)
        if ran.complaint:
            _tell_failure(ran)
    took_s = time.monotonic() - began_s
    print(
        f"{total.seeds} seeds from {options.start}: {len(total.failed)} failed, "
        f"{total.virtual_s / 3600:.1f} virtual hours in {took_s:.0f} s"
    )
    if options.coverage:
        print("\nhow clients' calls ended:")
        for ending, count in sorted(total.outcomes.items()):
            print(f"  {count:7} {ending}")
        print("\n" + coverage_table(total.coverage))
        print(missing_pairs(total.coverage))
    return 1 if total.failed else 0


def _runs(options: argparse.Namespace) -> Iterator[Ran]:
    seeds = range(options.start, options.start + options.seeds)
    if not (options.trace or options.logs):
        yield from run_all(seeds, options.jobs, options.resume)
        return
    for seed in seeds:
        yield ran_as(simulate(seed, tell=print if options.trace else None))


def coverage_table(coverage: Counter[Pair]) -> str:
    """Return how often each kind of fault met each phase of an operation."""
    faults = sorted({fault for fault, _ in coverage})
    phases = sorted({phase for _, phase in coverage})
    width = max((len(phase) for phase in phases), default=0)
    lines = ["fault x phase of an open operation:"]
    lines += [f"  {number:2} {fault}" for number, fault in enumerate(faults, start=1)]
    lines.append(" " * width + "".join(f"{n:6}" for n in range(1, len(faults) + 1)))
    for phase in phases:
        counts = (coverage[fault, phase] for fault in faults)
        lines.append(phase.ljust(width) + "".join(f"{count or '.':>6}" for count in counts))
    return "\n".join(lines)


def missing_pairs(coverage: Counter[Pair]) -> str:
    """Return how many pairs of a kind of fault and a step of a saga were met, and which not."""
    pairs = [
        (fault.__name__, f"{target.kind}:{target.phase}") for fault in FAULTS for target in TARGETS
    ]
    missing = [pair for pair in pairs if not coverage[pair]]
    lines = [f"{len(pairs) - len(missing)} of {len(pairs)} pairs of fault and saga step were met"]
    return "\n".join([*lines, *(f"  not met: {fault} at {phase}" for fault, phase in missing)])


def _tell_failure(ran: Ran) -> None:
    print(f"seed {ran.seed}: {ran.complaint}")
    print(f"    replay: ./dev sim --start {ran.seed} --seeds 1 --trace --logs", flush=True)


class _PlaceAndTime(logging.Formatter):
    """Says when in the simulation a line was logged, and by which process."""

    def format(self, record: logging.LogRecord) -> str:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return super().format(record)
        process = current()
        where = "" if process is None else f" {process.incarnation}"
        return f"{true_time_s():.6f}    {where} {record.name}: {super().format(record)}"


def _log(wanted: bool) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlaceAndTime())
    level = logging.INFO if wanted else logging.CRITICAL
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="on how many processes")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="leave out the seeds in this file, and add to it",
    )
    parser.add_argument("--coverage", action="store_true", help="print which faults met what")
    parser.add_argument("--trace", action="store_true", help="print everything that happened")
    parser.add_argument("--logs", action="store_true", help="print the product's own logs")
    return parser.parse_args(arguments)
