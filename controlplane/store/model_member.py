"""One member of a model cluster, as a client meets it: ``ModelMember`` is the port ``MemberRpc``.

Faults are handed in and surround every call. A request lives on when its client gives up, so what
is delayed may still be executed later, as with real etcd. It waits only on the loop's clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from controlplane.store.etcd_rpc import (
    NO_SPACE,
    Alarm,
    Alarms,
    Compaction,
    Event,
    Header,
    Lease,
    Ranged,
    RangeOp,
    Revoked,
    Status,
    Txn,
    TxnDone,
    WatchAnswer,
    WatchStart,
)
from controlplane.store.model_etcd import ModelEtcd
from shared.errors import OutcomeUnknown, WatchLost

# etcd sends a watch that catches up this many revisions in one message.
WATCH_REVISIONS_MAX = 1_000
MODEL_VERSION = "3.4.0-model"

Result = TypeVar("Result")


class Faults(Protocol):
    """What may go wrong at one member; ``call`` is a method of MemberRpc or WatchStream.

    ``before`` and ``after`` surround the execution. To sleep is a slow or stopped member (in
    ``before`` the request is executed late, in ``after`` the answer comes late); to raise
    StoreUnavailable in ``before`` is a member that is down, OutcomeUnknown a lost request or
    answer, WatchLost (calls ``receive`` and ``send_progress_request``) a broken stream.
    """

    async def before(self, call: str) -> None: ...

    async def after(self, call: str) -> None: ...

    def read_revision(self, revision: int) -> int:
        """Return the revision that this member takes for the newest: lower ones are stale."""
        ...


class NoFaults:
    async def before(self, call: str) -> None: ...

    async def after(self, call: str) -> None: ...

    def read_revision(self, revision: int) -> int:
        return revision


class ModelMember:
    """One member of a model cluster: the port ``MemberRpc``."""

    def __init__(self, model: ModelEtcd, member_id: int, faults: Faults | None = None) -> None:
        self._model = model
        self._id = member_id
        self._faults = faults or NoFaults()
        model.has_member(member_id)

    @property
    def endpoint(self) -> str:
        return f"model-{self._id}"

    async def range(self, request: RangeOp, deadline_s: float) -> Ranged:
        def execute() -> Ranged:
            newest = self._faults.read_revision(self._model.revision)
            items, more, count = self._model.range(request, newest)
            return Ranged(self._header(newest), items, more, count)

        return await self._call("range", execute, deadline_s)

    async def txn(self, request: Txn, deadline_s: float) -> TxnDone:
        def execute() -> TxnDone:
            succeeded, reads = self._model.txn(request)
            return TxnDone(self._header(), succeeded, reads)

        return await self._call("txn", execute, deadline_s)

    async def compact(self, revision: int, deadline_s: float, physical: bool = False) -> Compaction:
        def execute() -> Compaction:
            self._model.compact(revision)
            return Compaction(self._header())

        return await self._call("compact", execute, deadline_s)

    async def lease_grant(self, ttl_s: int, deadline_s: float) -> Lease:
        def execute() -> Lease:
            lease_id, granted_s = self._model.grant(ttl_s)
            return Lease(self._header(), lease_id, granted_s)

        return await self._call("lease_grant", execute, deadline_s)

    async def lease_revoke(self, lease: int, deadline_s: float) -> Revoked:
        def execute() -> Revoked:
            self._model.revoke(lease)
            return Revoked(self._header())

        return await self._call("lease_revoke", execute, deadline_s)

    async def lease_keep_alive(self, lease: int, deadline_s: float) -> Lease:
        def execute() -> Lease:
            return Lease(self._header(), lease, self._model.keep_alive(lease))

        return await self._call("lease_keep_alive", execute, deadline_s)

    async def status(self, deadline_s: float) -> Status:
        def execute() -> Status:
            model = self._model
            size, in_use = model.file_bytes(self._id), model.in_use_bytes
            return Status(self._header(), MODEL_VERSION, model.leader_id, size, in_use)

        return await self._call("status", execute, deadline_s)

    async def alarms(self, deadline_s: float) -> Alarms:
        def execute() -> Alarms:
            alarms = (Alarm(self._model.leader_id, NO_SPACE),) if self._model.full else ()
            return Alarms(self._header(), alarms)

        return await self._call("alarms", execute, deadline_s)

    async def disarm(self, alarm: Alarm, deadline_s: float) -> None:
        await self._call("disarm", self._model.disarm, deadline_s)

    async def defragment(self, deadline_s: float) -> None:
        await self._call("defragment", lambda: self._model.defragment(self._id), deadline_s)

    async def watch(self, request: WatchStart, deadline_s: float) -> ModelWatch:
        def execute() -> ModelWatch:
            return ModelWatch(self._model, self._id, self._faults, request)

        return await self._call("watch", execute, deadline_s)

    async def close(self) -> None: ...

    def _header(self, revision: int = 0) -> Header:
        return self._model.header(self._id, revision)

    async def _call(self, name: str, execute: Callable[[], Result], deadline_s: float) -> Result:
        """Wait for the request until the deadline; the request itself goes on after it."""

        async def request() -> Result:
            await self._faults.before(name)
            result = execute()
            await self._faults.after(name)
            return result

        task = asyncio.create_task(request(), name=f"{self.endpoint}-{name}")
        self._model.serve(task)
        done, _ = await asyncio.wait({task}, timeout=max(deadline_s, 0))
        if not done:
            raise OutcomeUnknown(f"no answer of etcd member {self.endpoint}: deadline")
        return task.result()


class ModelWatch:
    """A watch stream of a model member; it reads the model's history at its own pace.

    As etcd 3.4 does, it answers a progress request with the store's revision even when events up
    to there have not been delivered yet.
    """

    def __init__(
        self, model: ModelEtcd, member_id: int, faults: Faults, request: WatchStart
    ) -> None:
        self._model = model
        self._id = member_id
        self._faults = faults
        self._request = request
        self._next = request.start_revision or model.revision + 1
        self._created = False
        self._progress = 0
        self._closed = False
        self._changed = asyncio.Event()
        model.attach(self)

    def wake(self) -> None:
        self._changed.set()

    def catch_up(self) -> None:
        if not self._created or self._next < self._model.compact_revision:
            return
        for events in self._model.events_from(self._next):
            if self._mine(events):
                self._next = events[0].kv.mod_revision
                return
        self._next = max(self._next, self._model.revision + 1)

    async def receive(self) -> WatchAnswer:
        while not self._closed:
            self._changed.clear()
            if self._ready():
                await self._faults.before("receive")
                answer = self._answer()
                await self._faults.after("receive")
                if answer is not None:
                    return answer
                continue
            await self._changed.wait()
        raise WatchLost(f"the watch of model-{self._id} was closed")

    async def send_progress_request(self) -> None:
        await self._faults.before("send_progress_request")
        self._progress += 1
        self.wake()
        await self._faults.after("send_progress_request")

    async def close(self) -> None:
        self._closed = True
        self._model.detach(self)
        self.wake()

    def _ready(self) -> bool:
        self.catch_up()
        return not self._created or self._progress > 0 or self._next <= self._model.revision

    def _answer(self) -> WatchAnswer | None:
        header = self._model.header(self._id)
        compacted = self._model.compact_revision
        if not self._created:
            self._created = True
            return WatchAnswer(header, created=True)
        if self._next < compacted:
            return WatchAnswer(header, canceled=True, compact_revision=compacted)
        if self._progress:
            self._progress -= 1
            return WatchAnswer(header)
        events: list[Event] = []
        for revision in self._model.events_from(self._next)[:WATCH_REVISIONS_MAX]:
            events += self._mine(revision)
        if not events:
            return None
        self._next = events[-1].kv.mod_revision + 1
        return WatchAnswer(header, events=tuple(events))

    def _mine(self, events: tuple[Event, ...]) -> list[Event]:
        start, end = self._request.key, self._request.range_end
        return [event for event in events if start <= event.kv.key < end]
