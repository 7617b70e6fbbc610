"""The leader's sessions with its nodes.

Owns who is connected and when each node was last heard. It turns what agents say into commands and
what the records say into messages; it decides nothing about VMs. A node has one session: a newer
one displaces the older. Made for one term, and closed with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.admission import refusal_of
from controlplane.commands.attempts import ObserveVms
from controlplane.commands.draft import Author
from controlplane.commands.migrations import HearOfLeftover
from controlplane.commands.nodes import JoinNode, ReportInventory, SetNodeState
from controlplane.commands.restored import must_tell
from controlplane.sessions.admitted import check_admitted
from controlplane.sessions.desired import desired_of
from controlplane.sessions.peer_messages import AgentList
from controlplane.sessions.session import AgentChannel, AgentSession, Said
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.admission import Admission
from shared.errors import (
    Conflict,
    Disconnected,
    Forbidden,
    NodeUnreachable,
    NovacronError,
    Overloaded,
    StoreFull,
    Unavailable,
)
from shared.ids import IdSource
from shared.lifetime import until_one_ends
from shared.model import NodeState, Record, Vm, nodes_of
from shared.moves import EndState, MigrationStage
from shared.problems import problem_of
from shared.protocol import (
    PROTOCOL_LEVEL,
    Answer,
    Desired,
    DesiredTogether,
    Heartbeat,
    HeartbeatSeen,
    Hello,
    InSync,
    InventoryReport,
    MigrationProgress,
    MigrationReport,
    MigrationRole,
    Query,
    Rejected,
    ReportsTogether,
    TermAccepted,
    VmReport,
    Welcome,
)
from shared.tls import Identity

log = logging.getLogger(__name__)

# A greeting is two messages and one commit; an agent that takes longer is not well.
GREETING_TIMEOUT_S = 15.0
# Greetings under way at once: a commit takes longer than what there is to think about, and what
# clients want in between should not wait for all of them.
GREETINGS_MAX = 16
# Agents that wait for their turn, their hellos unread: a little more than are greeted before the
# first of them gives up, at 5 ms each. More are sent away, and come back with back-off.
GREETINGS_WAITING_MAX = 4000
# The stages in which a node removes what it has of a generation.
_CLEANS = frozenset(
    {
        (MigrationRole.SOURCE, MigrationStage.FINALIZE),
        (MigrationRole.DESTINATION, MigrationStage.CLEAN),
    }
)
# Queries wait for an agent this long; a console log is read in well under a second.
QUERY_TIMEOUT_S = 10.0
QUERIES_PER_NODE_MAX = 16
# What an agent said while the store was full is tried again so often; a person makes room.
STORE_FULL_PAUSE_S = 5.0


class HubSettings(Struct, frozen=True, kw_only=True):
    """A node is silent after five heartbeats were missed."""

    heartbeat_period_s: float = 2.0
    silence_limit_s: float = 10.0


class Hub:
    def __init__(
        self,
        applier: Applier,
        state: ClusterState,
        cluster_id: str,
        settings: HubSettings,
        ids: IdSource,
        progress: Callable[[MigrationProgress], None],
    ) -> None:
        self._applier = applier
        self._state = state
        self._cluster_id = cluster_id
        self._settings = settings
        self._ids = ids
        self._sessions: dict[str, AgentSession] = {}
        self._sessions_changed = 0
        self._greetings = asyncio.Semaphore(GREETINGS_MAX)
        self._waiting = 0
        self._trust_observers: list[Callable[[str], None]] = []
        self._migration_observers: list[Callable[[], None]] = []
        self._progress = progress
        state.observe(self._record_changed)

    def close(self) -> None:
        """End every session: the term is over."""
        self._state.unobserve(self._record_changed)
        for session in self._sessions.values():
            session.displaced.set()

    def trusts(self, node_id: str) -> bool:
        """Whether the node has accepted this term and is connected.

        After a restore of etcd also, whether it has told what it has: it is given nothing new
        before.
        """
        node = self._state.nodes.get(node_id)
        told = node is not None and not must_tell(self._state.cluster(), node.record)
        return told and self.greeted(node_id)

    def greeted(self, node_id: str) -> bool:
        """Whether the node has accepted this term and is connected, whatever it has to tell yet."""
        session = self._sessions.get(node_id)
        return session is not None and session.greeted

    def connected(self) -> tuple[str, ...]:
        """Return the ids of the nodes that have accepted this term and are connected, sorted."""
        return tuple(sorted(node_id for node_id in self._sessions if self.greeted(node_id)))

    def silent_for_s(self, node_id: str) -> float | None:
        """Return how long a connected node has not been heard; None when it is not connected."""
        session = self._sessions.get(node_id)
        if session is None or not session.greeted:
            return None
        return asyncio.get_running_loop().time() - session.heard_s

    def agents(self) -> AgentList:
        """Return what the connected agents said they are."""
        versions = {node_id: session.agent_version for node_id, session in self._sessions.items()}
        return AgentList(name=f"{self._applier.term}/{self._sessions_changed}", versions=versions)

    def on_trust_change(self, observer: Callable[[str], None]) -> None:
        self._trust_observers.append(observer)

    def on_migration_report(self, observer: Callable[[], None]) -> None:
        """Call ``observer()`` whenever a node has told of a migration."""
        self._migration_observers.append(observer)

    def migration_report(self, vm_id: str, node_id: str) -> MigrationReport | None:
        """Return what a node last told, in its present session, of a VM's migration."""
        session = self._sessions.get(node_id)
        return None if session is None else session.migrations.get(vm_id)

    async def ask(self, node_id: str, query: Query) -> bytes:
        """Return an agent's answer. Raises NodeUnreachable, Overloaded, or the agent's problem."""
        session = self._sessions.get(node_id)
        if session is None or not session.greeted:
            raise NodeUnreachable("the node's agent is not connected")
        if len(session.queries) >= QUERIES_PER_NODE_MAX:
            raise Overloaded(f"{session.node_name} has {QUERIES_PER_NODE_MAX} queries to answer")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        session.queries[query.id] = answer
        try:
            async with asyncio.timeout(QUERY_TIMEOUT_S):
                await session.channel.send(query)
                return await answer
        except TimeoutError:
            raise NodeUnreachable(
                f"{session.node_name} did not answer in {QUERY_TIMEOUT_S:.0f} s"
            ) from None
        except Disconnected as gone:
            raise NodeUnreachable(f"{session.node_name} disconnected") from gone
        finally:
            session.queries.pop(query.id, None)

    async def serve(self, channel: AgentChannel, identity: Identity, serial: str = "") -> None:
        """Greet an agent in its turn and serve its session until one side ends it.

        ``serial`` is of the certificate that it has shown; empty where connections have none.
        """
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                async with self._turn(channel):
                    session = await self._greet(channel, identity, serial)
        except Disconnected:
            return
        except TimeoutError:
            await _reject(channel, Unavailable("the greeting took too long"))
            return
        except Unavailable as passing:
            # A thousand of them come to a replica that ceases to lead: no news, and no time for it.
            await _reject(channel, passing)
            return
        except NovacronError as error:
            log.warning("the session of %s is refused: %s", identity.name, error)
            await _reject(channel, error)
            return
        try:
            await self._run(session)
        finally:
            self._forget(session)

    @asynccontextmanager
    async def _turn(self, channel: AgentChannel) -> AsyncIterator[None]:
        """Wait for a place among the greetings under way. Raises Overloaded."""
        if self._waiting >= GREETINGS_WAITING_MAX:
            # Answered before its hello, the agent would find the stream over and learn nothing.
            await channel.receive()
            raise Overloaded("too many agents wait to be greeted")
        self._waiting += 1
        try:
            await self._greetings.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._greetings.release()

    async def _greet(self, channel: AgentChannel, identity: Identity, serial: str) -> AgentSession:
        hello = await channel.receive()
        check_admitted(self._state, identity.name, serial)
        if not isinstance(hello, Hello):
            raise Forbidden("a session begins with a hello")
        if hello.node_name != identity.name:
            raise Forbidden(
                f"the certificate speaks for {identity.name!r}, not for {hello.node_name!r}"
            )
        if hello.protocol != PROTOCOL_LEVEL:
            raise Forbidden(f"protocol {hello.protocol} is not {PROTOCOL_LEVEL}")
        self._refuse_twin(hello)
        by = Author(f"agent:{hello.node_name}")
        node_id = await self._applier.submit(
            JoinNode(
                name=hello.node_name,
                address=hello.address,
                boot_id=hello.boot_id,
                labels=hello.labels,
                inventory=hello.inventory,
                foreign_domains=hello.foreign_domains,
                serial=serial,
                by=by,
            )
        )
        await channel.send(
            Welcome(
                term=self._applier.term,
                node_id=node_id,
                cluster_id=self._cluster_id,
                heartbeat_period_s=self._settings.heartbeat_period_s,
                silence_limit_s=self._settings.silence_limit_s,
                together=True,
            )
        )
        accepted = await channel.receive()
        if not isinstance(accepted, TermAccepted) or accepted.term != self._applier.term:
            raise Forbidden("the agent did not accept the term")
        # It may have been shut out while it was greeted.
        check_admitted(self._state, identity.name, serial)
        session = self._admit(node_id, hello, channel, serial)
        try:
            await self._take_hello(session, hello)
        except BaseException:
            self._forget(session)
            raise
        return session

    async def _take_hello(self, session: AgentSession, hello: Hello) -> None:
        """Take what the agent found; only then is the node trusted with anything new."""
        await self._observe(session, hello.domains)
        session.greeted = True
        self._tell_trust(session.node_id)
        await self._applier.submit(
            SetNodeState(node_id=session.node_id, state=NodeState.READY, by=Author("leader"))
        )

    async def _observe(self, session: AgentSession, reports: tuple[VmReport, ...]) -> None:
        """Take reports; one VM's that cannot be taken must not cost the node its session."""
        by = Author(f"agent:{session.node_name}")
        for told in filter(None, (_told_of_leftover(session.node_id, each) for each in reports)):
            try:
                await self._applier.submit(told)
            except Conflict as refused:
                log.error("a leftover of %s was not heard of: %s", told.vm_id, refused)
        while reports:
            taken = await self._applier.submit(
                ObserveVms(node_id=session.node_id, reports=reports, by=by)
            )
            for vm_id, why in taken.refused:
                log.error("a report on %s was not taken: %s", vm_id, why)
            reports = reports[taken.count :]

    def _refuse_twin(self, hello: Hello) -> None:
        """Refuse a second machine with a node's certificate: a new boot would end its attempts.

        A node that really booted anew is let in once its earlier session has ended or gone silent.
        """
        node_id = self._state.node_id_by_name(hello.node_name)
        living = None if node_id is None else self._sessions.get(node_id)
        if living is None or living.boot_id == hello.boot_id:
            return
        silent_s = asyncio.get_running_loop().time() - living.heard_s
        if silent_s < self._settings.silence_limit_s:
            raise Conflict(
                f"{hello.node_name!r} is heard from in another boot ({living.boot_id}): "
                "do two machines share its certificate?"
            )

    def _admit(
        self, node_id: str, hello: Hello, channel: AgentChannel, serial: str
    ) -> AgentSession:
        older = self._sessions.get(node_id)
        if older is not None:
            log.warning("a newer session of %s displaces the older one", hello.node_name)
            older.displaced.set()
        now_s = asyncio.get_running_loop().time()
        session = AgentSession(node_id, hello, channel, now_s, serial)
        self._sessions[node_id] = session
        self._sessions_changed += 1
        self._tell_trust(node_id)
        return session

    def _forget(self, session: AgentSession) -> None:
        session.fail_queries()
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]
            self._sessions_changed += 1
            self._tell_trust(session.node_id)

    async def _run(self, session: AgentSession) -> None:
        try:
            await until_one_ends(
                self._receive(session),
                self._take_what_is_said(session),
                self._push(session),
                session.displaced.wait(),
            )
        except Disconnected:
            log.info("%s disconnected", session.node_name)
        except NovacronError as error:
            log.warning("the session of %s ended: %s", session.node_name, error)
        finally:
            await session.channel.close()

    async def _receive(self, session: AgentSession) -> None:
        """Hear the agent; nothing here waits for a commit: a slow store is not silence."""
        while True:
            message = await session.channel.receive()
            check_admitted(self._state, session.node_name, session.serial)
            session.heard_s = asyncio.get_running_loop().time()
            if isinstance(message, Heartbeat):
                term = self._applier.term
                await session.channel.send(HeartbeatSeen(term=term, number=message.number))
            elif isinstance(message, ReportsTogether):
                for report in message.reports:
                    self._hear_of_migration(session, report)
                    session.say(report)
            elif isinstance(message, VmReport | InventoryReport):
                self._hear_of_migration(session, message)
                session.say(message)
            elif isinstance(message, MigrationProgress):
                self._progress(message)
            elif isinstance(message, Answer):
                session.settle_query(message)

    def _hear_of_migration(
        self, session: AgentSession, message: VmReport | InventoryReport
    ) -> None:
        """Keep what a node tells of a migration; no commit comes between this and its saga."""
        if not isinstance(message, VmReport) or message.migration is None:
            return
        before = session.migrations.get(message.vm_id)
        session.migrations[message.vm_id] = message.migration
        if before is None or before.target != message.migration.target:
            self._mark_source(message.vm_id)
        for observer in self._migration_observers:
            observer()

    def _mark_source(self, vm_id: str) -> None:
        """Have the source told of what its destination has made ready."""
        stored = self._state.vms.get(vm_id)
        claim = None if stored is None else stored.record.status.migration
        session = None if claim is None else self._sessions.get(claim.source)
        if session is not None:
            session.mark(vm_id)

    async def _take_what_is_said(self, session: AgentSession) -> None:
        while True:
            said = await session.next_said()
            try:
                await self._take(session, said)
            except StoreFull as full:
                # No reason to lose the node: what it says is kept, and there is room again one day.
                log.warning("a report of %s waits: %s", session.node_name, full)
                session.say_again(said)
                await asyncio.sleep(STORE_FULL_PAUSE_S)

    async def _take(self, session: AgentSession, said: Said) -> None:
        if not isinstance(said, InventoryReport):
            await self._observe(session, said)
            return
        await self._applier.submit(
            ReportInventory(
                node_id=session.node_id,
                inventory=said.inventory,
                foreign_domains=said.foreign_domains,
            )
        )

    async def _push(self, session: AgentSession) -> None:
        """Send what changed of the node's VMs; first all of them, then the sync mark."""
        vm_ids = tuple(sorted(self._state.vm_ids_on(session.node_id)))
        for start in range(0, len(vm_ids), session.together_max):
            await self._push_vms(session, vm_ids[start : start + session.together_max])
        await session.channel.send(InSync(term=self._applier.term, vm_ids=vm_ids))
        while True:
            await session.wake.wait()
            session.wake.clear()
            while session.dirty:
                dirty = list(itertools.islice(session.dirty, session.together_max))
                for vm_id in dirty:
                    del session.dirty[vm_id]
                await self._push_vms(session, dirty)

    async def _push_vms(self, session: AgentSession, vm_ids: Iterable[str]) -> None:
        due = tuple(d for d in (self._due(session, vm_id) for vm_id in vm_ids) if d is not None)
        if len(due) == 1:
            await session.channel.send(due[0])
        elif due:
            await session.channel.send(DesiredTogether(desired=due))

    def _due(self, session: AgentSession, vm_id: str) -> Desired | None:
        """Return what the node must be told of a VM, and note that it was; None for nothing."""
        desired = self._desired(session, vm_id)
        if desired is None:
            session.sent.pop(vm_id, None)
            session.migrations.pop(vm_id, None)
            return None
        sent = session.sent.get(vm_id)
        # A new revision that says nothing new would only make the agent answer again.
        if sent is not None and replace(sent, revision=desired.revision) == desired:
            return None
        session.sent[vm_id] = desired
        return desired

    def _desired(self, session: AgentSession, vm_id: str) -> Desired | None:
        stored = self._state.vms.get(vm_id)
        node = self._state.nodes.get(session.node_id)
        if stored is None or node is None:
            return None
        desired = desired_of(stored, node.record, self._applier.term, self._node_name)
        claim = stored.record.status.migration
        if desired is None or desired.migration is None or claim is None:
            return desired
        if desired.migration.stage is not MigrationStage.TRANSFER:
            return desired
        if desired.migration.role is not MigrationRole.SOURCE or claim.destination is None:
            return desired
        # What the destination has made ready is stored nowhere: it holds a secret.
        told = self.migration_report(vm_id, claim.destination)
        if told is None or told.generation != claim.generation:
            return desired
        return replace(desired, migration=replace(desired.migration, target=told.target))

    def _node_name(self, node_id: str) -> str:
        stored = self._state.nodes.get(node_id)
        return "" if stored is None else stored.record.name

    def _record_changed(self, before: Record | None, after: Record | None) -> None:
        if isinstance(after, Admission):
            self._end_unless_admitted(after)
        for record in (before, after):
            if not isinstance(record, Vm):
                continue
            for node_id in nodes_of(record):
                session = self._sessions.get(node_id)
                if session is not None:
                    session.mark(record.id)

    def _end_unless_admitted(self, admission: Admission) -> None:
        """End the session of a node whose certificate speaks for it no more, heard or not."""
        session = self._sessions.get(self._state.node_id_by_name(admission.id) or "")
        if session is not None and refusal_of(admission, session.serial) is not None:
            session.displaced.set()

    def _tell_trust(self, node_id: str) -> None:
        for observer in self._trust_observers:
            observer(node_id)


def _told_of_leftover(node_id: str, report: VmReport) -> HearOfLeftover | None:
    """Return what a report says about a generation that its node had to leave, or to clean up."""
    told = report.migration
    if told is None or (told.role, told.stage) not in _CLEANS:
        return None
    only_files = told.fault is not None and told.end is EndState.ABSENT
    if not told.settled and not only_files:
        return None
    return HearOfLeftover(
        vm_id=report.vm_id, node_id=node_id, generation=report.generation, gone=told.settled
    )


async def _reject(channel: AgentChannel, error: NovacronError) -> None:
    try:
        await channel.send(Rejected(problem=problem_of(error)))
    except Disconnected:
        pass
    finally:
        await channel.close()
