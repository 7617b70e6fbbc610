"""Which etcd member is spoken to, and what a failed call means for the next one.

Owns the choice: one member at a time, kept until it fails; every change, also back to a member
that failed before, follows a passed probe (a linearizable read). Members answer only within short
attempt deadlines, a call within a bounded total. An answer of another cluster, or one older than
what was known when the call was sent, is no answer.

Never repeats a write whose outcome is unknown unless the caller says that repeating is harmless.
After etcd was restored from a backup its revisions go back: replicas must be started anew then.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from controlplane.store import keys
from controlplane.store.etcd_rpc import Header, MemberRpc, RangeOp
from shared.errors import NovacronError, OutcomeUnknown, StoreUnavailable
from shared.retry import Backoff

log = logging.getLogger(__name__)

# Between two rounds over the members; an election of etcd takes 1 to 2 s.
BACKOFF = Backoff(first_s=0.05, cap_s=0.5)


class Answered(Protocol):
    @property
    def header(self) -> Header: ...


Answer = TypeVar("Answer", bound=Answered)
Attempt = Callable[[MemberRpc, float], Awaitable[Answer]]


class Effect(enum.Enum):
    """What a second execution of the same call does."""

    READ = "read"  # nothing at all
    REPEATABLE = "repeatable"  # no harm: repeat it after an unknown outcome
    ONCE = "once"  # unknown to us: the caller must decide


class Limits(Struct, frozen=True):
    """``attempt_s`` finds a stopped member soon; ``total_s`` outlasts an election of etcd.

    ``watch_silence_s``: a watch that says nothing for so long is asked for a sign of life, and is
    dead after as long again. gRPC's own keep-alive does not notice a stopped member (60 s of
    silence were seen).
    """

    attempt_s: float = 0.5
    total_s: float = 3.0
    watch_silence_s: float = 1.0


class Members:
    """The members of one cluster, in the order of the configuration."""

    def __init__(self, members: Sequence[MemberRpc], limits: Limits, rng: random.Random) -> None:
        assert members, "a store has at least one member"
        self.all = tuple(members)
        self.limits = limits
        self._rng = rng
        self._current: MemberRpc | None = None
        self._choosing: asyncio.Task[None] | None = None
        self._start = 0
        self._cluster_id = 0
        self._raft_term = 0
        self._revision = 0

    async def call(
        self,
        attempt: Attempt[Answer],
        effect: Effect,
        *,
        linearizable: bool = True,
        revision_min: int = 0,
        attempt_s: float = 0.0,
    ) -> Answer:
        """Return the first good answer of a member; ``attempt_s`` is for slow calls.

        Raises StoreUnavailable (nothing happened), OutcomeUnknown, and etcd's refusals.
        """
        loop = asyncio.get_running_loop()
        limit_s = attempt_s or self.limits.attempt_s
        end = loop.time() + max(self.limits.total_s, limit_s)
        delays = BACKOFF.delays(self._rng)
        executed_maybe = False
        while True:
            try:
                member = await self.choose(end)
                deadline_s = min(limit_s, end - loop.time())
                if deadline_s <= 0:
                    raise StoreUnavailable("choosing an etcd member took all the time")
                return await self._attempt(member, attempt, deadline_s, linearizable, revision_min)
            except StoreUnavailable as error:
                problem: NovacronError = error
            except OutcomeUnknown as error:
                if effect is Effect.ONCE:
                    raise
                executed_maybe = True
                problem = error
            delay_s = next(delays)
            if loop.time() + delay_s >= end:
                break
            await asyncio.sleep(delay_s)
        if executed_maybe and effect is not Effect.READ:
            raise OutcomeUnknown(f"etcd did not answer in time: {problem}") from problem
        raise StoreUnavailable(f"no etcd member answered: {problem}") from problem

    async def choose(self, end: float) -> MemberRpc:
        """Return the member in use, or the first that passes a probe before the loop time ``end``.

        Raises StoreUnavailable.
        """
        if self._current is None:
            if self._choosing is None:
                self._choosing = asyncio.create_task(self._choose(), name="etcd-probe")
                self._choosing.add_done_callback(self._chosen)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await asyncio.shield(self._choosing)
        if self._current is None:
            raise StoreUnavailable("no etcd member passed a probe")
        return self._current

    def failed(self, member: MemberRpc, problem: Exception) -> None:
        """Give a member up until it passes a probe; the next choice begins after it."""
        if self._current is member:
            log.warning("etcd member %s is given up: %s", member.endpoint, problem)
            self._current = None
            self._start = self.all.index(member) + 1

    def verify_cluster(self, member: MemberRpc, header: Header) -> None:
        """Raise OutcomeUnknown when the answer came from another cluster than the first did."""
        self._cluster_id = self._cluster_id or header.cluster_id
        if header.cluster_id != self._cluster_id:
            raise OutcomeUnknown(
                f"etcd member {member.endpoint} is of cluster {header.cluster_id:x},"
                f" not {self._cluster_id:x}"
            )

    async def close(self) -> None:
        if self._choosing is not None:
            self._choosing.cancel()
            await asyncio.wait({self._choosing})
        for member in self.all:
            await member.close()

    async def _attempt(
        self,
        member: MemberRpc,
        attempt: Attempt[Answer],
        deadline_s: float,
        linearizable: bool = True,
        revision_min: int = 0,
    ) -> Answer:
        raft_term, revision = self._raft_term, max(self._revision, revision_min)
        try:
            answer = await attempt(member, deadline_s)
            header = answer.header
            self.verify_cluster(member, header)
            if linearizable and (header.raft_term < raft_term or header.revision < revision):
                raise OutcomeUnknown(
                    f"etcd member {member.endpoint} is behind: term {header.raft_term} revision"
                    f" {header.revision}, not {raft_term} and {revision}"
                )
        except (StoreUnavailable, OutcomeUnknown) as error:
            self.failed(member, error)
            raise
        if linearizable:
            self._raft_term = max(self._raft_term, header.raft_term)
            self._revision = max(self._revision, header.revision)
        return answer

    async def _choose(self) -> None:
        """Probe all members at once, the one given up last only when no other passes."""
        count = len(self.all)
        order = [self.all[(self._start + step) % count] for step in range(count)]
        for group in (order[:-1], order[-1:]):
            passed = await self._first_passing(group)
            if passed is not None:
                log.info("etcd member %s is used", passed.endpoint)
                self._current = passed
                return

    async def _first_passing(self, group: Sequence[MemberRpc]) -> MemberRpc | None:
        probes = [asyncio.create_task(self._passes(member)) for member in group]
        waiting = set(probes)
        try:
            while waiting:
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for member, probe in zip(group, probes, strict=True):
                    if probe.done() and probe.result():
                        return member
        finally:
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        return None

    async def _passes(self, member: MemberRpc) -> bool:
        try:
            await self._attempt(
                member,
                lambda probed, deadline_s: probed.range(RangeOp(keys.LEADER), deadline_s),
                self.limits.attempt_s,
            )
        except NovacronError as error:
            log.debug("etcd member %s did not pass a probe: %s", member.endpoint, error)
            return False
        return True

    def _chosen(self, task: asyncio.Task[None]) -> None:
        self._choosing = None
        if not task.cancelled() and task.exception() is not None:
            log.error("choosing an etcd member failed", exc_info=task.exception())
