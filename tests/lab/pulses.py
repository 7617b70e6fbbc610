"""The witness for guests that move: what each said on which node, and when its processors ran.

Two QEMUs of one VM are legitimate while it moves; two guests never are. A guest that was given
``nova.pulse`` prints its boot and a number that only grows: a number that stands in the logs twice
was said by two guests, or by one that was set back. Beside that, the run time of every QEMU's vCPU
threads is sampled. Imports nothing of the product. A process of its own looks each 10 ms and
appends what it saw; two guests together for less than a pulse may not show in their numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

PERIOD_S = 0.01
# Also written when nothing is said, so that a witness that fell asleep is noticed.
SIGN_OF_LIFE_S = 0.5
# A witness that has not looked once in this time hangs, or never will.
LOOK_LIMIT_S = 10.0
# A QEMU's vCPU thread does some work of QEMU's own before its guest runs, and as that is stopped.
IDLE_RUN_S = 0.0005
# What a guest's kernel says when it is at its end, or knows that its memory is not what it wrote.
_LAST_WORDS = re.compile(
    r"^.*(?:Kernel panic|BUG: |Oops: |general protection fault).*$", re.MULTILINE
)
_PULSE = re.compile(r"^pulse ([0-9a-f]+) (\d+) (\d+)\r?$", re.MULTILINE)


class Place(NamedTuple):
    """A node's directories, as the root namespace sees them: console logs, and QEMUs' pid files."""

    node: str
    console_dir: str
    qemu_dir: str


class Pulse(NamedTuple):
    """One number that a guest said on a node; ``at`` is when it was seen in the log there."""

    at: float
    node: str
    boot: str
    number: int


class Run(NamedTuple):
    """A QEMU's vCPUs ran for ``ran_s`` seconds in the look that ended at ``at``."""

    at: float
    node: str
    pid: int
    ran_s: float


class PulseAccount:
    """All that was seen of one guest, since the witness was called and in its logs before."""

    def __init__(self) -> None:
        self.pulses: list[Pulse] = []
        self.runs: list[Run] = []
        self.longest_gap_s = 0.0
        self._last_words: list[tuple[float, str]] = []

    def take(self, at: float, node: str, text: str) -> None:
        """Take whole lines that were seen in the guest's log on a node."""
        self.pulses += [
            Pulse(at, node, boot, int(number))
            for boot, number, again in _PULSE.findall(text)
            if number == again
        ]
        self._last_words += [(at, line.strip()) for line in _LAST_WORDS.findall(text)]

    def last_words(self, since: float) -> list[str]:
        """Return what the guest's kernel said of its own end."""
        return [line for at, line in self._last_words if at >= since]

    def boots(self) -> list[str]:
        """Return the guest's boots, in the order in which they were first seen."""
        return list(dict.fromkeys(pulse.boot for pulse in self.pulses))

    def said_twice(self, since: float) -> list[tuple[int, tuple[str, ...]]]:
        """Return each number that was said again since a date, and all nodes that it was said on.

        What is in a guest's logs as the witness is called counts as said then.
        """
        said: dict[tuple[str, int], list[Pulse]] = {}
        for pulse in self.pulses:
            said.setdefault((pulse.boot, pulse.number), []).append(pulse)
        return [
            (number, tuple(pulse.node for pulse in times))
            for (_, number), times in said.items()
            if len(times) > 1 and times[-1].at >= since
        ]

    def went_back(self, since: float) -> list[tuple[Pulse, Pulse]]:
        """Return each pulse after which a smaller number of the same boot was said."""
        found = []
        for boot in self.boots():
            said = [pulse for pulse in self.pulses if pulse.boot == boot and pulse.at >= since]
            found += [
                (before, after)
                for before, after in itertools.pairwise(said)
                # What is seen in one look has no order of its own.
                if after.number < before.number and after.at > before.at
            ]
        return found

    def both_ran_s(self) -> float:
        """Return for how long two QEMUs ran this guest at the same time, by their vCPU threads.

        Counted are looks in which both did more than a QEMU does by itself.
        """
        looks: dict[float, set[int]] = {}
        for run in self.runs:
            if run.ran_s > IDLE_RUN_S:
                looks.setdefault(run.at, set()).add(run.pid)
        return PERIOD_S * sum(len(pids) > 1 for pids in looks.values())

    def longest_silence_s(self, since: float) -> float:
        """Return the longest time without a pulse."""
        dates = [pulse.at for pulse in self.pulses if pulse.at >= since]
        return max((b - a for a, b in itertools.pairwise(dates)), default=0.0)


