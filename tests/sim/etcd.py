"""Simulated etcd: the members' failures, and the way from a replica's client to a member.

The state is the product's model of etcd; what is committed is told to an observer at once, with the
process whose request it was. A request outlives its client, as on a real wire: a cut may hold it
back for a while and still deliver it. Without a majority of members nobody answers.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec import Struct

from controlplane.store.etcd_rpc import (
    Alarms,
    Compaction,
    Event,
    Lease,
    MemberRpc,
    Ranged,
    RangeOp,
    Revoked,
    Status,
    Txn,
    TxnDone,
    WatchAnswer,
    WatchStart,
    WatchStream,
)
from controlplane.store.model_etcd import ModelEtcd
from controlplane.store.model_member import ModelMember
from shared.errors import OutcomeUnknown, StoreUnavailable, WatchLost
from tests.sim.network import Lost, Network
from tests.sim.process import Process, never_mind, outside

Result = TypeVar("Result")

# A new leader of etcd is there after its election timeout, one second or two after the old one.
ELECTION_MIN_S, ELECTION_MAX_S = 1.0, 2.0

_WRITER: contextvars.ContextVar[str] = contextvars.ContextVar("writer", default="")


class Commit(Struct, frozen=True):
    """One revision of etcd; ``writer`` is the incarnation whose request made it."""

    revision: int
    writer: str
    events: tuple[Event, ...]


class EtcdHosts:
    """All members of one model cluster, and what is wrong with each."""

    def __init__(
        self, members: int, rng: random.Random, network: Network, observe: Callable[[Commit], None]
    ) -> None:
        self.model = ModelEtcd()
        self._rng = rng
        self._network = network
        self._observe = observe
        self._seen = self.model.revision
        self._ready = asyncio.Event()
        self._ready.set()
        self.members = tuple(_Member(self, number + 1) for number in range(members))
        self.model.attach(self)

    def links(self, process: Process) -> tuple[MemberRpc, ...]:
        """Return the members as one replica's process reaches them."""
        return tuple(_Link(self._network, process, member) for member in self.members)

    async def close(self) -> None:
        self.model.detach(self)
        await self.model.close()

    # The model's watcher: told synchronously of each revision.

    def wake(self) -> None:
        for events in self.model.events_from(self._seen + 1):
            self._seen = events[0].kv.mod_revision
            self._observe(Commit(self._seen, _WRITER.get(), events))

    def catch_up(self) -> None: ...

    # What faults do.

    def crash(self, index: int) -> None:
        """Kill a member: its requests fail, its watches break, its data stays."""
        self.members[index].down = True
        self._lose_quorum_or_leader()

    def restart(self, index: int) -> None:
        self.members[index].down = False
        self._lose_quorum_or_leader()

    def pause(self, index: int) -> None:
        """Stop a member: it takes requests and answers nothing."""
        self.members[index].running.clear()
        self._lose_quorum_or_leader()

    def resume(self, index: int) -> None:
        self.members[index].running.set()
        self._lose_quorum_or_leader()

    def lose_answers(self, count: int) -> None:
        """Let the answers to the next transactions of every member get lost after they commit."""
        for member in self.members:
            member.answers_to_lose = count

    def heal(self) -> None:
        for index, member in enumerate(self.members):
            member.answers_to_lose = 0
            if member.down:
                self.restart(index)
            if not member.running.is_set():
                self.resume(index)

    async def lose_data(self) -> None:
        """Lose every member's disk: what answers from now on is a new, empty cluster."""
        self.model.detach(self)
        await self.model.close()
        self.model = ModelEtcd()
        self._seen = self.model.revision
        for member in self.members:
            member.rpc = ModelMember(self.model, member.number, member)
        self.model.attach(self)

    async def quorum(self) -> None:
        """Wait until a majority has a leader."""
        await self._ready.wait()

    def _healthy(self) -> list[_Member]:
        return [each for each in self.members if not each.down and each.running.is_set()]

    def _lose_quorum_or_leader(self) -> None:
        healthy = self._healthy()
        if 2 * len(healthy) <= len(self.members):
            self._ready.clear()
        elif not any(each.number == self.model.leader_id for each in healthy):
            self._ready.clear()
            self._elect_later()
        elif not self._ready.is_set():
            self._elect_later()

    def _elect_later(self) -> None:
        delay_s = self._rng.uniform(ELECTION_MIN_S, ELECTION_MAX_S)
        asyncio.get_running_loop().call_later(delay_s, self._elect)

    def _elect(self) -> None:
        healthy = self._healthy()
        if self._ready.is_set() or 2 * len(healthy) <= len(self.members):
            return
        self.model.change_leader(healthy[0].number)
        self._ready.set()


