"""Keeps a node's certificates from ending: asks for new ones when half of their time is over.

Three and a half days are left then, by default, in which the control plane may be away; it is asked
again and again, rarely. What is new is on the disk before it is used. Time is that of the machine's
clock, which certificates are compared with, and looked at often: it may jump.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime

from agent.identity_files import IdentityFiles, Validity
from shared.admission import Issued, Renewal, RenewalAnswer
from shared.clock import Clock
from shared.errors import Disconnected, NovacronError, RecordUnreadable
from shared.offload import Offload
from shared.problems import error_of

log = logging.getLogger(__name__)

# Of a certificate's time, when it is renewed: so many nodes that joined together spread out.
RENEW_AT, RENEW_SPREAD = 0.5, 0.1
# Of a certificate's time, for how long it is not renewed again, whatever the clock says.
REST = 0.25
# Of a certificate's time, when what is left of it is worth an error in the log.
WORRY_AT = 0.75
# The clock may be set: it is looked at this often. Nothing is asked of anybody by that.
LOOK_S = 60.0
# Between attempts, doubling; of a certificate of seven days the last half has 80 of the longest.
RETRY_S, RETRY_MAX_S = 10.0, 3600.0

Ask = Callable[[str, Renewal], Awaitable[RenewalAnswer]]
# Returns a key and its request, for a key or ("") a new one.
MakeRequest = Callable[[str], Awaitable[tuple[str, str]]]


class CertificateRenewal:
    def __init__(
        self,
        files: IdentityFiles,
        replicas: tuple[str, ...],
        ask: Ask,
        make_request: MakeRequest,
        use: Callable[[], Awaitable[None]],
        disk: Offload,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """``use`` has the files on the disk used; it does nothing when they are already."""
        self._files = files
        self._replicas = list(replicas)
        self._ask = ask
        self._make_request = make_request
        self._use = use
        self._disk = disk
        self._clock = clock
        self._rng = rng
        self._now = asyncio.Event()

    def renew_now(self) -> None:
        """Renew without waiting for the time to come."""
        self._now.set()

    async def run(self) -> None:
        """Renew for ever; where somebody else replaces the files, only tell of their end."""
        not_before_s = 0.0
        while not self._files.are_own:
            validity = await self._validity()
            self._tell(validity, "nobody renews it: make it anew, or let the node join")
            await self._pause(RETRY_MAX_S)
            self._now.clear()
        while True:
            validity = await self._validity()
            if self._clock.now() < validity.begins_at:
                self._tell(validity, "")
            await self._wait_until(self._due_at(validity), not_before_s)
            await self._until_renewed(validity)
            lifetime_s = (validity.ends_at - validity.begins_at).total_seconds()
            # A machine whose clock is days ahead would ask without end.
            not_before_s = asyncio.get_running_loop().time() + REST * lifetime_s

    async def _validity(self) -> Validity:
        """Return until when the certificate is good, once it can be read."""
        while True:
            try:
                return await self._disk(self._files.validity)
            except (NovacronError, OSError) as error:
                log.error("the certificate cannot be read: %s", error)
            await self._pause(RETRY_MAX_S)
            self._now.clear()

    def _due_at(self, validity: Validity) -> datetime:
        share = RENEW_AT + self._rng.uniform(0, RENEW_SPREAD)
        return validity.begins_at + share * (validity.ends_at - validity.begins_at)

    async def _wait_until(self, due_at: datetime, not_before_s: float) -> None:
        loop = asyncio.get_running_loop()
        while not self._now.is_set():
            left_s = (due_at - self._clock.now()).total_seconds()
            left_s = max(left_s, not_before_s - loop.time())
            if left_s <= 0:
                break
            await self._pause(min(left_s, LOOK_S))
        self._now.clear()

    async def _until_renewed(self, validity: Validity) -> None:
        pause_s = RETRY_S
        while True:
            try:
                issued = await self._renewed()
            except (NovacronError, OSError) as error:
                self._tell(validity, str(error))
                await self._use_what_is_there()
            else:
                log.info("new certificates", extra={"until": issued.expires_at.isoformat()})
                return
            await self._pause(pause_s * self._rng.uniform(0.5, 1.0))
            self._now.clear()
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _use_what_is_there(self) -> None:
        """Use what is on the disk: the node may have joined anew meanwhile."""
        try:
            await self._use()
        except (NovacronError, OSError) as error:
            log.error("what vouches for this node cannot be read: %s", error)

    async def _renewed(self) -> Issued:
        """Ask for certificates and use them. Raises NovacronError, OSError."""
        key, agent_request = await self._make_request("")
        qemu_key, qemu_request = await self._make_request(await self._disk(self._files.qemu_key))
        issued = await self._granted(
            Renewal(agent_request=agent_request, qemu_request=qemu_request)
        )
        await self._disk(lambda: self._files.replace(key, qemu_key, issued))
        await self._use()
        return issued

    async def _granted(self, renewal: Renewal) -> Issued:
        """Ask the replicas in turn. Raises what the last one said."""
        self._rng.shuffle(self._replicas)
        failure: NovacronError = Disconnected("the agent knows of no replica")
        for address in self._replicas:
            try:
                answer = await self._ask(address, renewal)
            except (Disconnected, RecordUnreadable) as error:
                failure = error
                continue
            if isinstance(answer, Issued):
                return answer
            failure = error_of(answer.problem)
        raise failure

    def _tell(self, validity: Validity, reason: str) -> None:
        """Log how it is with a certificate that is not renewed, unless there is time enough."""
        now, begins_at, ends_at = self._clock.now(), validity.begins_at, validity.ends_at
        if now < begins_at:
            log.error(
                "the certificate of this node begins at %s, and its clock says %s: set the clock",
                begins_at.isoformat(),
                now.isoformat(timespec="seconds"),
            )
        elif now >= ends_at:
            log.error(
                "the certificate of this node ended at %s: make a join token (novacron node "
                "join-token) and run novacron-agent join; %s",
                ends_at.isoformat(),
                reason,
            )
        elif now >= begins_at + WORRY_AT * (ends_at - begins_at):
            log.error("the certificate of this node ends at %s; %s", ends_at.isoformat(), reason)
        elif self._files.are_own:
            log.warning(
                "no new certificate yet, the present one ends at %s; %s",
                ends_at.isoformat(),
                reason,
            )

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(max(pause_s, 0.0)):
                await self._now.wait()
        except TimeoutError:
            pass
