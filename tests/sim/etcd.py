"""Simulated etcd: its members and what goes wrong with each of them.

The state is the product's model of etcd; what is committed is told to an observer at once, with the
process whose request it was. Without a majority of members nobody answers. ``etcd_link.py`` is the
way from a replica's client to a member.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable

from msgspec import Struct

from controlplane.store.etcd_rpc import Event
from controlplane.store.model_etcd import LEASE_TTL_MIN_S, ModelEtcd
from controlplane.store.model_member import ModelMember
from shared.errors import OutcomeUnknown, StoreUnavailable, WatchLost
from tests.sim.process import later

# A new leader of etcd is there after its election timeout, one second or two after the old one.
ELECTION_MIN_S, ELECTION_MAX_S = 1.0, 2.0
# What a member answers without waiting for its log.
_IN_MEMORY = frozenset({"status", "alarms", "lease_keep_alive", "send_progress_request", "receive"})
_ON_WATCHES = frozenset({"send_progress_request", "receive"})

# The incarnation of the process whose request is being carried out.
WRITER: contextvars.ContextVar[str] = contextvars.ContextVar("writer", default="")


class Commit(Struct, frozen=True):
    """One revision of etcd; ``writer`` is the incarnation whose request made it."""

    revision: int
    writer: str
    events: tuple[Event, ...]


class EtcdHosts:
    """All members of one model cluster, and what is wrong with each."""

    def __init__(self, members: int, rng: random.Random, observe: Callable[[Commit], None]) -> None:
        self.model = _Model()
        self._rng = rng
        self._observe = observe
        self._seen = self.model.revision
        self._ready = asyncio.Event()
        self._ready.set()
        self.members = tuple(Member(self, number + 1, rng) for number in range(members))
        self.model.attach(self)

    async def close(self) -> None:
        self.model.detach(self)
        await self.model.close()

    # The model's watcher: told synchronously of each revision.

    def wake(self) -> None:
        for events in self.model.events_from(self._seen + 1):
            self._seen = events[0].kv.mod_revision
            self._observe(Commit(self._seen, WRITER.get(), events))

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

    def lose_requests(self, count: int) -> None:
        """Let the next requests to every member get lost before they are carried out."""
        for member in self.members:
            member.requests_to_lose = count

    def run_full(self) -> None:
        """Use up the quota: from now on nothing is added until an operator has made room."""
        self.model.full = True

    def make_room(self) -> None:
        self.model.disarm()

    def expire_leases(self, renewals_that_lie: int) -> None:
        """End every lease at once, as an etcd leader that was stuck may; see etcd issue 15247.

        So many renewals after that are answered as if nothing had been: etcd before 3.4.38 says
        so now and then.
        """
        self.model.renewals_that_lie = renewals_that_lie
        self.model.expire_all()

    def heal(self) -> None:
        self.make_room()
        self.model.renewals_that_lie = 0
        for index, member in enumerate(self.members):
            member.recover()
            if member.down:
                self.restart(index)
            if not member.running.is_set():
                self.resume(index)

    async def lose_data(self) -> None:
        """Lose every member's disk: what answers from now on is a new, empty cluster."""
        self.model.detach(self)
        await self.model.close()
        self.model = _Model()
        self._seen = self.model.revision
        for member in self.members:
            member.rpc = ModelMember(self.model, member.number, member)
        self.model.attach(self)

    async def quorum(self) -> None:
        """Wait until a majority has a leader."""
        await self._ready.wait()

    def disk_delay_s(self, member: Member) -> float:
        """Return how long a write waits at a member: for its own disk, and for the leader's."""
        leader = next(each for each in self.members if each.number == self.model.leader_id)
        return max(member.disk_delay_s(), leader.disk_delay_s())

    def _healthy(self) -> list[Member]:
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
        later(delay_s, self._elect)

    def _elect(self) -> None:
        healthy = self._healthy()
        if self._ready.is_set() or 2 * len(healthy) <= len(self.members):
            return
        self.model.change_leader(healthy[0].number)
        self._ready.set()


class _Model(ModelEtcd):
    """The model with leases that end before their time, and renewals that do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.renewals_that_lie = 0

    def expire_all(self) -> None:
        for lease_id in list(self._leases):
            self.revoke(lease_id)

    def keep_alive(self, lease_id: int) -> int:
        known = super().keep_alive(lease_id)
        if known or self.renewals_that_lie == 0:
            return known
        self.renewals_that_lie -= 1
        return LEASE_TTL_MIN_S


class Member:
    """One member's faults, in the form that the model takes them.

    ``slow_disk_s``: how long a write to its log takes, at least and at most. ``events_lost`` is the
    share of revisions that its watches leave out. Its watches say nothing unless they ``speak``.
    """

    def __init__(self, hosts: EtcdHosts, number: int, rng: random.Random) -> None:
        self.number = number
        self.host = f"etcd-{number}"
        self.down = False
        self.running = asyncio.Event()
        self.running.set()
        self.watches_speak = asyncio.Event()
        self.recover()
        self._hosts = hosts
        self._rng = rng
        self.rpc = ModelMember(hosts.model, number, self)

    def recover(self) -> None:
        """Have nothing wrong any more, but for being down or paused."""
        self.answers_to_lose = 0
        self.requests_to_lose = 0
        self.slow_disk_s: tuple[float, float] | None = None
        self.events_lost = 0.0
        self.watches_speak.set()
        self._stuck_at: int | None = None

    def fall_behind(self) -> None:
        """Read nothing that is newer than this moment."""
        self._stuck_at = self._hosts.model.revision

    def catch_up(self) -> None:
        self._stuck_at = None

    def disk_delay_s(self) -> float:
        return 0.0 if self.slow_disk_s is None else self._rng.uniform(*self.slow_disk_s)

    def loses_event(self) -> bool:
        return self.events_lost > 0 and self._rng.random() < self.events_lost

    async def before(self, call: str) -> None:
        self._refuse_when_down(call)
        if self.requests_to_lose > 0 and call not in _ON_WATCHES:
            self.requests_to_lose -= 1
            raise OutcomeUnknown("the request was lost")
        await self._until_it_works(call)
        if call not in _IN_MEMORY and (delay_s := self._hosts.disk_delay_s(self)) > 0:
            await asyncio.sleep(delay_s)
            await self._until_it_works(call)

    async def after(self, call: str) -> None:
        if self.down and call in _ON_WATCHES:
            raise WatchLost("the member is down")
        if self.down:
            raise OutcomeUnknown("the member went down before it answered")
        if call == "txn" and self.answers_to_lose > 0:
            self.answers_to_lose -= 1
            raise OutcomeUnknown("the answer was lost")

    def read_revision(self, revision: int) -> int:
        if self._stuck_at is None:
            return revision
        return max(self._stuck_at, self._hosts.model.compact_revision)

    async def _until_it_works(self, call: str) -> None:
        while True:
            self._refuse_when_down(call)
            if not self.running.is_set():
                await self.running.wait()
            elif call not in ("status", *_ON_WATCHES):
                await self._hosts.quorum()
                if self.running.is_set() and not self.down:
                    return
            else:
                return

    def _refuse_when_down(self, call: str) -> None:
        if not self.down:
            return
        if call in _ON_WATCHES:
            raise WatchLost("the member is down")
        raise StoreUnavailable("the member is down")