class _Member:
    """One member's faults, in the form that the model takes them."""

    def __init__(self, hosts: EtcdHosts, number: int) -> None:
        self.number = number
        self.host = f"etcd-{number}"
        self.down = False
        self.running = asyncio.Event()
        self.running.set()
        self.answers_to_lose = 0
        self._hosts = hosts
        self.rpc = ModelMember(hosts.model, number, self)

    async def before(self, call: str) -> None:
        while True:
            self._refuse_when_down(call)
            if not self.running.is_set():
                await self.running.wait()
            elif call not in ("status", "send_progress_request", "receive"):
                await self._hosts.quorum()
                if self.running.is_set() and not self.down:
                    return
            else:
                return

    async def after(self, call: str) -> None:
        if self.down and call in ("receive", "send_progress_request"):
            raise WatchLost("the member is down")
        if self.down:
            raise OutcomeUnknown("the member went down before it answered")
        if call == "txn" and self.answers_to_lose > 0:
            self.answers_to_lose -= 1
            raise OutcomeUnknown("the answer was lost")

    def read_revision(self, revision: int) -> int:
        return revision

    def _refuse_when_down(self, call: str) -> None:
        if not self.down:
            return
        if call in ("receive", "send_progress_request"):
            raise WatchLost("the member is down")
        raise StoreUnavailable("the member is down")


class _Link:
    """One member as one process reaches it: the port ``MemberRpc`` across the network."""

    def __init__(self, network: Network, process: Process, member: _Member) -> None:
        self._network = network
        self._process = process
        self._member = member

    @property
    def endpoint(self) -> str:
        return self._member.host

    async def range(self, request: RangeOp, deadline_s: float) -> Ranged:
        return await self._call(lambda rpc: rpc.range(request, deadline_s), deadline_s)

    async def txn(self, request: Txn, deadline_s: float) -> TxnDone:
        return await self._call(lambda rpc: rpc.txn(request, deadline_s), deadline_s)

    async def compact(self, revision: int, deadline_s: float) -> Compaction:
        return await self._call(lambda rpc: rpc.compact(revision, deadline_s), deadline_s)

    async def lease_grant(self, ttl_s: int, deadline_s: float) -> Lease:
        return await self._call(lambda rpc: rpc.lease_grant(ttl_s, deadline_s), deadline_s)

    async def lease_revoke(self, lease: int, deadline_s: float) -> Revoked:
        return await self._call(lambda rpc: rpc.lease_revoke(lease, deadline_s), deadline_s)

    async def lease_keep_alive(self, lease: int, deadline_s: float) -> Lease:
        return await self._call(lambda rpc: rpc.lease_keep_alive(lease, deadline_s), deadline_s)

    async def status(self, deadline_s: float) -> Status:
        return await self._call(lambda rpc: rpc.status(deadline_s), deadline_s)

    async def alarms(self, deadline_s: float) -> Alarms:
        return await self._call(lambda rpc: rpc.alarms(deadline_s), deadline_s)

    async def watch(self, request: WatchStart, deadline_s: float) -> WatchStream:
        stream = await self._call(lambda rpc: rpc.watch(request, deadline_s), deadline_s)
        return _Watch(self._network, self._process, self._member, stream)

    async def close(self) -> None: ...

    async def _call(
        self, call: Callable[[ModelMember], Awaitable[Result]], deadline_s: float
    ) -> Result:
        self._process.check()
        if self._member.down and not self._cut():
            await asyncio.sleep(self._network.delay_s())
            raise StoreUnavailable(f"{self.endpoint} refuses the connection")
        request = outside(self._across(call), f"{self.endpoint}-request")
        request.add_done_callback(never_mind)
        done, _ = await asyncio.wait({request}, timeout=max(deadline_s, 0))
        self._process.check()
        if not done:
            raise OutcomeUnknown(f"no answer of etcd member {self.endpoint}: deadline")
        return request.result()

    async def _across(self, call: Callable[[ModelMember], Awaitable[Result]]) -> Result:
        host, member = self._process.host, self._member.host
        _WRITER.set(self._process.incarnation)
        try:
            await self._network.passage(host, member)
            result = await call(self._member.rpc)
            await self._network.passage(member, host)
        except Lost as lost:
            raise OutcomeUnknown(f"the connection broke: {lost}") from None
        return result

    def _cut(self) -> bool:
        one, other = self._process.host, self._member.host
        return self._network.is_cut(one, other) or self._network.is_cut(other, one)


class _Watch:
    """A watch stream across the network: a cut holds its messages back, in order."""

    def __init__(
        self, network: Network, process: Process, member: _Member, stream: WatchStream
    ) -> None:
        self._network = network
        self._process = process
        self._member = member
        self._stream = stream
        process.at_death(self._die)

    async def receive(self) -> WatchAnswer:
        self._process.check()
        answer = await self._stream.receive()
        await self._passage(self._member.host, self._process.host)
        self._process.check()
        return answer

    async def send_progress_request(self) -> None:
        self._process.check()
        await self._passage(self._process.host, self._member.host)
        await self._stream.send_progress_request()

    async def close(self) -> None:
        await self._stream.close()

    def _die(self) -> None:
        outside(self._stream.close(), "watch-close")

    async def _passage(self, source: str, target: str) -> None:
        try:
            await self._network.passage(source, target)
        except Lost as lost:
            raise WatchLost(f"the connection broke: {lost}") from None
