"""`./dev sim`: run seeds one after the other, tell which failed and how to see that again."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.sim.faults.injector import Pair
from tests.sim.process import current
from tests.sim.simulation import Outcome, simulate
from tests.sim.virtual_loop import true_time_s


def main(arguments: Sequence[str]) -> int:
    """Return 0 when every seed held, 1 otherwise."""
    options = _parse(arguments)
    _log(options.logs)
    began_s = time.monotonic()
    coverage: Counter[Pair] = Counter()
    endings: Counter[str] = Counter()
    failed: list[int] = []
    virtual_s = 0.0
    for seed in range(options.start, options.start + options.seeds):
        outcome = simulate(seed, tell=_print if options.trace else None)
        coverage.update(outcome.coverage)
        endings.update(outcome.outcomes)
        virtual_s += outcome.virtual_s
        if outcome.violated:
            failed.append(seed)
            _tell_failure(outcome)
    took_s = time.monotonic() - began_s
    print(
        f"{options.seeds} seeds from {options.start}: {len(failed)} failed, "
        f"{virtual_s / 3600:.1f} virtual hours in {took_s:.0f} s"
    )
    if options.coverage:
        print("\nhow clients' calls ended:")
        for ending, count in sorted(endings.items()):
            print(f"  {count:7} {ending}")
        print("\n" + coverage_table(coverage))
    return 1 if failed else 0


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
    met = sum(1 for fault in faults for phase in phases if coverage[fault, phase])
    lines.append(f"{met} of {len(faults) * len(phases)} pairs were met")
    return "\n".join(lines)


def _tell_failure(outcome: Outcome) -> None:
    print(f"seed {outcome.seed}: {outcome.complaint}")
    print(f"    replay: ./dev sim --start {outcome.seed} --seeds 1 --trace --logs", flush=True)


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


def _print(line: str) -> None:
    print(line)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--coverage", action="store_true", help="print which faults met what")
    parser.add_argument("--trace", action="store_true", help="print everything that happened")
    parser.add_argument("--logs", action="store_true", help="print the product's own logs")
    return parser.parse_args(arguments)
