"""Who leads: one campaign after the other, and the watch over a term that was won.

A lease keeps the leader key; its create revision is the term. The lease is renewed on a task of its
own. ``suspend_after_s`` after the last good renewal was *sent*, on a clock that counts suspension,
writes stop; they go on in the same term only if key and lease are read back as our own. Safety
never rests on this: every commit compares the key. A replica that finds a key of its own name while
it campaigns resigns it at once: the lock on its data directory says that no other process holds it.
One whose release is too old for the cluster's records only follows. Followers stand as soon as the
watch shows them that the key is gone: who stops, or steps down, resigns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable

from msgspec import Struct
from msgspec.structs import replace

from controlplane.store import keys
from controlplane.store.port import KeyValue, Store
from shared.clock import Clock
from shared.codec import pack, unpack
from shared.errors import LeadershipLost, NovacronError, RecordUnreadable, ReleaseTooOld
from shared.model import LeaderKey

log = logging.getLogger(__name__)

# After a failure a campaign is tried again after up to this long: the store needs room, and
# replicas that fail together must not go on together.
CAMPAIGN_JITTER_S = 0.5
# For so long a replica that stepped down leaves the key to the others. They take it within
# milliseconds, or, while etcd itself elects, within 2 s; where nobody else is, it leads again.
STAND_BACK_S = 3.0
# On the way out; without an answer the lease ends the term soon enough.
RESIGN_TIMEOUT_S = 1.0


class ElectionSettings(Struct, frozen=True, kw_only=True):
    """The lease must outlast the suspension by enough for a clock that runs 1.6 times too fast.

    ``follower_look_s``: how often one that does not lead looks at the key, besides the watch that
    wakes it: that may be behind, or be moving to another member of etcd.
    """

    lease_ttl_s: int = 5
    renew_period_s: float = 1.0
    suspend_after_s: float = 3.0
    follower_look_s: float = 1.0


class SteppedDown(LeadershipLost):
    """The holder of the term was asked to give it up."""


class Reign:
    """One term that was won: until when its holder may write without looking again."""

    def __init__(
        self, leader_revision: int, sent_s: float, suspend_after_s: float, clock: Clock
    ) -> None:
        self.leader_revision = leader_revision
        self._last_good_s = sent_s
        self._suspend_after_s = suspend_after_s
        self._clock = clock
        self._renewed = asyncio.Event()

    def lasts_at(self, boottime_s: float) -> bool:
        return boottime_s - self._last_good_s < self._suspend_after_s

    def renewed(self, sent_s: float) -> None:
        """Note a good renewal by when it was sent: the lease is at least that young."""
        self._last_good_s = sent_s
        self._renewed.set()

    async def until_writable(self) -> None:
        """Return at once while the term is fresh, else when it has been proven ours again."""
        while not self.lasts_at(self._clock.boottime_s()):
            self._renewed.clear()
            await self._renewed.wait()


Lead = Callable[[Reign], Awaitable[None]]
# Says why this replica must not lead; empty when it may.
Unfit = Callable[[], str]


class Election:
    def __init__(
        self,
        store: Store,
        me: LeaderKey,
        settings: ElectionSettings,
        clock: Clock,
        rng: random.Random,
        next_change: Callable[[], asyncio.Future[None]],
    ) -> None:
        """``next_change`` returns what is done at the next change of the leader key."""
        self._store = store
        self._me = me
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._next_change = next_change
        self._stands_back_until_s = 0.0
        self._retired = False
        self._lease = 0
        self._unfit = ""
        self._failure = ""
        self.leader: LeaderKey | None = None
        self.leader_revision = 0

    async def run(self, lead: Lead, unfit: Unfit) -> None:
        """Campaign for ever; while a term is ours, ``lead`` runs, and is cancelled at its end.

        While ``unfit`` has a reason, only follow. ``lead`` may be the first to find one, in what it
        reads on takeover: it then raises ReleaseTooOld. It raises SteppedDown to give its term up.
        """
        while True:
            try:
                reign = await self._campaign(unfit())
                self._failure = ""
                if reign is None:
                    continue
                await self._rule_and_resign(reign, lead)
            except SteppedDown as over:
                log.info("%s; standing back", over)
                self._stands_back_until_s = self._clock.boottime_s() + STAND_BACK_S
            except LeadershipLost as lost:
                log.warning("leadership lost: %s", lost)
            except ReleaseTooOld as too_old:
                log.error("giving the term back: %s", too_old)
            except NovacronError as error:
                self._tell_failure(str(error))
            self.leader = None if self._is_me(self.leader) else self.leader
            await asyncio.sleep(self._rng.uniform(0.1, CAMPAIGN_JITTER_S))

    def retire(self) -> None:
        """Never stand again; who leads is still looked at."""
        self._retired = True

    async def give_back(self) -> None:
        """Resign a term that an earlier process of this replica held, before anything is read.

        What fails is tried again by the first campaign.
        """
        try:
            current = await self._store.get(keys.LEADER)
            if current is not None:
                await self._resign_dead_self(current)
        except NovacronError as error:
            log.warning("whether a term was left over is not known yet: %s", error)

    async def _campaign(self, unfit: str) -> Reign | None:
        """Return a reign if the key became ours; otherwise wait until it is worth trying again."""
        self._tell_unfit(unfit)
        # Waiting begins before the look: a change that comes after it is not missed.
        changed = self._next_change()
        try:
            current = await self._store.get(keys.LEADER)
            if current is not None and await self._resign_dead_self(current):
                current = None
            if current is not None:
                self._note_leader(current)
            else:
                # Whoever stands may fail at it: until somebody leads, nobody does.
                self.leader = None
                if self._may_stand(unfit):
                    return await self._stand()
            await asyncio.wait([changed], timeout=self._settings.follower_look_s)
            return None
        finally:
            changed.cancel()

    def _may_stand(self, unfit: str) -> bool:
        stands_back = self._clock.boottime_s() < self._stands_back_until_s
        return not (unfit or self._retired or stands_back)

    async def _stand(self) -> Reign | None:
        """Try to make the key ours; None when another replica was first."""
        sent_s = self._clock.boottime_s()
        self._lease = await self._store.grant_lease(self._settings.lease_ttl_s)
        me = replace(self._me, since=self._clock.now())
        outcome = await self._store.campaign(pack(me), self._lease)
        self._note_leader(outcome.leader)
        if outcome.leader.lease != self._lease:
            await self._store.revoke_lease(self._lease)
            return None
        return Reign(
            outcome.leader.create_revision, sent_s, self._settings.suspend_after_s, self._clock
        )

    def _tell_unfit(self, unfit: str) -> None:
        if unfit and unfit != self._unfit:
            log.error("not standing for election: %s", unfit)
        self._unfit = unfit

    def _tell_failure(self, problem: str) -> None:
        """Tell why a campaign failed, once: while the store is full, say, each one does."""
        told, self._failure = self._failure, problem
        log.log(
            logging.DEBUG if told == problem else logging.WARNING,
            "the campaign failed: %s",
            problem,
        )

    async def _resign_dead_self(self, current: KeyValue) -> bool:
        leader = _read_leader(current)
        if leader is None or leader.replica != self._me.replica:
            return False
        # Whoever campaigns does not rule: an own key is left of a term that ended early, or of a
        # campaign whose answer was lost.
        log.info("resigning the term %d, which nobody holds", current.create_revision)
        return await self._store.resign(current.create_revision)

    async def _rule_and_resign(self, reign: Reign, lead: Lead) -> None:
        """Rule; when that ends by intent, give the term back: nobody shall wait for the lease."""
        try:
            await self._rule(reign, lead)
        except (asyncio.CancelledError, SteppedDown):
            resigning = asyncio.ensure_future(self._resign(reign.leader_revision))
            try:
                await asyncio.shield(resigning)
            finally:
                # A process may ask to end while its term does: half a resignation is none.
                await resigning
            raise

    async def _resign(self, leader_revision: int) -> None:
        with contextlib.suppress(NovacronError, TimeoutError):
            async with asyncio.timeout(RESIGN_TIMEOUT_S):
                if await self._store.resign(leader_revision):
                    log.info("resigned the term %d", leader_revision)

    async def _rule(self, reign: Reign, lead: Lead) -> None:
        log.info("leading: term revision %d", reign.leader_revision)
        leading = asyncio.ensure_future(lead(reign))
        keeping = asyncio.ensure_future(self._keep(reign))
        try:
            await asyncio.wait({leading, keeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (leading, keeping):
                task.cancel()
            results = await asyncio.gather(leading, keeping, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _keep(self, reign: Reign) -> None:
        """Renew the lease until it is lost. Raises LeadershipLost."""
        while True:
            sent_s = self._clock.boottime_s()
            if await self._renew() and await self._still_mine(reign, sent_s):
                reign.renewed(sent_s)
            await asyncio.sleep(self._settings.renew_period_s)

    async def _renew(self) -> bool:
        try:
            async with asyncio.timeout(self._settings.renew_period_s):
                remaining_s = await self._store.renew_lease(self._lease)
        except (NovacronError, TimeoutError) as error:
            log.warning("the lease was not renewed: %s", str(error) or "timed out")
            return False
        if remaining_s <= 0:
            raise LeadershipLost("the lease is gone")
        return True

    async def _still_mine(self, reign: Reign, sent_s: float) -> bool:
        """After a gap a renewal proves nothing (etcd 3.4 renews revoked leases): read the key."""
        if reign.lasts_at(sent_s):
            return True
        try:
            current = await self._store.get(keys.LEADER)
        except NovacronError:
            return False
        if current is None or current.create_revision != reign.leader_revision:
            raise LeadershipLost("the leader key is another's")
        return current.lease == self._lease

    def _note_leader(self, found: KeyValue) -> None:
        self.leader, self.leader_revision = _read_leader(found), found.create_revision

    def _is_me(self, leader: LeaderKey | None) -> bool:
        return leader is not None and leader.incarnation == self._me.incarnation


def _read_leader(found: KeyValue) -> LeaderKey | None:
    try:
        return unpack(found.value, LeaderKey)
    except RecordUnreadable:
        return None
