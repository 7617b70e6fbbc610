"""What really ran, seen from outside: QEMU processes in /proc and counters on console logs.

Imports nothing of the product, so that no fault of the product can hide in it. A process of its own
looks at every process of the machine each 50 ms and appends a line whenever the set of guests
changes; `Witness` starts it, reads the lines and judges. A guest is known by the name and the UUID
on its QEMU's command line. What is not seen in a look of 50 ms was not there for longer than that;
``longest_gap_s`` tells how far the looks really were apart.
"""

from __future__ import annotations

import itertools
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

PERIOD_S = 0.05
# Also written when nothing changes, so that a witness that fell asleep is noticed.
SIGN_OF_LIFE_S = 0.5
# A witness that has not looked once in this time hangs, or never will.
LOOK_LIMIT_S = 10.0
# Kernel threads come and go, and so do their numbers: a machine under load has given all 32,768 out
# within minutes. Known ones are looked at anew after this long, in which it cannot.
THREADS_KNOWN_S = 1.0
KERNEL_THREADS_PARENT = 2


class Guest(NamedTuple):
    """One QEMU process; ``started`` is in clock ticks since the machine's boot."""

    pid: int
    started: int
    name: str
    uuid: str


class Look(NamedTuple):
    """What was there from ``at`` on (seconds, monotonic clock), until the next look."""

    at: float
    guests: tuple[Guest, ...]
    longest_gap_s: float


class Boot(NamedTuple):
    """The counters that a guest printed from one ``boot`` line to the next."""

    counts: tuple[int, ...]


class Account:
    """All that was seen up to one moment, and the verdicts on it."""

    def __init__(self, looks: list[Look]) -> None:
        self.looks = looks

    def guests(self, name: str) -> list[Guest]:
        """Return every process that ever ran a guest, in order of their appearance."""
        seen: dict[Guest, None] = {}
        for look in self.looks:
            seen.update(dict.fromkeys(g for g in look.guests if g.name == name))
        return list(seen)

    def running(self, name: str) -> list[Guest]:
        """Return the processes that run a guest now; more than one is a catastrophe."""
        return [g for g in self.looks[-1].guests if g.name == name]

    def doubles(self, names: Collection[str]) -> list[tuple[float, tuple[Guest, ...]]]:
        """Return each moment at which one of these guests ran twice, by its name or its UUID.

        Others are not judged: the machine may run more than what is watched here.
        """
        uuids = {g.uuid for look in self.looks for g in look.guests if g.name in names}
        found = []
        for look in self.looks:
            ours = [g for g in look.guests if g.name in names or g.uuid in uuids]
            twice = tuple(
                g
                for g in ours
                if any(o is not g and (o.name == g.name or o.uuid == g.uuid) for o in ours)
            )
            if twice:
                found.append((look.at, twice))
        return found

    def same_process(self, name: str, since: float, until: float) -> bool:
        """Say whether one and the same process ran a guest all the time between two dates."""
        seen = set(self._between(name, since, until))
        return len(seen) == 1 and len(seen.pop()) == 1

    def never_ran(self, name: str, since: float, until: float) -> bool:
        """Say whether no process ran a guest at any look between two dates."""
        return set(self._between(name, since, until)) == {()}

    def longest_gap_s(self) -> float:
        return max(look.longest_gap_s for look in self.looks)

    def _between(self, name: str, since: float, until: float) -> Iterator[tuple[Guest, ...]]:
        """Yield what ran a guest at each look that held for a part of the time."""
        ends = [look.at for look in self.looks[1:]] + [float("inf")]
        for look, end in zip(self.looks, ends, strict=True):
            if look.at <= until and end >= since:
                yield tuple(g for g in look.guests if g.name == name)


