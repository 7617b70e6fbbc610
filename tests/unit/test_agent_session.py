"""The agent's session with a leader played by the test: greeting, reports, starting over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from agent.app import Agent, AgentPorts
from agent.append_log import MemoryLog
from agent.inventory import NodeFacts
from agent.session import INVENTORY_PERIOD_S, Outgoing
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState, simulated_facts
from agent.simulated_fabric import SimulatedRelays
from shared.codec import pack, unpack
from shared.errors import Disconnected, NodeUnreachable
from shared.model import DiskSpec, ObservedPower, Term
from shared.offload import inline
from shared.problems import problem_of
from shared.protocol import (
    Answer,
    DesiredTogether,
    DestinationCheck,
    DestinationQuestion,
    Heartbeat,
    HeartbeatSeen,
    Hello,
    InSync,
    InventoryReport,
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
from tests.sim.virtual_loop import run_virtual
from tests.unit.agent_world import StillClock
from tests.unit.core_world import desired, spec
from tests.unit.pipes import PipeEnd, pipe

VM = "vm-1"
FIRST = Term(1, 1)


class Site:
    """One agent and the replicas it dials; the test takes their ends of the streams."""

    def __init__(self) -> None:
        self.state = SimulatedNodeState(simulated_facts())
        self.driver = SimulatedDriver(self.state, StillClock())
        self.dialled: list[str] = []
        self.refusing = False
        self.streams: asyncio.Queue[PipeEnd] = asyncio.Queue()
        facts = NodeFacts(
            name="n1",
            address="192.0.2.1",
            relay_address="192.0.2.1:8445",
            labels={},
            boot_id="boot-1",
            incarnation="i1",
            agent_version="0.1.0",
        )
        ports = AgentPorts(
            hypervisor=self.driver,
            relays=SimulatedRelays(self.state.fabric, self.state.address),
            log=MemoryLog(),
            offload=inline,
            dial=self._dial,
            rng=random.Random(1),
        )
        self.agent = Agent(facts, ("r1:8444", "r2:8444"), ports)
        self.running = asyncio.ensure_future(self.agent.run())

    async def _dial(self, address: str) -> PipeEnd:
        self.dialled.append(address)
        if self.refusing:
            raise Disconnected("nobody listens")
        ours, theirs = pipe()
        self.streams.put_nowait(theirs)
        return ours

    async def accept(self) -> PipeEnd:
        async with asyncio.timeout(120):
            return await self.streams.get()

    async def welcome(
        self, term: Term = FIRST, silence_limit_s: float = 1000.0, *, together: bool = False
    ) -> tuple[PipeEnd, Hello]:
        """Greet the agent as a leader does; streams that it gave up are left out."""
        stream = await self.accept()
        while stream.peer.closed:
            stream = await self.accept()
        hello: Hello = await stream.expect(Hello)
        await stream.send(
            Welcome(
                term=term,
                node_id="node-1",
                cluster_id="cluster-1",
                heartbeat_period_s=2,
                silence_limit_s=silence_limit_s,
                together=together,
            )
        )
        accepted = await stream.receive()
        assert accepted == TermAccepted(term=term)
        return stream, hello


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    made = Site()
    try:
        yield made
        assert not made.running.done(), "nothing that a peer does ends the agent"
    finally:
        made.running.cancel()
        await asyncio.gather(made.running, return_exceptions=True)


def virtual(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


def test_a_greeting_and_what_follows() -> None:
    async def main() -> None:
        async with site() as it:
            it.state.add_foreign("pet", "somebody-elses")
            leader, hello = await it.welcome()
            assert (hello.node_name, hello.boot_id) == ("n1", "boot-1")
            assert (hello.domains, hello.foreign_domains) == ((), ("pet",))
            assert it.agent.fence.term == Term(1, 1)
            assert it.agent.node_id == "node-1"

            await leader.send(desired())
            await leader.send(InSync(term=Term(1, 1), vm_ids=(VM,)))
            report = await leader.expect(VmReport)
            assert (report.vm_id, report.power) == (VM, ObservedPower.RUNNING)
            first, second = await leader.expect(Heartbeat), await leader.expect(Heartbeat)
            assert second.number == first.number + 1

    virtual(main())


def test_several_vms_are_told_of_in_one_message_to_a_leader_that_takes_it() -> None:
    async def main() -> None:
        async with site() as it:
            leader, hello = await it.welcome(together=True)
            assert hello.together
            other = replace(desired(), vm_id="vm-2", name="b", domain_name="vm-2")
            await leader.send(DesiredTogether(desired=(desired(), other)))
            told = await leader.expect(ReportsTogether)
            assert {each.vm_id for each in told.reports} == {VM, "vm-2"}
            await asyncio.sleep(60)
            assert sorted(it.state.domains) == [VM, "vm-2"]

    virtual(main())


def test_whatever_ends_a_session_the_agent_comes_back_and_guests_go_on() -> None:
    async def main() -> None:
        async with site() as it:
            leader, _ = await it.welcome()
            await leader.send(desired())
            await leader.expect(VmReport)
            await leader.close()

            leader, hello = await it.welcome(Term(1, 2))
            assert [each.power for each in hello.domains] == [ObservedPower.RUNNING]
            # A leader that is not the newest any more: its session is left.
            await it.agent.fence.accept_term(Term(1, 3))
            await leader.send(HeartbeatSeen(term=Term(1, 2), number=1))

            leader, _ = await it.welcome(Term(1, 3))
            it.state.libvirtd_dies()
            await leader.send(InSync(term=Term(1, 3), vm_ids=(VM,)))
            await asyncio.sleep(60)
            it.state.libvirtd_returns()
            leader, _ = await it.welcome(Term(1, 4))
            assert it.state.domains[VM].power is ObservedPower.RUNNING

    virtual(main())


def test_a_welcome_of_an_older_term_is_refused() -> None:
    async def main() -> None:
        async with site() as it:
            await it.agent.fence.accept_term(Term(2, 1))
            stream = await it.accept()
            await stream.expect(Hello)
            await stream.send(
                Welcome(
                    term=Term(1, 9),
                    node_id="node-1",
                    cluster_id="c",
                    heartbeat_period_s=2,
                    silence_limit_s=10,
                )
            )
            await it.welcome(Term(2, 1))
            assert it.agent.fence.term == Term(2, 1)

    virtual(main())


def test_who_does_not_lead_says_who_does() -> None:
    async def main() -> None:
        async with site() as it:
            stream = await it.accept()
            await stream.send(NotLeader(agent_address="r9:8444"))
            await it.welcome()
            assert it.dialled[-1] == "r9:8444"

    virtual(main())


def test_replicas_are_tried_in_turn_until_one_takes_the_session() -> None:
    async def main() -> None:
        async with site() as it:
            it.refusing = True
            await asyncio.sleep(60)
            assert set(it.dialled) == {"r1:8444", "r2:8444"}
            it.refusing = False
            for answer in (
                NotLeader(),
                Rejected(problem=problem_of(NodeUnreachable("not you"))),
                InSync(term=Term(1, 1), vm_ids=()),
            ):
                stream = await it.accept()
                await stream.send(answer)
            silent = await it.accept()
            await silent.expect(Hello)
            await it.welcome()

    virtual(main())


def test_queries_are_answered_and_what_is_not_known_is_said() -> None:
    async def main() -> None:
        async with site() as it:
            leader, _ = await it.welcome()
            await leader.send(desired())
            await leader.expect(VmReport)
            await asyncio.sleep(5)
            for number, (kind, name) in enumerate(
                [(QueryKind.CONSOLE_LOG, VM), (QueryKind.UNKNOWN, VM)]
            ):
                await leader.send(
                    Query(id=str(number), kind=kind, vm_id=VM, domain_name=name, offset=-16)
                )
            answers = {}
            for _ in range(2):
                answer = await leader.expect(Answer)
                answers[answer.query_id] = answer
            assert b"count" in answers["0"].data
            assert answers["1"].problem is not None

    virtual(main())


def test_a_node_is_asked_what_stands_against_a_migration() -> None:
    async def main() -> None:
        async with site() as it:
            leader, _ = await it.welcome()

            async def asked(kind: QueryKind, vm_id: str = VM, payload: bytes = b"") -> Answer:
                await leader.send(
                    Query(id="q", kind=kind, vm_id=vm_id, domain_name=VM, payload=payload)
                )
                answer: Answer = await leader.expect(Answer)
                return answer

            source, destination = QueryKind.MIGRATION_SOURCE, QueryKind.MIGRATION_DESTINATION
            problem = (await asked(source)).problem
            assert problem is not None, "no such domain"
            await leader.send(desired())
            await leader.expect(VmReport)
            check = unpack((await asked(source)).data, SourceCheck)
            assert (check.blockers, check.machine) == ((), "pc-q35-7.2")
            assert (await asked(source, "vm-2")).problem is not None, "that is another VM's name"
            it.driver.guest_powers_off(VM)
            (blocker,) = unpack((await asked(source)).data, SourceCheck).blockers
            assert blocker.code == "not_running"

            question = DestinationQuestion(
                vm_id=VM,
                domain_uuid="00000000-0000-0000-0000-000000000001",
                spec=spec(disks=(DiskSpec(name="root", size_gib=1),)),
                copied=(),
                machine="pc-q35-99.0",
                cpu_xml="",
            )
            answer = await asked(destination, payload=pack(question))
            codes = {each.code for each in unpack(answer.data, DestinationCheck).blockers}
            assert codes == {"machine_type", "disk_not_shared"}
            assert (await asked(destination, payload=b"\xc1")).problem is not None

    virtual(main())


def test_a_leader_that_answers_no_heartbeat_is_given_up() -> None:
    async def main() -> None:
        async with site() as it:
            leader, _ = await it.welcome(silence_limit_s=10)
            await asyncio.sleep(9)
            assert not leader.peer.closed
            await leader.send(HeartbeatSeen(term=Term(1, 1), number=4))
            await asyncio.sleep(9)
            assert not leader.peer.closed
            await asyncio.sleep(2)
            assert leader.peer.closed
            await it.welcome()
            assert it.agent.session.connected

    virtual(main())


def test_what_changed_of_the_node_is_told() -> None:
    async def main() -> None:
        async with site() as it:
            leader, _ = await it.welcome()
            await asyncio.sleep(3 * INVENTORY_PERIOD_S)
            assert not [m for m in leader.peer.sent if isinstance(m, InventoryReport)]
            it.state.add_foreign("pet", "somebody-elses")
            report = await leader.expect(InventoryReport)
            assert report.foreign_domains == ("pet",)

    virtual(main())


async def test_waiting_reports_are_the_newest_of_each_vm_in_order() -> None:
    waiting = Outgoing()

    def report(vm_id: str, revision: int) -> VmReport:
        return VmReport(
            vm_id=vm_id,
            generation=1,
            power=ObservedPower.RUNNING,
            permit_used=True,
            revision=revision,
        )

    for vm_id, revision in (("a", 1), ("b", 1), ("a", 2)):
        waiting.put(report(vm_id, revision))
    unsent = await waiting.take(1)
    assert isinstance(unsent, tuple)
    waiting.put_back(unsent[0])
    assert await waiting.take(5) == (report("b", 1), report("a", 2))
    waiting.put(report("b", 2))
    waiting.put_back(report("b", 1))
    waiting.put(report("c", 1))
    assert await waiting.take(1) == (report("b", 2),)
    assert await waiting.take(1) == (report("c", 1),)
