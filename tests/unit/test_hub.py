"""The leader's sessions, with agents played by the test over a real applier and model etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from controlplane.commands.attempts import BindVm, PermitStart
from controlplane.commands.draft import Command
from controlplane.commands.recovery import NoteTold
from controlplane.commands.vms import ActOnVm, CreateVm
from controlplane.sessions import hub as hub_module
from controlplane.sessions.hub import (
    GREETING_TIMEOUT_S,
    GREETINGS_MAX,
    QUERIES_PER_NODE_MAX,
    QUERY_TIMEOUT_S,
    STORE_FULL_PAUSE_S,
    Hub,
    HubSettings,
)
from controlplane.store.applier import Applier
from shared.errors import IllegalTransition, LeadershipLost, NodeUnreachable, Overloaded
from shared.model import Cluster, NodeState, ObservedPower, Term
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
    Query,
    QueryKind,
    Rejected,
    ReportsTogether,
    TermAccepted,
    VmReport,
    Welcome,
)
from shared.restores import Restored
from shared.states import VmAction
from shared.tls import Identity, Role
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import BORN, CELL, INVENTORY, LEADER, USER, no_check, spec
from tests.unit.pipes import PipeEnd, pipe
from tests.unit.test_applier import Writer, writer

A_WHILE_S = 1.0


class Site:
    """A hub of one term, and what the tests do to it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.state = writer.state
        self.applier: Applier = writer.applier
        self.progress: list[MigrationProgress] = []
        self.hub = Hub(
            self.applier,
            self.state,
            "cluster-1",
            HubSettings(),
            writer.applier._ids,
            self.progress.append,
        )
        self.serving: list[asyncio.Future[None]] = []

    def dial(self, name: str = "n1") -> PipeEnd:
        ours, theirs = pipe()
        identity = Identity(role=Role.AGENT, name=name, cell="abc123")
        self.serving.append(asyncio.ensure_future(self.hub.serve(cast(Any, theirs), identity)))
        return ours

    async def joined(self, *reports: VmReport, **hello: Any) -> PipeEnd:
        """Return the stream of an agent that was greeted, up to the mark."""
        stream = self.dial()
        await stream.send(a_hello(domains=reports, **hello))
        welcome = await stream.expect(Welcome)
        await stream.send(TermAccepted(term=welcome.term))
        return stream

    async def submit(self, command: Command[Any]) -> Any:
        return await self.applier.submit(command)

    @property
    def node_id(self) -> str:
        found = self.state.node_id_by_name("n1")
        assert found is not None
        return found

    async def permitted_vm(self, name: str = "web-1") -> str:
        """Return a VM that is bound to n1 and has a start permit."""
        await self.submit(CreateVm(name=name, tenant="default", labels={}, spec=spec(), by=USER))
        vm_id = self.state.vm_id_by_name("default", name)
        assert vm_id is not None
        await self.submit(BindVm(vm_id=vm_id, node_id=self.node_id, by=LEADER, check=no_check))
        await self.submit(PermitStart(vm_id=vm_id, by=LEADER, check=no_check))
        return vm_id

    def seen(self, vm_id: str) -> ObservedPower:
        return self.state.vms[vm_id].record.status.power_seen


def a_hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "node_name": "n1",
        "boot_id": "boot-1",
        "incarnation": "i1",
        "address": "192.0.2.1",
        "agent_version": "0.1.0",
        "highest_term": Term(0, 0),
        "inventory": INVENTORY,
        "domains": (),
    }
    return Hello(**{**fields, **changes})


async def greeted(it: Site, name: str) -> PipeEnd:
    """Return the stream of an agent that has been told of all its VMs."""
    stream = it.dial(name)
    await stream.send(a_hello(node_name=name))
    welcome = await stream.expect(Welcome)
    await stream.send(TermAccepted(term=welcome.term))
    await stream.expect(InSync)
    return stream


