"""The options of `./dev test`: what is left out, how a suite is cut, how a killed run goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SUITE = """\
import os
import pytest

@pytest.mark.parametrize("number", range(12))
def test_short(number):
    assert number != int(os.environ.get("FAILS", "-1"))

@pytest.mark.long
def test_long():
    pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "test_suite.py"
    path.write_text(SUITE)
    return path


def test_long_tests_run_when_asked_for_and_then_alone(suite: Path) -> None:
    assert _passed(_run(suite)) == 12
    assert _passed(_run(suite, "--long")) == 1


def test_shards_are_disjoint_and_leave_nothing_out(suite: Path) -> None:
    names = [_names(_run(suite, "-v", "--shard", f"{i}/3")) for i in (1, 2, 3)]
    assert sum(len(part) for part in names) == 12
    assert len(set().union(*names)) == 12


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b"])
def test_a_shard_that_does_not_exist_is_refused(suite: Path, shard: str) -> None:
    outcome = _run(suite, "--shard", shard)
    assert outcome.returncode == pytest.ExitCode.USAGE_ERROR
    assert "give i/n" in outcome.stderr


def test_a_resumed_run_leaves_out_what_passed(suite: Path, tmp_path: Path) -> None:
    record = str(tmp_path / "passed")
    assert _passed(_run(suite, "--resume", record, fails=5)) == 11
    assert _names(_run(suite, "-v", "--resume", record)) == {"test_short[5]"}
    assert _run(suite, "--resume", record).returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def _run(suite: Path, *options: str, fails: int = -1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    markers = ["-o", "markers=long", f"--rootdir={suite.parent}", "-c", "/dev/null"]
    return subprocess.run(
        [*command, *markers, *options, str(suite)],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "FAILS": str(fails)},
        check=False,
        capture_output=True,
        text=True,
    )


def _passed(outcome: subprocess.CompletedProcess[str]) -> int:
    found = re.search(r"(\d+) passed", outcome.stdout)
    return int(found[1]) if found else 0


def _names(outcome: subprocess.CompletedProcess[str]) -> set[str]:
    return set(re.findall(r"::(\S+) PASSED", outcome.stdout))
