"""The faults: all kinds come, and a blow falls on whom it is meant for, and is undone."""

from __future__ import annotations

import random
import ssl
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.histories.cell import CellStatus, Replica
from tests.histories.faults import BLOWS, Blow, CellSick, FaultDriver, pair_of
from tests.histories.https import Answer, Wire

NAMES = ("r1", "r2", "r3")


class SaidToLead(Wire):
    """Answers every question as a healthy replica would, of which one leads."""

    def __init__(self, leader: str) -> None:
        super().__init__(dict.fromkeys(NAMES, ""), ssl.create_default_context(), "")
        self._leader = leader

    def ask(
        self,
        replica: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: object,
        limit_s: float,
    ) -> Answer:
        return Answer(200, {}, {"leader": {"replica": self._leader} if self._leader else None})


@pytest.fixture
def processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    started = {name: subprocess.Popen(("sleep", "60")) for name in NAMES}
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def driver(processes: Mapping[str, subprocess.Popen[bytes]], leader: str) -> FaultDriver:
    replicas = tuple(Replica(name=n, url="", pid=p.pid) for n, p in processes.items())
    status = CellStatus(ca="", token="", replicas=replicas, members=())
    return FaultDriver(lambda: status, SaidToLead(leader), random.Random(1))


def state_of(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_hundred_histories_have_every_blow_and_many_pairs() -> None:
    pairs = [pair_of(seed) for seed in range(100)]
    times = Counter(blow.name for pair in pairs for blow in pair)
    assert set(times) == {blow.name for blow in BLOWS}
    assert min(times.values()) >= 10
    assert len({(one.name, other.name) for one, other in pairs}) == 100


def test_a_kill_falls_on_who_leads_and_on_nobody_else(
    processes: dict[str, subprocess.Popen[bytes]],
) -> None:
    (fault,) = driver(processes, "r2").strike(Blow(name="kill-leader", victims=("leader",)))
    assert (fault.program, fault.pid) == ("r2", processes["r2"].pid)
    assert processes["r2"].wait() == -9
    assert "T" not in {state_of(processes[name]) for name in ("r1", "r3")}


def test_what_is_stopped_goes_on(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    blow = Blow(name="stop-replicas", victims=("replicas",), stays_s=0.1)
    faults = driver(processes, "r1").strike(blow)
    assert [fault.program for fault in faults] == list(NAMES)
    assert all(fault.ended_ns - fault.began_ns >= 100_000_000 for fault in faults)
    # Whoever is told to go on is no longer stopped at once, whenever it gets a turn.
    assert "T" not in {state_of(each) for each in processes.values()}


def test_nothing_is_struck_while_nobody_leads(
    processes: dict[str, subprocess.Popen[bytes]],
) -> None:
    with pytest.raises(CellSick):
        driver(processes, "").strike(Blow(name="kill-leader", victims=("leader",)))
    assert all(each.poll() is None for each in processes.values())