def a_report(vm_id: str, power: ObservedPower, generation: int = 1) -> VmReport:
    return VmReport(vm_id=vm_id, generation=generation, power=power, permit_used=True)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    async with writer() as made:
        it = Site(made)
        try:
            yield it
        finally:
            for serving in it.serving:
                serving.cancel()
            ends = await asyncio.gather(*it.serving, return_exceptions=True)
            assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


def test_a_full_store_costs_no_node_its_session_and_nothing_that_was_said() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            vm_id = await it.permitted_vm()
            it.writer.model.full = True
            for power in (ObservedPower.PAUSED, ObservedPower.RUNNING):
                await stream.send(
                    VmReport(vm_id=vm_id, generation=1, power=power, permit_used=True)
                )
                await asyncio.sleep(A_WHILE_S)
            await stream.send(Heartbeat(number=7))
            assert (await stream.expect(HeartbeatSeen)).number == 7
            assert it.seen(vm_id) is not ObservedPower.RUNNING
            await asyncio.sleep(10 * STORE_FULL_PAUSE_S)
            assert it.hub.agents().versions != {}
            it.writer.model.disarm()
            await asyncio.sleep(2 * STORE_FULL_PAUSE_S)
            assert it.seen(vm_id) is ObservedPower.RUNNING, "the newest of what was said"

    virtual(main())


def test_a_greeted_node_is_trusted_and_told_everything_then_the_mark() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            mark = await stream.expect(InSync)
            assert mark.vm_ids == ()
            assert it.hub.trusts(it.node_id)
            assert it.state.nodes[it.node_id].record.state is NodeState.READY
            vm_id = await it.permitted_vm()
            told = await stream.expect(Desired)
            while not told.permitted:
                told = await stream.expect(Desired)
            assert (told.vm_id, told.generation, told.boot_id) == (vm_id, 1, "boot-1")
            assert told.term == it.applier.term

            again = await it.joined()
            assert (await again.expect(Desired)).permitted
            assert (await again.expect(InSync)).vm_ids == (vm_id,)

    virtual(main())


def test_several_vms_are_told_of_in_one_message_to_an_agent_that_takes_it() -> None:
    async def main() -> None:
        async with site() as it:
            await it.joined()
            vm_ids = tuple(sorted([await it.permitted_vm("a"), await it.permitted_vm("b")]))
            plain = await it.joined()
            assert [(await plain.expect(Desired)).vm_id for _ in vm_ids] == list(vm_ids)
            await plain.expect(InSync)

            stream = await it.joined(together=True)
            told = await stream.expect(DesiredTogether)
            assert tuple(each.vm_id for each in told.desired) == vm_ids
            assert (await stream.expect(InSync)).vm_ids == vm_ids
            running = [
                VmReport(vm_id=vm_id, generation=1, power=ObservedPower.RUNNING, permit_used=True)
                for vm_id in vm_ids
            ]
            await stream.send(ReportsTogether(reports=tuple(running)))
            await asyncio.sleep(1)
            assert {it.seen(vm_id) for vm_id in vm_ids} == {ObservedPower.RUNNING}

    virtual(main())


@pytest.mark.parametrize(
    "hello",
    [
        a_hello(node_name="n2"),
        a_hello(protocol=PROTOCOL_LEVEL + 1),
        Heartbeat(number=1),
    ],
)
def test_who_is_not_what_its_certificate_says_is_rejected(hello: Any) -> None:
    async def main() -> None:
        async with site() as it:
            stream = it.dial()
            await stream.send(hello)
            rejected = await stream.expect(Rejected)
            assert rejected.problem.code == "forbidden"
            assert it.state.nodes == {}

    virtual(main())


def test_an_agent_that_accepts_another_term_is_rejected() -> None:
    async def main() -> None:
        async with site() as it:
            stream = it.dial()
            await stream.send(a_hello())
            await stream.expect(Welcome)
            await stream.send(TermAccepted(term=Term(9, 9)))
            await stream.expect(Rejected)
            assert not it.hub.trusts(it.node_id)

    virtual(main())


