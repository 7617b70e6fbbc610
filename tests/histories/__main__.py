"""The commands: ``record`` one history on a running lab, ``judge`` those that were recorded."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tests.histories.cell import StatusCommand
from tests.histories.judge import counts_of, judge, too_little
from tests.histories.record import read_history
from tests.histories.recording import record

STATUS = f"{shlex.quote(sys.executable)} -m tests.lab lab status --json"

# The status of a history that breaks no promise and shows too little to be counted, and of one that
# breaks one: of several the worst is told.
TOO_LITTLE, BROKEN = 3, 4


def main() -> int:
    options = _parser().parse_args()
    if options.command == "record":
        record(StatusCommand(shlex.split(options.status)), options.seed, options.log)
        return 0
    return max(_judged(path) for path in options.logs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.histories", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="work on a cell, with two faults")
    recording.add_argument("--seed", type=int, required=True)
    recording.add_argument("--log", type=Path, required=True, help="a new file")
    recording.add_argument(
        "--status", default=STATUS, help="the command that tells of the cell, as `dev lab status`"
    )
    judging = commands.add_parser("judge", help="say what in histories cannot be")
    judging.add_argument("logs", type=Path, nargs="+")
    return parser


def _judged(path: Path) -> int:
    """Print the verdict on one history; returns 1 unless it is whole and right."""
    history = read_history(path)
    counts = counts_of(history)
    blows = ", ".join(dict.fromkeys(fault.blow for fault in history.faults))
    print(f"{path.name}: seed {history.head.seed} ({blows}): {counts}")
    missing = too_little(counts)
    if missing:
        print(f"  shows too little: {'; '.join(missing)}")
    found = judge(history)
    for each in found:
        print("  " + str(each).replace("\n", "\n  "))
    print(f"  {len(found)} violations" if found else "  no violation")
    return BROKEN if found else TOO_LITTLE if missing else 0


if __name__ == "__main__":
    sys.exit(main())
