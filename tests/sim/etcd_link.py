"""The way from a replica's etcd client to one member, across the simulated network.

A request outlives its client, as on a real wire: a cut may hold it back for a while and still
deliver it. A watch's messages arrive in order or not at all; a member may leave revisions out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec.structs import replace

from controlplane.store.etcd_rpc import (
    Alarm,
    Alarms,
    Compaction,
    Event,
    Lease,
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
from controlplane.store.model_member import ModelMember
from shared.errors import OutcomeUnknown, StoreUnavailable, WatchLost
from tests.sim.etcd import WRITER, Member
from tests.sim.network import Lost, Network
from tests.sim.process import Process, never_mind, outside

Result = TypeVar("Result")


class EtcdLink:
    """One member as one process reaches it: the port ``MemberRpc`` across the network."""

    def __init__(self, network: Network, process: Process, member: Member) -> None:
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

    async def compact(self, revision: int, deadline_s: float, physical: bool = False) -> Compaction:
        return await self._call(lambda rpc: rpc.compact(revision, deadline_s, physical), deadline_s)

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

    async def disarm(self, alarm: Alarm, deadline_s: float) -> None:
        await self._call(lambda rpc: rpc.disarm(alarm, deadline_s), deadline_s)

    async def defragment(self, deadline_s: float) -> None:
        await self._call(lambda rpc: rpc.defragment(deadline_s), deadline_s)

    async def watch(self, request: WatchStart, deadline_s: float) -> WatchStream:
        stream = await self._call(lambda rpc: rpc.watch(request, deadline_s), deadline_s)
        return _Watch(self._network, self._process, self._member, stream)

    async def close(self) -> None: ...

    async def _call(
        self, call: Callable[[ModelMember], Awaitable[Result]], deadline_s: float
    ) -> Result:
        self._process.check()
        if self._member.down and not self._cut():
            await asyncio.sleep(self._network.delay_s(self._process.host, self._member.host))
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
        WRITER.set(self._process.incarnation)
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
        self, network: Network, process: Process, member: Member, stream: WatchStream
    ) -> None:
        self._network = network
        self._process = process
        self._member = member
        self._stream = stream
        process.at_death(self._die)

    async def receive(self) -> WatchAnswer:
        self._process.check()
        answer = await self._stream.receive()
        await self._member.watches_speak.wait()
        await self._passage(self._member.host, self._process.host)
        self._process.check()
        return replace(answer, events=self._told(answer.events))

    async def send_progress_request(self) -> None:
        self._process.check()
        await self._passage(self._process.host, self._member.host)
        await self._stream.send_progress_request()

    async def close(self) -> None:
        await self._stream.close()

    def _told(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        """Return the events that the member does not leave out: all of a revision, or none."""
        revisions = dict.fromkeys(event.kv.mod_revision for event in events)
        lost = {revision for revision in revisions if self._member.loses_event()}
        self._process.missed_events = self._process.missed_events or bool(lost)
        return tuple(event for event in events if event.kv.mod_revision not in lost)

    def _die(self) -> None:
        outside(self._stream.close(), "watch-close")

    async def _passage(self, source: str, target: str) -> None:
        try:
            await self._network.passage(source, target)
        except Lost as lost:
            raise WatchLost(f"the connection broke: {lost}") from None