def test_agents_that_come_all_at_once_are_greeted_in_turn() -> None:
    async def main() -> None:
        async with site() as it:
            await asyncio.gather(*(greeted(it, f"m{n}") for n in range(5 * GREETINGS_MAX)))
            assert len(it.hub.connected()) == 5 * GREETINGS_MAX

    virtual(main())


def test_more_than_can_wait_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "GREETINGS_WAITING_MAX", 3)

    async def main() -> None:
        async with site() as it:
            slow = [it.dial(f"m{n}") for n in range(GREETINGS_MAX + 3)]
            late = it.dial("late")
            await asyncio.sleep(A_WHILE_S)
            # It has read the hello by then: an agent that still sends learns nothing.
            assert not late.peer.sent
            await late.send(a_hello(node_name="late"))
            assert (await late.expect(Rejected)).problem == problem_of(
                Overloaded("too many agents wait to be greeted")
            )
            for each in slow:
                await each.close()
            await asyncio.sleep(A_WHILE_S)
            await greeted(it, "late")

    virtual(main())


def test_a_leader_that_ceases_sends_agents_on_without_a_word_in_its_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand of them come at once, and it has better things to do."""

    async def lost(_: Command[Any]) -> Any:
        raise LeadershipLost("another replica leads")

    async def main() -> None:
        async with site() as it:
            monkeypatch.setattr(it.applier, "submit", lost)
            stream = it.dial()
            await stream.send(a_hello())
            told = await stream.expect(Rejected)
            assert told.problem == problem_of(LeadershipLost("another replica leads"))

    virtual(main())
    assert not caplog.records


def test_a_greeting_that_takes_too_long_is_ended() -> None:
    async def main() -> None:
        async with site() as it:
            stream = it.dial()
            await asyncio.sleep(GREETING_TIMEOUT_S + 1)
            assert isinstance(await stream.receive(), Rejected)

    virtual(main())


def test_a_greeting_that_fails_after_the_node_was_admitted_leaves_no_session() -> None:
    async def main() -> None:
        async with site() as it:
            stream = it.dial()
            await stream.send(a_hello())
            welcome = await stream.expect(Welcome)
            it.writer.writable.clear()
            await stream.send(TermAccepted(term=welcome.term))
            await asyncio.sleep(GREETING_TIMEOUT_S + 1)
            it.writer.writable.set()

            assert not it.hub.trusts(it.node_id)
            assert it.hub.silent_for_s(it.node_id) is None
            await it.joined()
            await asyncio.sleep(A_WHILE_S)
            assert it.hub.trusts(it.node_id)

    virtual(main())


def test_a_node_is_trusted_only_when_what_it_found_is_taken_in() -> None:
    """A permit given before could meet a guest that runs after all."""

    async def main() -> None:
        async with site() as it:
            await it.joined()
            await asyncio.sleep(A_WHILE_S)
            vm_id = await it.permitted_vm()
            trusted: list[tuple[bool, ObservedPower]] = []
            it.hub.on_trust_change(
                lambda node_id: trusted.append((it.hub.trusts(node_id), it.seen(vm_id)))
            )
            await it.joined(a_report(vm_id, ObservedPower.RUNNING))
            await asyncio.sleep(A_WHILE_S)
            assert it.seen(vm_id) is ObservedPower.RUNNING
            assert {seen for trusts, seen in trusted if trusts} == {ObservedPower.RUNNING}

    virtual(main())


def test_after_a_restore_a_node_is_trusted_only_once_it_has_told_what_it_has() -> None:
    async def main() -> None:
        async with site() as it:
            restored = Restored(backup_at=BORN, at=BORN)
            it.state.put(
                Cluster(id="cluster-1", cell=CELL, epoch=9, created_at=BORN, restored=restored), 1
            )
            stream = await it.joined()
            await stream.expect(InSync)
            await asyncio.sleep(A_WHILE_S)
            assert it.state.nodes[it.node_id].record.state is NodeState.READY
            assert it.hub.connected() == (it.node_id,)
            assert it.hub.silent_for_s(it.node_id) is not None
            assert not it.hub.trusts(it.node_id)

            query = Query(id="q", kind=QueryKind.SURVEY, vm_id="", domain_name="")
            asked = asyncio.ensure_future(it.hub.ask(it.node_id, query))
            assert (await stream.expect(Query)).kind is QueryKind.SURVEY
            await stream.send(Answer(query_id="q", data=b"all of it"))
            assert await asked == b"all of it"
            await it.submit(NoteTold(node_id=it.node_id, unrecorded=(), by=LEADER))
            assert it.hub.trusts(it.node_id)

    virtual(main())


def test_a_newer_session_displaces_the_older_one() -> None:
    async def main() -> None:
        async with site() as it:
            first = await it.joined()
            await first.expect(InSync)
            second = await it.joined()
            await second.expect(InSync)
            await asyncio.sleep(A_WHILE_S)
            assert first.peer.closed
            assert not second.peer.closed
            assert it.hub.trusts(it.node_id)
            await second.close()
            await asyncio.sleep(A_WHILE_S)
            assert not it.hub.trusts(it.node_id)

    virtual(main())


def test_the_same_content_is_pushed_once() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            await stream.expect(InSync)
            vm_id = await it.permitted_vm()
            await asyncio.sleep(A_WHILE_S)
            await stream.send(a_report(vm_id, ObservedPower.RUNNING))
            await asyncio.sleep(A_WHILE_S)
            pushed = [m for m in stream.peer.sent if isinstance(m, Desired)]
            contents = [(m.intent, m.generation, m.permitted) for m in pushed]
            assert len(contents) == len(set(contents))
            count = len(pushed)
            # What the agent itself reports changes the record, and nothing that it is told.
            await stream.send(a_report(vm_id, ObservedPower.PAUSED))
            await asyncio.sleep(A_WHILE_S)
            assert it.seen(vm_id) is ObservedPower.PAUSED
            assert sum(isinstance(m, Desired) for m in stream.peer.sent) == count
            await it.submit(ActOnVm(vm_id=vm_id, action=VmAction.STOP, by=USER))
            await asyncio.sleep(A_WHILE_S)
            assert sum(isinstance(m, Desired) for m in stream.peer.sent) == count + 1

    virtual(main())


def test_heartbeats_are_seen_and_silence_is_counted() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            await stream.expect(InSync)
            await stream.send(Heartbeat(number=7))
            seen = await stream.expect(HeartbeatSeen)
            assert (seen.number, seen.term) == (7, it.applier.term)
            assert it.hub.silent_for_s(it.node_id) == 0
            await asyncio.sleep(30)
            assert it.hub.silent_for_s(it.node_id) == 30

    virtual(main())


def test_an_agent_is_heard_while_writes_are_suspended() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            await stream.expect(InSync)
            vm_id = await it.permitted_vm()
            it.writer.writable.clear()
            await stream.send(a_report(vm_id, ObservedPower.RUNNING))
            await asyncio.sleep(30)
            await stream.send(Heartbeat(number=8))
            assert (await stream.expect(HeartbeatSeen)).number == 8
            assert it.hub.silent_for_s(it.node_id) == 0
            await stream.send(a_report(vm_id, ObservedPower.PAUSED))
            it.writer.writable.set()
            await asyncio.sleep(A_WHILE_S)
            assert it.seen(vm_id) is ObservedPower.PAUSED

    virtual(main())


def test_a_second_machine_with_a_nodes_certificate_is_refused() -> None:
    async def main() -> None:
        async with site() as it:
            first = await it.joined()
            await first.expect(InSync)
            twin = it.dial()
            await twin.send(a_hello(boot_id="boot-2", incarnation="i2"))
            rejected = await twin.expect(Rejected)
            assert rejected.problem.code == "conflict"
            assert it.state.nodes[it.node_id].record.boot_id == "boot-1"
            assert not first.peer.closed

    virtual(main())


def test_a_node_that_booted_anew_is_let_in_once_its_last_boot_is_not_heard() -> None:
    async def main() -> None:
        async with site() as it:
            before = await it.joined()
            await before.expect(InSync)
            await asyncio.sleep(HubSettings().silence_limit_s)
            after = await it.joined(boot_id="boot-2")
            await after.expect(InSync)
            assert it.state.nodes[it.node_id].record.boot_id == "boot-2"
            await asyncio.sleep(A_WHILE_S)
            assert before.peer.closed

    virtual(main())


def test_what_a_node_reports_of_itself_is_written() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            await stream.send(InventoryReport(inventory=INVENTORY, foreign_domains=("pet",)))
            await asyncio.sleep(A_WHILE_S)
            assert it.state.nodes[it.node_id].record.foreign_domains == ("pet",)

    virtual(main())


def test_a_report_that_cannot_be_taken_costs_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with site() as it:
            submit = it.applier.submit

            async def refusing(command: Any) -> Any:
                if getattr(getattr(command, "report", None), "vm_id", "") == "vm-odd":
                    raise IllegalTransition("nothing follows")
                return await submit(command)

            monkeypatch.setattr(it.applier, "submit", refusing)
            stream = await it.joined(a_report("vm-odd", ObservedPower.RUNNING))
            await stream.expect(InSync)
            await stream.send(a_report("vm-odd", ObservedPower.CRASHED))
            await stream.send(Heartbeat(number=1))
            await stream.expect(HeartbeatSeen)

    virtual(main())


def a_query(number: int = 1) -> Query:
    return Query(id=f"query-{number}", kind=QueryKind.CONSOLE_LOG, vm_id="vm-1", domain_name="vm-1")


def test_queries_are_answered_refused_or_given_up() -> None:
    async def main() -> None:
        async with site() as it:
            with pytest.raises(NodeUnreachable):
                await it.hub.ask("node-none", a_query())
            stream = await it.joined()
            await stream.expect(InSync)

            asked = asyncio.ensure_future(it.hub.ask(it.node_id, a_query()))
            await stream.expect(Query)
            await stream.send(Answer(query_id="query-other", data=b"not this"))
            await stream.send(Answer(query_id="query-1", data=b"lines"))
            assert await asked == b"lines"

            asked = asyncio.ensure_future(it.hub.ask(it.node_id, a_query()))
            await stream.expect(Query)
            problem = problem_of(NodeUnreachable("no such log"))
            await stream.send(Answer(query_id="query-1", problem=problem))
            with pytest.raises(NodeUnreachable, match="no such log"):
                await asked

            began_s = asyncio.get_running_loop().time()
            with pytest.raises(NodeUnreachable, match="did not answer"):
                await it.hub.ask(it.node_id, a_query())
            assert asyncio.get_running_loop().time() == began_s + QUERY_TIMEOUT_S
            await stream.send(Answer(query_id="query-1", data=b"too late"))

    virtual(main())


def test_queries_to_one_node_are_bounded_and_end_with_its_session() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            await stream.expect(InSync)
            asked = [
                asyncio.ensure_future(it.hub.ask(it.node_id, a_query(number)))
                for number in range(QUERIES_PER_NODE_MAX)
            ]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await it.hub.ask(it.node_id, a_query(99))
            await stream.close()
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(end, NodeUnreachable) for end in ends)

    virtual(main())


def test_a_closed_hub_ends_every_session() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.joined()
            await stream.expect(InSync)
            it.hub.close()
            await asyncio.sleep(A_WHILE_S)
            assert stream.peer.closed
            assert not it.hub.trusts(it.node_id)

    virtual(main())