class Witness:
    """Watches while it is open; ``now()`` gives the dates that the verdicts take."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def now() -> float:
        return time.monotonic()

    def account(self) -> Account:
        """Return what was seen up to now; raises AssertionError when the witness has died."""
        assert self._process is not None, "the witness has not been called"
        called = self.now()
        while self.now() < called + LOOK_LIMIT_S:
            assert self._process.poll() is None, "the witness died: nothing can be said"
            looks = list(_read(self._record))
            if looks and looks[-1].at >= called:
                return Account(looks)
            time.sleep(PERIOD_S)
        raise AssertionError(f"the witness has not looked for {LOOK_LIMIT_S:.0f} s")

    def __enter__(self) -> Witness:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._record)], stdin=subprocess.PIPE
        )
        self.account()
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


def boots(console_log: Path) -> list[Boot]:
    """Return what a guest counted in each of its boots; empty when it has written nothing.

    Lines that the kernel's own messages have torn are left out.
    """
    try:
        text = console_log.read_bytes()
    except FileNotFoundError:
        return []
    parts = re.split(rb"^boot [0-9.]+\r?$", text, flags=re.MULTILINE)[1:]
    lines = re.compile(rb"^count (\d+)\r?$", re.MULTILINE)
    return [Boot(tuple(int(n) for n in lines.findall(part))) for part in parts]


def counts_up(boot: Boot) -> bool:
    """Say whether a guest's counter never went back nor stood still."""
    return all(before < after for before, after in itertools.pairwise(boot.counts))


def watch(record: Path) -> None:
    """Look until standard input ends, which it does at the latest with whoever started this."""
    kernel_threads: set[int] = set()
    before: tuple[Guest, ...] | None = None
    last_at = written_at = forgot_at = time.monotonic()
    longest_gap_s = 0.0
    with record.open("a", buffering=1) as out:
        while not _ended():
            at = time.monotonic()
            if at - forgot_at >= THREADS_KNOWN_S:
                kernel_threads.clear()
                forgot_at = at
            longest_gap_s = max(longest_gap_s, at - last_at)
            last_at = at
            now = tuple(_guests(kernel_threads))
            if now != before or at - written_at >= SIGN_OF_LIFE_S:
                out.write(json.dumps([at, now, longest_gap_s]) + "\n")
                before, written_at, longest_gap_s = now, at, 0.0
            time.sleep(max(0.0, PERIOD_S - (time.monotonic() - at)))


def _ended() -> bool:
    """Say whether standard input has ended; nobody ever writes to it."""
    return bool(select.select([sys.stdin.fileno()], [], [], 0)[0])


def _guests(kernel_threads: set[int]) -> Iterator[Guest]:
    """Yield every QEMU process with a guest; a zombie has no command line and is none."""
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        if pid in kernel_threads:
            continue
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"qemu" not in words[0]:
                _note_kernel_thread(pid, words, kernel_threads)
                continue
            guest = _guest(pid, [w.decode(errors="replace") for w in words])
        except (OSError, ValueError, IndexError):
            continue
        if guest is not None:
            yield guest


def _note_kernel_thread(pid: int, words: list[bytes], kernel_threads: set[int]) -> None:
    """Remember what can never become a QEMU, for as long as its number is not given out again."""
    if words == [b""] and _stat(pid)[1] == str(KERNEL_THREADS_PARENT):
        kernel_threads.add(pid)


def _guest(pid: int, words: list[str]) -> Guest | None:
    if "-uuid" not in words or "-name" not in words:
        return None
    name = words[words.index("-name") + 1]
    found = re.match(r"(?:guest=)?([^,]*)", name)
    assert found is not None, "the pattern matches everything"
    return Guest(
        pid=pid,
        started=int(_stat(pid)[19]),
        name=found.group(1),
        uuid=words[words.index("-uuid") + 1],
    )


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _read(record: Path) -> Iterator[Look]:
    """Yield the looks written so far; a line that is still being written is left for later."""
    if not record.exists():
        return
    for line in record.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row: list[Any] = json.loads(line)
            yield Look(row[0], tuple(Guest(*guest) for guest in row[1]), row[2])


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
