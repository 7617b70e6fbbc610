"""The witness of the fault tests: that it sees, and that each of its verdicts can be a bad one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.witness import Account, Guest, Look, Witness, boots, counts_up

FIRST = Guest(pid=11, started=100, name="vm-a", uuid="u-a")
SECOND = Guest(pid=12, started=200, name="vm-a", uuid="u-a")
OTHER = Guest(pid=13, started=100, name="vm-b", uuid="u-b")
IMPOSTOR = Guest(pid=14, started=300, name="vm-c", uuid="u-a")


def _account(*rows: tuple[Guest, ...]) -> Account:
    """Make up looks at 0, 1, 2, … seconds."""
    return Account([Look(float(at), guests, 0.05) for at, guests in enumerate(rows)])


def test_one_process_all_the_time_is_the_same_process() -> None:
    seen = _account((FIRST,), (FIRST, OTHER), (FIRST,))
    assert seen.same_process("vm-a", 0.0, 2.5)
    assert seen.doubles({"vm-a", "vm-b"}) == []


@pytest.mark.parametrize(
    "rows",
    [
        ((FIRST,), (SECOND,), (SECOND,)),
        ((FIRST,), (), (FIRST,)),
        ((FIRST,), (FIRST, SECOND), (FIRST,)),
        ((), (), ()),
    ],
)
def test_a_guest_that_was_restarted_away_or_doubled_did_not_run_through(
    rows: tuple[tuple[Guest, ...], ...],
) -> None:
    assert not _account(*rows).same_process("vm-a", 0.0, 2.5)


def test_only_what_lies_between_the_dates_counts() -> None:
    seen = _account((FIRST,), (SECOND,), (SECOND,), ())
    assert seen.same_process("vm-a", 1.5, 2.5)
    assert not seen.same_process("vm-a", 0.5, 2.5)
    assert seen.never_ran("vm-a", 3.5, 4.0)
    assert not seen.never_ran("vm-a", 2.5, 4.0)


@pytest.mark.parametrize("second", [SECOND, IMPOSTOR])
def test_two_processes_of_one_name_or_uuid_are_a_double(second: Guest) -> None:
    seen = _account((FIRST, OTHER), (FIRST, OTHER, second), (OTHER, second))
    assert seen.doubles({"vm-a"}) == [(1.0, (FIRST, second))]
    assert seen.running("vm-b") == [OTHER]


def test_one_after_the_other_is_no_double() -> None:
    seen = _account((FIRST,), (), (SECOND,))
    assert seen.doubles({"vm-a", "vm-b"}) == []
    assert seen.guests("vm-a") == [FIRST, SECOND]


def test_counters_are_read_boot_by_boot(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(
        b"[0.1] kernel\r\nboot 1.20\r\ncount 1\r\ncount 2\r\n[9.9] noise count 77\r\ncount 3\r\n"
        b"boot 0.90\r\ncount 1\r\ncount 1\r\n"
    )
    first, second = boots(log)
    assert first.counts == (1, 2, 3)
    assert counts_up(first)
    assert not counts_up(second)
    assert boots(tmp_path / "none") == []


def test_it_sees_processes_come_and_go(tmp_path: Path) -> None:
    with Witness(tmp_path / "looks") as witness:
        assert witness.account().guests("vm-fake") == []
        with _pretended("vm-fake", "u-1") as pid, _pretended("vm-fake", "u-2"):
            seen = witness.account()
            assert pid in {g.pid for g in seen.running("vm-fake")}
            assert len(seen.doubles({"vm-fake"})) > 0
            assert seen.doubles({"vm-a"}) == []
        assert witness.account().running("vm-fake") == []


def test_a_witness_that_died_says_nothing(tmp_path: Path) -> None:
    with Witness(tmp_path / "looks") as witness:
        assert witness._process is not None
        witness._process.kill()
        witness._process.wait()
        with pytest.raises(AssertionError, match="died"):
            witness.account()


@contextmanager
def _pretended(name: str, uuid: str) -> Iterator[int]:
    """Run a process whose command line looks like a guest's QEMU; gives its pid."""
    words = ("qemu-pretended", "-c", "input()", "-name", f"guest={name},x=on", "-uuid", uuid)
    with subprocess.Popen(words, executable=sys.executable, stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()
