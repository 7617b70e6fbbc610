"""Does faults to a cell: signals to processes whose pids it was told, and to nothing else.

Each blow is struck at whoever has a part at the moment (leads, follows), and is over when what was
stopped goes on, what was killed has been started anew by the cell's supervisor, and all answer.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import time
from collections.abc import Callable

from msgspec import Struct

from tests.histories.cell import CellStatus, Member
from tests.histories.https import NeverSent, NoAnswer, Wire
from tests.histories.record import Fault

# A replica that died is back within seconds, a member of etcd too unless its log is long.
RECOVERY_LIMIT_S = 60.0
POLL_S = 0.1
ASK_LIMIT_S = 1.0


class Blow(Struct, frozen=True, kw_only=True):
    """``victims``: parts, each by a word; ``stays_s``: until the stopped go on, None: they die.

    Replicas: ``leader``, ``follower``, ``replicas`` (all). Members of etcd: ``etcd-leader``,
    ``etcd-follower``, ``etcd-any``, ``etcd-majority``. ``times``: how often in a row, each time at
    whoever has the part then.
    """

    name: str
    victims: tuple[str, ...]
    stays_s: float | None = None
    times: int = 1


# Each stop of the member that a leader talks to may cost it one answer: it outlasts the half second
# that a replica waits for one.
STUTTERS = 8
STUTTER_S = 0.8
# A leader's lease lasts 5 s: one that is stopped for longer has a successor when it goes on, and
# does not know it. etcd elects anew after one to two seconds without its leader.
BLOWS = (
    Blow(name="kill-leader", victims=("leader",)),
    Blow(name="stop-leader", victims=("leader",), stays_s=10.0),
    Blow(name="stop-leader-shortly", victims=("leader",), stays_s=2.0),
    Blow(name="stop-leader-about-a-lease", victims=("leader",), stays_s=5.2),
    Blow(name="kill-follower", victims=("follower",)),
    Blow(name="stop-follower", victims=("follower",), stays_s=4.0),
    Blow(name="kill-replicas", victims=("replicas",)),
    Blow(name="kill-etcd-leader", victims=("etcd-leader",)),
    Blow(name="stop-etcd-leader", victims=("etcd-leader",), stays_s=4.0),
    Blow(name="kill-etcd-follower", victims=("etcd-follower",)),
    Blow(name="stop-etcd-follower", victims=("etcd-follower",), stays_s=4.0),
    Blow(name="stutter-etcd", victims=("etcd-any",), stays_s=STUTTER_S, times=STUTTERS),
    Blow(name="kill-etcd-majority", victims=("etcd-majority",)),
    Blow(name="stop-etcd-majority", victims=("etcd-majority",), stays_s=3.0),
    Blow(name="kill-both-leaders", victims=("leader", "etcd-leader")),
    Blow(name="stop-both-leaders", victims=("leader", "etcd-leader"), stays_s=6.0),
)


class CellSick(Exception):
    """The cell is not, or no more, what a fault is to be done to."""


class Victim(Struct, frozen=True):
    name: str
    pid: int


def pair_of(seed: int) -> tuple[Blow, Blow]:
    """Return the two blows of a history: all pairs come, each blow as often as any other."""
    first = seed % len(BLOWS)
    second = (first + seed // len(BLOWS)) % len(BLOWS)
    return BLOWS[first], BLOWS[second]


class FaultDriver:
    """``wire`` is for questions to the API alone."""

    def __init__(self, status: Callable[[], CellStatus], wire: Wire, rng: random.Random) -> None:
        self._status = status
        self._wire = wire
        self._rng = rng

    def strike(self, blow: Blow) -> list[Fault]:
        """Do a fault; return once it is over and all is well. Raises CellSick."""
        began_ns = time.monotonic_ns()
        struck: list[Victim] = []
        for _ in range(blow.times):
            struck += self._strike(blow)
        self.wait_until_well()
        ended_ns = time.monotonic_ns()
        return [
            Fault(
                blow=blow.name,
                program=victim.name,
                pid=victim.pid,
                began_ns=began_ns,
                ended_ns=ended_ns,
            )
            for victim in dict.fromkeys(struck)
        ]

    def _strike(self, blow: Blow) -> list[Victim]:
        """Strike once; return whom, once what was stopped goes on."""
        victims = [victim for word in blow.victims for victim in self._victims(word)]
        number = signal.SIGKILL if blow.stays_s is None else signal.SIGSTOP
        struck: list[Victim] = []
        try:
            for victim in victims:
                os.kill(victim.pid, number)
                struck.append(victim)
            if blow.stays_s is not None:
                time.sleep(blow.stays_s)
        finally:
            if blow.stays_s is not None:
                for victim in struck:
                    os.kill(victim.pid, signal.SIGCONT)
        return struck

    def wait_until_well(self) -> None:
        """Return once every part answers, and somebody leads. Raises CellSick."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        while (ill := self._ill()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if ill:
            raise CellSick(f"after {RECOVERY_LIMIT_S:.0f} s: {ill}")

    def _ill(self) -> str:
        """Return what is wrong with the cell; empty when it is well."""
        for member in self._status().members:
            if member.pid is None or not _serves(member):
                return f"{member.name} does not serve"
        for replica in self._wire.replicas():
            if self._answer(replica, "/healthz") is None:
                return f"{replica} does not answer"
        return "" if self._leader() else "nobody leads"

    def _victims(self, word: str) -> list[Victim]:
        status = self._status()
        pids = {each.name: each.pid for each in status.replicas}
        pids |= {each.name: each.pid for each in status.members}
        found = []
        for name in self._names(word, status):
            pid = pids[name]
            if pid is None:
                raise CellSick(f"{name} does not run")
            found.append(Victim(name, pid))
        return found

    def _names(self, word: str, status: CellStatus) -> list[str]:
        replicas = [each.name for each in status.replicas]
        if word == "replicas":
            return replicas
        if word in ("leader", "follower"):
            leader = self._leader()
            if not leader:
                raise CellSick("nobody leads")
            others = [name for name in replicas if name != leader]
            return [leader] if word == "leader" else [self._rng.choice(others)]
        if word == "etcd-any":
            return [self._rng.choice([each.name for each in status.members])]
        leader = _etcd_leader(status)
        others = [each.name for each in status.members if each.name != leader]
        if word == "etcd-majority":
            return [leader, *others[: len(status.members) // 2]]
        return [leader] if word == "etcd-leader" else [self._rng.choice(others)]

    def _leader(self) -> str:
        """Return the name of the replica that leads, as one of them says; empty for none."""
        for replica in self._wire.replicas():
            body = self._answer(replica, "/api/v1/cluster")
            leader = body.get("leader") if isinstance(body, dict) else None
            if leader:
                return str(leader["replica"])
        return ""

    def _answer(self, replica: str, path: str) -> object:
        try:
            answer = self._wire.ask(replica, "GET", path, {}, None, ASK_LIMIT_S)
        except (NeverSent, NoAnswer):
            return None
        return answer.body if answer.status == http.HTTPStatus.OK else None


def _serves(member: Member) -> bool:
    """Tell whether a member of etcd answers and has a leader."""
    found = _etcd(member, "GET", "/health")
    return found is not None and found.get("health") == "true"


def _etcd_leader(status: CellStatus) -> str:
    """Return the name of the member that leads. Raises CellSick."""
    for member in status.members:
        found = _etcd(member, "POST", "/v3/maintenance/status")
        header = found.get("header") if found is not None else None
        if found and isinstance(header, dict) and found.get("leader") == header.get("member_id"):
            return member.name
    raise CellSick("no member of etcd says that it leads")


def _etcd(member: Member, method: str, path: str) -> dict[str, object] | None:
    connection = http.client.HTTPConnection(member.endpoint, timeout=ASK_LIMIT_S)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None)
        found = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return found if isinstance(found, dict) else None