class PulseWitness:
    """Watches while it is open."""

    def __init__(self, record: Path, places: Iterable[Place]) -> None:
        self._record = record
        self._places = list(places)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def now() -> float:
        return time.monotonic()

    def account(self, vm: str) -> PulseAccount:
        """Return what was seen of a guest up to now; raises AssertionError when nobody watched."""
        assert self._process is not None, "the witness has not been called"
        called = self.now()
        while self.now() < called + LOOK_LIMIT_S:
            assert self._process.poll() is None, "the witness died: nothing can be said"
            if _last_look(self._record) >= called:
                return _account(self._record, vm)
            time.sleep(PERIOD_S)
        raise AssertionError(f"the witness has not looked for {LOOK_LIMIT_S:.0f} s")

    def __enter__(self) -> PulseWitness:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._record), json.dumps(self._places)],
            stdin=subprocess.PIPE,
        )
        self.account("")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        assert process is not None, "it was entered"
        assert process.stdin is not None, "it was started with a pipe"
        process.stdin.close()
        try:
            process.wait(LOOK_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# What the process writes, a JSON list in each line: [at, "look", longest gap], [at, "said", node,
# vm, text], [at, "ran", node, vm, pid, seconds].


def _rows(record: Path) -> Iterator[list[Any]]:
    with contextlib.suppress(FileNotFoundError), record.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _last_look(record: Path) -> float:
    """Return the date of the last look that is written, from the end of the record."""
    try:
        with record.open("rb") as lines:
            lines.seek(max(0, record.stat().st_size - 65536))
            whole = lines.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0.0
    for line in reversed(whole.splitlines()):
        if b'"look"' in line and line.startswith(b"["):
            return float(json.loads(line)[0])
    return 0.0


def _account(record: Path, vm: str) -> PulseAccount:
    # A log is put together again before it is read: a look may end in the middle of a line.
    ends: dict[str, str] = {}
    account = PulseAccount()
    for at, kind, *rest in _rows(record):
        if kind == "look":
            account.longest_gap_s = max(account.longest_gap_s, rest[0])
        elif kind == "ran" and rest[1] == vm:
            account.runs.append(Run(at, rest[0], rest[2], rest[3]))
        elif kind == "said" and rest[1] == vm:
            node = rest[0]
            whole, newline, ends[node] = (ends.get(node, "") + rest[2]).rpartition("\n")
            account.take(at, node, whole + newline)
    return account


class _Looker:
    """Looks at logs and threads, and remembers how far it has read."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places
        self._sizes: dict[Path, int] = {}
        self._threads: dict[int, tuple[Path, ...]] = {}
        self._ran_ns: dict[int, int] = {}

    def look(self) -> Iterator[tuple[Any, ...]]:
        for place in self._places:
            yield from self._said(place)
            yield from self._ran(place)

    def _said(self, place: Place) -> Iterator[tuple[Any, ...]]:
        for path in _files(place.console_dir, ".log"):
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                known = self._sizes.get(path, 0)
                if size == known:
                    continue
                with path.open("rb") as log:
                    log.seek(known if size > known else 0)
                    text = log.read()
                    self._sizes[path] = log.tell()
                yield "said", place.node, path.stem, text.decode(errors="replace")

    def _ran(self, place: Place) -> Iterator[tuple[Any, ...]]:
        for path in _files(place.qemu_dir, ".pid"):
            if path.stem == "driver":
                continue
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                ran_ns = sum(int(p.read_text().split()[0]) for p in self._vcpus(pid))
                before = self._ran_ns.get(pid, ran_ns)
                self._ran_ns[pid] = ran_ns
                if ran_ns != before:
                    yield "ran", place.node, path.stem, pid, (ran_ns - before) / 1e9

    def _vcpus(self, pid: int) -> tuple[Path, ...]:
        known = self._threads.get(pid, ())
        if not known:
            threads = Path(f"/proc/{pid}/task").iterdir()
            cpus = (t for t in threads if (t / "comm").read_text().startswith("CPU "))
            known = self._threads[pid] = tuple(t / "schedstat" for t in cpus)
        return known


def watch(record: Path, places: list[Place]) -> None:
    """Look until standard input ends, which it does at the latest with whoever started this."""
    looker = _Looker(places)
    last_at = time.monotonic()
    written_at = longest_gap_s = 0.0
    with record.open("a") as out:
        while not select.select([sys.stdin.fileno()], [], [], 0)[0]:
            at = time.monotonic()
            longest_gap_s = max(longest_gap_s, at - last_at)
            last_at = at
            rows = list(looker.look())
            if rows or at - written_at >= SIGN_OF_LIFE_S:
                rows.append(("look", longest_gap_s))
                out.write("".join(json.dumps((at, *row)) + "\n" for row in rows))
                out.flush()
                written_at, longest_gap_s = at, 0.0
            time.sleep(max(0.0, PERIOD_S - (time.monotonic() - at)))


def _files(directory: str, suffix: str) -> list[Path]:
    """Return a directory's files; none while it is not there, as on a node that boots."""
    try:
        return [path for path in Path(directory).iterdir() if path.suffix == suffix]
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    watch(Path(sys.argv[1]), [Place(*place) for place in json.loads(sys.argv[2])])
