"""`./dev bench [NAME…] [--json FILE]`: measure, print a table, fail when a gate does not hold."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.bench import (
    bench_api,
    bench_applier,
    bench_create,
    bench_failover,
    bench_footprint,
    bench_migrate,
)
from tests.bench.result import BenchResult

BENCHES: dict[str, Callable[[], list[BenchResult]]] = {
    "create": bench_create.run,
    "api": bench_api.run,
    "applier": bench_applier.run,
    "footprint": bench_footprint.run,
    "migrate": bench_migrate.run,
    "failover": bench_failover.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHES]
    if unknown:
        parser.error(f"no bench is called {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    results: list[BenchResult] = []
    for name in arguments.names or BENCHES:
        print(f"measuring {name} …", file=sys.stderr)
        results += BENCHES[name]()
    _print_table(results)
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2))
    return 0 if all(result.holds for result in results) else 1


def _print_table(results: list[BenchResult]) -> None:
    width = max(len(result.name) for result in results)
    for result in results:
        verdict = "" if not result.gate else ("holds" if result.holds else "FAILS")
        line = f"{result.name:<{width}}  {result.value:>12,.3f} {result.unit:<10}"
        print(f"{line}  {result.gate}  {verdict}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
