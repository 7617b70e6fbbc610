"""Replicas that ask each other: what is answered, to whom, and what is made of the answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.commands.draft import Command
from controlplane.commands.nodes import SetCordon
from controlplane.reconcilers.history import CopyHistory
from controlplane.sessions.following import Following
from controlplane.sessions.peer_messages import (
    AgentList,
    Exchange,
    Exchanged,
    FiguresRead,
    PeerAnswer,
    PeerRefused,
    PeerRequest,
    ReadFigures,
    ReadHistory,
    Segment,
    Submit,
    Submitted,
)
from controlplane.sessions.peer_reads import PeerReads
from controlplane.sessions.peers import PeerAnswers
from controlplane.store.history import History, Reach
from controlplane.telemetry.progress import ProgressBoard
from controlplane.telemetry.windows import Windows
from shared.errors import Disconnected, NoLeader, RecordUnreadable, Unavailable
from shared.model import Event, Sample
from shared.offload import inline
from shared.protocol import Query
from shared.tls import Identity, Role
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN, CELL, USER, CoreWorld, HandClock

R2 = Identity(CELL, Role.REPLICA, "r2")
CORDON = SetCordon(node_id="node-1", cordoned=True, reason="", by=USER)


class Replica:
    """One replica as its peers see it; ``peers`` are those that it asks itself."""

    def __init__(self, name: str, *, leads: bool = False) -> None:
        self.name = name
        self.core = CoreWorld()
        self.state = self.core.state
        self.leads = leads
        self.history = History(None, inline)
        self.windows = Windows()
        self.progress = ProgressBoard(HandClock())
        self.agents = AgentList(name="1", versions={"node-1": "0.2.0"})
        self.peers: dict[str, Replica | None] = {}
        self.server = PeerAnswers(
            CELL, self, self.state, self.history, self.windows, self.progress, lambda: self.agents
        )
        self.reads = PeerReads(self.windows, lambda: tuple(self.peers), self.call)
        self.copy = CopyHistory(self.state, self.history, self.reads)

    async def submit(self, command: Command[Any], limit_s: float) -> Any:
        if not self.leads:
            raise NoLeader("not here")
        return self.core.apply(command)

    async def ask(self, node_id: str, query: Query) -> bytes:
        return node_id.encode()

    async def call(self, address: str, request: PeerRequest, limit_s: float) -> PeerAnswer:
        peer = self.peers[address]
        if peer is None:
            raise Disconnected("it is down")
        return await peer.server.answer(request, Identity(CELL, Role.REPLICA, self.name))

    def events(self, first: int, last: int) -> None:
        """Have these entries of history in etcd's part, and no others."""
        self.state.history.clear()
        for seq in range(first, last + 1):
            self.state.put_history(event(seq))


def event(seq: int) -> Event:
    return Event(seq=seq, id=f"event-{seq}", kind="k", object="o", at=BORN, by="b")


def sample(object_id: str, at: float, memory_bytes: float) -> Sample:
    return Sample(object=object_id, at=at, memory_bytes=memory_bytes)


async def test_only_a_replica_of_this_cell_is_answered() -> None:
    leader = Replica("r1", leads=True)
    order = Submit(command=CORDON, limit_s=1.0)
    for stranger in (Identity(CELL, Role.AGENT, "n1"), Identity("zzzzzz", Role.REPLICA, "r2")):
        answer = await leader.server.answer(order, stranger)
        assert isinstance(answer, PeerRefused)
        assert answer.problem.code == "forbidden"
    forged = await leader.server.answer(Exchange(replica="r3", copied_seq=9), R2)
    assert isinstance(forged, PeerRefused)
    assert leader.server.copied.by("r3") == 0


async def test_a_command_is_committed_on_its_terms() -> None:
    leader = Replica("r1", leads=True)
    node_id = leader.core.join("n1")
    order = Submit(command=replace(CORDON, node_id=node_id), limit_s=1.0)
    answer = await leader.server.answer(order, R2)
    assert answer == Submitted(result=node_id, replayed=False, revision=leader.state.revision)
    again = await leader.server.answer(order, R2)
    assert isinstance(again, PeerRefused)
    assert (again.problem.code, again.revision) == ("state_conflict", leader.state.revision)
    leader.leads = False
    nobody = await leader.server.answer(order, R2)
    assert isinstance(nobody, PeerRefused)
    assert (nobody.problem.code, nobody.problem.retryable) == ("no_leader", True)


def test_a_follower_tells_its_copy_and_learns_what_only_the_leader_knows() -> None:
    async def main() -> None:
        leader, follower = Replica("r1", leads=True), Replica("r2")
        follower.peers["r1"] = leader
        following = Following("r2", lambda: "r1", lambda: 41, follower.progress, follower.call)
        running = asyncio.ensure_future(following.run())
        reader = follower.progress.subscribe()
        leader.progress.put("op-1", 12.5)
        await asyncio.sleep(3)
        assert leader.server.copied.by("r2") == 41
        assert following.agents == leader.agents
        told = follower.progress.latest("op-1")
        assert told == leader.progress.latest("op-1")
        assert [frame.operation for frame in reader.take()] == ["op-1"]
        await asyncio.sleep(3)
        assert reader.take() == (), "what has not moved is not told again"
        leader.agents = AgentList(name="2", versions={})
        follower.peers["r1"] = None
        await asyncio.sleep(3)
        follower.peers["r1"] = leader
        await asyncio.sleep(3)
        assert following.agents == leader.agents
        running.cancel()

    run_virtual(main())


