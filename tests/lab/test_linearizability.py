"""The API keeps its promises while replicas and members of etcd are killed and stopped.

Each test records one history of a real cell with two faults and has it judged (`tests/histories`,
in processes of their own that load nothing of the product). One that shows too little is recorded
anew, and fails as one with a violation does when that does not help. A lab in which a test failed
is given up.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.histories.__main__ import TOO_LITTLE
from tests.lab.cluster import Lab, LabPlan
from tests.lab.layout import CACHE_DIR, LOG_DIR, REPOSITORY

pytestmark = pytest.mark.lab

# The blows of a history follow from its number: 100 of them are six of each first blow, with a
# different second one each time.
LONG = (*range(100), 107)
# A member of etcd that leads is killed, then both leaders at once.
SAMPLE = (119,)
PLAN = LabPlan(nodes=1, replicas=3, members=3)
COMMAND = (sys.executable, "-m", "tests.histories")
# A history takes half a minute beside others.
HISTORY_LIMIT_S = 420.0
# One of fifty has less of unknown outcomes than it is to have.
TRIES_MAX = 3
KEPT_DIR = CACHE_DIR / "lab" / "histories"


class Labs:
    """Hands out the present lab, or a new one in place of one that went wrong."""

    def __init__(self) -> None:
        self._lab: Lab | None = None

    def present(self) -> Lab:
        if self._lab is None:
            self._lab = Lab(PLAN)
            self._lab.up()
        return self._lab

    def give_up(self) -> None:
        lab, self._lab = self._lab, None
        if lab is not None:
            lab.down()


@pytest.fixture(scope="module")
def labs() -> Iterator[Labs]:
    labs = Labs()
    try:
        yield labs
    finally:
        labs.give_up()


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.long) for seed in LONG] + list(SAMPLE)
)
def test_a_history_with_faults_keeps_every_promise(labs: Labs, seed: int, tmp_path: Path) -> None:
    labs.present()
    log = tmp_path / f"history-{seed}.jsonl"
    try:
        print("\n" + _recorded(seed, log))
    except BaseException:
        print(f"the history and the lab's logs are in {_keep(log)}")
        labs.give_up()
        raise


def _recorded(seed: int, log: Path) -> str:
    """Record a history and return what the judge says of it; fails for a broken promise.

    One that shows too little, since its writers heard more than usual, proves nothing: another is
    recorded.
    """
    for _ in range(TRIES_MAX):
        log.unlink(missing_ok=True)
        _checked(_done("record", "--seed", str(seed), "--log", str(log)))
        judged = _done("judge", str(log))
        if judged.returncode != TOO_LITTLE:
            break
    return _checked(judged)


def _checked(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}:\n{done.stdout}{done.stderr}"
    return done.stdout.rstrip()


def _done(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the histories, whatever comes of it."""
    return subprocess.run(
        (*COMMAND, *words),
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=HISTORY_LIMIT_S,
    )


def _keep(log: Path) -> Path:
    """Copy a history and the lab's logs to where no later lab overwrites them; returns where."""
    kept = KEPT_DIR / log.stem
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(LOG_DIR, kept)
    if log.exists():
        shutil.copyfile(log, kept / log.name)
    return kept
