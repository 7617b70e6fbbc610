"""The agent's session with the leader: found, greeted, kept, and found again.

Owns the conversation and nothing of the VMs: desired states go to the reconciler, reports come from
it. Losing the session changes nothing for any guest. A report that was not sent yet is replaced by
a newer one about the same VM; none is lost, since all are told anew after each greeting.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from agent.fence import Fence
from agent.hypervisor import Hypervisor
from agent.inventory import NodeFacts, inventory_of
from agent.reconciler import VmReconciler
from shared.channel import Channel
from shared.codec import pack, unpack
from shared.errors import Disconnected, DomainNotFound, NovacronError, StaleTerm
from shared.lifetime import until_one_ends
from shared.model import Term
from shared.problems import problem_of
from shared.protocol import (
    TOGETHER_MAX,
    AgentMessage,
    Answer,
    Desired,
    DesiredTogether,
    DestinationCheck,
    DestinationQuestion,
    Heartbeat,
    HeartbeatSeen,
    Hello,
    InSync,
    InventoryReport,
    LeaderMessage,
    MigrationProgress,
    NotLeader,
    Query,
    QueryKind,
    Rejected,
    ReportsTogether,
    SourceCheck,
    TermAccepted,
    VmReport,
    Welcome,
)
from shared.retry import Backoff

log = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 15.0
# Within the leader's silence limit, so that a replica's restart leaves no node silent; the jitter
# spreads agents out, and the leader greets a bounded number at once.
RECONNECT_BACKOFF = Backoff(first_s=0.5, cap_s=5.0)
# Disk space and domains of others change slowly; what changed is sent, the rest is not.
INVENTORY_PERIOD_S = 60.0
QUERIES_AT_ONCE_MAX = 4

LeaderChannel = Channel[AgentMessage, LeaderMessage]


class Dial(Protocol):
    """Opens a stream to one replica. Raises Disconnected."""

    async def __call__(self, address: str) -> LeaderChannel: ...


class Joined(Struct, frozen=True):
    """What the leader said of us in its welcome."""

    node_id: str
    term: Term


class Outgoing:
    """Reports that wait to be sent: the newest of each VM, and of each migration's progress.

    Bounded by the number of VMs.
    """

    def __init__(self) -> None:
        self._reports: dict[str, VmReport] = {}
        self._progress: dict[str, MigrationProgress] = {}
        self._available = asyncio.Event()

    def put(self, report: VmReport) -> None:
        self._reports.pop(report.vm_id, None)
        self._reports[report.vm_id] = report
        self._available.set()

    def put_back(self, report: VmReport) -> None:
        """Put a report that was not sent first again, unless a newer one came meanwhile."""
        if report.vm_id not in self._reports:
            self._reports = {report.vm_id: report, **self._reports}
            self._available.set()

    def put_progress(self, progress: MigrationProgress) -> None:
        """Have progress sent, if it can be at once: what is late is of no use."""
        self._progress[progress.operation] = progress
        self._available.set()

    async def take(self, reports_max: int) -> tuple[VmReport, ...] | MigrationProgress:
        """Return what waits longest: up to so many reports, or the progress of one migration."""
        while not self._reports and not self._progress:
            self._available.clear()
            await self._available.wait()
        if not self._reports:
            return self._progress.pop(next(iter(self._progress)))
        vm_ids = list(itertools.islice(self._reports, reports_max))
        return tuple(self._reports.pop(vm_id) for vm_id in vm_ids)


class Session:
    def __init__(
        self,
        replicas: tuple[str, ...],
        dial: Dial,
        node: NodeFacts,
        hypervisor: Hypervisor,
        reconciler: VmReconciler,
        fence: Fence,
        outgoing: Outgoing,
        rng: random.Random,
        joined: Callable[[Joined], None],
    ) -> None:
        self._replicas = replicas
        self._dial = dial
        self._node = node
        self._hypervisor = hypervisor
        self._reconciler = reconciler
        self._fence = fence
        self._outgoing = outgoing
        self._rng = rng
        self._joined = joined
        self._queries = asyncio.Semaphore(QUERIES_AT_ONCE_MAX)
        self._served = False
        self.connected = False

    async def run(self) -> None:
        """Keep a session with whoever leads, for ever."""
        delays = RECONNECT_BACKOFF.delays(self._rng)
        hint: str | None = None
        for turn in itertools.count():
            address = hint or self._replicas[turn % len(self._replicas)]
            hint = None
            try:
                hint = await self._attempt(address)
            except NovacronError as error:
                log.warning("no session with %s: %s", address, error)
            except TimeoutError:
                log.warning("no session with %s: the greeting took too long", address)
            if self._served:
                delays = RECONNECT_BACKOFF.delays(self._rng)
            await asyncio.sleep(next(delays))

    async def _attempt(self, address: str) -> str | None:
        """Serve one session to its end; return where the leader is, if it is elsewhere."""
        self._served = False
        channel = await self._dial(address)
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                answer, told = await self._greet(channel)
            if isinstance(answer, NotLeader):
                if answer.agent_address in (None, address):
                    raise Disconnected("the replica does not lead, and knows of no leader")
                return answer.agent_address
            if isinstance(answer, Rejected):
                raise Disconnected(f"the leader refuses: {answer.problem.detail}")
            assert isinstance(answer, Welcome), "a greeting ends in one of three ways"
            log.info("in session with %s, term %s", address, answer.term)
            self._joined(Joined(answer.node_id, answer.term))
            self.connected = self._served = True
            await self._serve(channel, answer, told)
        finally:
            self.connected = False
            await channel.close()
        return None

    async def _greet(
        self, channel: LeaderChannel
    ) -> tuple[Welcome | NotLeader | Rejected, InventoryReport]:
        inventory = await inventory_of(self._hypervisor, self._node)
        domains, foreign = await self._reconciler.found()
        await channel.send(
            Hello(
                node_name=self._node.name,
                boot_id=self._node.boot_id,
                incarnation=self._node.incarnation,
                address=self._node.address,
                agent_version=self._node.agent_version,
                highest_term=self._fence.term,
                labels=self._node.labels,
                inventory=inventory,
                domains=domains,
                foreign_domains=foreign,
                together=True,
            )
        )
        answer = await channel.receive()
        if isinstance(answer, Welcome):
            await self._fence.accept_term(answer.term)
            await channel.send(TermAccepted(term=answer.term))
        elif not isinstance(answer, NotLeader | Rejected):
            raise Disconnected("the replica did not answer the hello")
        return answer, InventoryReport(inventory=inventory, foreign_domains=foreign)

    async def _serve(self, channel: LeaderChannel, welcome: Welcome, told: InventoryReport) -> None:
        await until_one_ends(
            self._receive(channel, welcome.silence_limit_s),
            self._beat(channel, welcome.heartbeat_period_s),
            self._send_reports(channel, TOGETHER_MAX if welcome.together else 1),
            self._send_inventory(channel, told),
        )

    async def _receive(self, channel: LeaderChannel, silence_limit_s: float) -> None:
        answers: dict[asyncio.Task[None], None] = {}
        try:
            while True:
                message = await _receive_within(channel, silence_limit_s)
                if isinstance(message, Desired):
                    self._reconciler.take(message)
                elif isinstance(message, DesiredTogether):
                    for desired in message.desired:
                        self._reconciler.take(desired)
                elif isinstance(message, InSync):
                    await self._reconciler.drop_all_but(message.vm_ids)
                elif isinstance(message, Query):
                    answer = asyncio.ensure_future(self._answer(channel, message))
                    answers[answer] = None
                    answer.add_done_callback(answers.pop)
                elif isinstance(message, HeartbeatSeen) and message.term < self._fence.term:
                    raise StaleTerm(f"the leader of term {message.term} is not the newest")
        finally:
            for answer in answers:
                answer.cancel()

    async def _beat(self, channel: LeaderChannel, period_s: float) -> None:
        number = 0
        while True:
            number += 1
            await channel.send(Heartbeat(number=number))
            await asyncio.sleep(period_s)

    async def _send_reports(self, channel: LeaderChannel, together_max: int) -> None:
        while True:
            taken = await self._outgoing.take(together_max)
            if isinstance(taken, MigrationProgress):
                await channel.send(taken)
                continue
            try:
                await channel.send(taken[0] if len(taken) == 1 else ReportsTogether(reports=taken))
            except Disconnected:
                for report in reversed(taken):
                    self._outgoing.put_back(report)
                raise

    async def _send_inventory(self, channel: LeaderChannel, sent: InventoryReport) -> None:
        while True:
            await asyncio.sleep(INVENTORY_PERIOD_S)
            try:
                inventory = await inventory_of(self._hypervisor, self._node)
                _, foreign = await self._reconciler.found()
            except NovacronError as error:
                log.warning("the inventory cannot be read: %s", error)
                continue
            report = InventoryReport(inventory=inventory, foreign_domains=foreign)
            if report != sent:
                await channel.send(report)
                sent = report

    async def _answer(self, channel: LeaderChannel, query: Query) -> None:
        async with self._queries:
            try:
                data = await self._query(query)
                answer = Answer(query_id=query.id, data=data)
            except NovacronError as error:
                answer = Answer(query_id=query.id, problem=problem_of(error))
        with contextlib.suppress(Disconnected):  # the receiver notices it too, and says so
            await channel.send(answer)

    async def _query(self, query: Query) -> bytes:
        if query.kind is QueryKind.CONSOLE_LOG:
            return await self._hypervisor.console_log(
                query.domain_name, query.offset, query.limit_bytes
            )
        if query.kind is QueryKind.CONSOLE_SIZE:
            return str(await self._hypervisor.console_size(query.domain_name)).encode()
        if query.kind is QueryKind.MIGRATION_SOURCE:
            return pack(await self._check_source(query))
        if query.kind is QueryKind.MIGRATION_DESTINATION:
            question = unpack(query.payload, DestinationQuestion)
            blockers = await self._hypervisor.check_destination(query.domain_name, question)
            return pack(DestinationCheck(blockers=blockers))
        if query.kind is QueryKind.SURVEY:
            return pack(await self._reconciler.survey())
        raise Disconnected(f"this agent does not know the query {query.kind.value!r}")

    async def _check_source(self, query: Query) -> SourceCheck:
        domain = await self._hypervisor.domain(query.domain_name)
        if domain is None or domain.vm_id != query.vm_id:
            raise DomainNotFound(f"this node has no domain {query.domain_name!r}")
        return await self._hypervisor.check_source(query.domain_name, domain.generation)


async def _receive_within(channel: LeaderChannel, silence_limit_s: float) -> LeaderMessage:
    """Return the next message; a leader that answers no heartbeat for so long is given up."""
    try:
        async with asyncio.timeout(silence_limit_s):
            return await channel.receive()
    except TimeoutError:
        raise Disconnected(f"the leader has not answered for {silence_limit_s:g} s") from None