async def test_agents_that_are_known_are_not_told_again() -> None:
    leader = Replica("r1", leads=True)
    new = await leader.server.answer(Exchange(replica="r2", copied_seq=0), R2)
    assert new == Exchanged(progress=(), agents=leader.agents)
    known = Exchange(replica="r2", copied_seq=0, agents_seen="1")
    assert await leader.server.answer(known, R2) == Exchanged(progress=(), agents=None)


async def test_figures_come_from_whichever_replica_has_the_newest() -> None:
    one, two, down = Replica("r1"), Replica("r2"), None
    one.peers = {"r2": two, "r3": down}
    for at in (0.0, 5.0):
        one.windows.add(sample("vm-1", at, 1.0))
        two.windows.add(sample("vm-2", at, 2.0))
    for at in (10.0, 15.0, 20.0):
        two.windows.add(sample("vm-1", at, 3.0))
    latest = await one.reads.latest(("vm-1", "vm-2", "vm-3"))
    assert {k: (r.at, r.memory_bytes) for k, r in latest.items()} == {
        "vm-1": (20.0, 3.0),
        "vm-2": (5.0, 2.0),
    }
    series = await one.reads.series("vm-1")
    assert series is not None
    assert (series.as_of, len(series.points)) == (20.0, 2)
    assert await one.reads.series("vm-3") is None
    read = await two.server.answer(ReadFigures(objects=("vm-1", "vm-3")), R2)
    assert isinstance(read, FiguresRead)
    assert list(read.latest) == ["vm-1"]


async def test_a_replica_that_was_away_fills_its_copy_from_a_peer() -> None:
    one, two = Replica("r1"), Replica("r2")
    await two.history.append([event(seq) for seq in range(1, 2501)])
    one.peers = {"r3": None, "r2": two}
    await one.history.append([event(seq) for seq in range(1, 11)])
    one.events(2501, 2510)
    with pytest.raises(Unavailable, match="does not tell"):
        await Replica("r9").reads.__class__(one.windows, lambda: ("r3",), one.call).segment(10, 20)
    await one.copy.reconcile()
    assert one.copy.copied_seq == 2510
    assert await one.history.reach() == Reach(1, 2510)
    await one.history.close()
    await two.history.close()


async def test_what_no_peer_has_is_left_out() -> None:
    one, two = Replica("r1"), Replica("r2")
    await two.history.append([event(seq) for seq in range(101, 201)])
    one.peers = {"r2": two}
    await one.history.append([event(seq) for seq in range(1, 11)])
    one.events(301, 310)
    await one.copy.reconcile()
    assert one.copy.copied_seq == 310
    # 101 to 200 came from the peer; what is before and behind that is nowhere.
    assert await one.history.reach() == Reach(301, 310)
    found = await one.history.segment(300, 310, 100)
    assert [entry.seq for entry in found] == list(range(301, 311))
    await one.history.close()
    await two.history.close()


async def test_what_a_peer_has_is_found_however_far_behind_it_begins() -> None:
    one, two = Replica("r1"), Replica("r2")
    far = 5_000_000
    # What was before is 30 days old; and a restore let the numbers jump.
    await two.history.append([event(seq) for seq in range(40_001, 41_501)])
    await two.history.append([event(seq) for seq in range(far + 1, far + 11)])
    one.peers = {"r2": two}
    one.events(far + 6, far + 10)
    await one.copy.reconcile()
    assert one.copy.copied_seq == far + 10
    assert await one.history.reach() == Reach(far + 1, far + 10)
    early = await one.history.segment(0, far, 2000)
    assert [entry.seq for entry in early] == list(range(40_001, 41_501))
    await one.history.close()
    await two.history.close()


async def test_a_copy_waits_for_a_peer_that_may_have_the_rest() -> None:
    one, two = Replica("r1"), Replica("r2")
    one.peers = {"r2": None}
    await one.history.append([event(1)])
    one.events(10, 12)
    with pytest.raises(Unavailable):
        await one.copy.reconcile()
    assert one.copy.copied_seq == 1
    await two.history.append([event(seq) for seq in range(1, 10)])
    one.peers = {"r2": two}
    await one.copy.reconcile()
    assert await one.history.reach() == Reach(1, 12)
    await one.history.close()
    await two.history.close()


async def test_a_damaged_segment_is_not_taken() -> None:
    two = Replica("r2")
    await two.history.append([event(1), event(2)])
    answer = await two.server.answer(ReadHistory(after=0, until=5), R2)
    assert isinstance(answer, Segment)
    assert [entry.seq for entry in answer.entries()] == [1, 2]
    with pytest.raises(RecordUnreadable, match="checksum"):
        replace(answer, packed=answer.packed[:-1] + b"x").entries()
    await two.history.close()
