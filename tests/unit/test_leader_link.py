"""The way to the leader: handed on, waited for, and never done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from controlplane.commands.draft import Command
from controlplane.commands.nodes import SetCordon
from controlplane.commands.terms import Decided, OnTerms, RequestKey
from controlplane.commands.vms import CreateVm
from controlplane.sessions.leader_link import SUBMIT_LIMIT_S, LeaderLink
from controlplane.sessions.peer_messages import (
    AskNode,
    NodeAnswered,
    PeerAnswer,
    PeerRefused,
    PeerRequest,
    Submit,
    Submitted,
)
from controlplane.state import ClusterState
from shared.codec import pack, unpack
from shared.errors import (
    Disconnected,
    FieldError,
    NameTaken,
    NodeUnreachable,
    NoLeader,
    NovacronError,
    OutcomeUnknown,
    Unavailable,
    UpgradeBlocked,
    ValidationFailed,
)
from shared.model import ApiKey
from shared.problems import error_of, problem_of
from shared.protocol import Query, QueryKind
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import USER, spec

CORDON = SetCordon(node_id="node-1", cordoned=True, reason="", by=USER)
KEYED = OnTerms(command=CORDON, key=RequestKey(id="k", principal="u", fingerprint="f"))
QUERY = Query(id="q", kind=QueryKind.CONSOLE_LOG, vm_id="vm-1", domain_name="vm-1")

Reply = Callable[[PeerRequest], Awaitable[PeerAnswer]]


class Here:
    """This replica as a leader, which notes what it was given."""

    def __init__(self) -> None:
        self.leads = False
        self.given: list[Any] = []

    async def submit(self, command: Command[Any], limit_s: float) -> Any:
        self.given.append(command)
        return "done-here"

    async def ask(self, node_id: str, query: Query) -> bytes:
        self.given.append(query)
        return b"asked here"


class World:
    """A follower; ``replies`` are what the leader at its address does with one request each."""

    def __init__(self, *replies: Reply) -> None:
        self.here = Here()
        self.state = ClusterState()
        self.address: str | None = "r2:8444"
        self.replies = list(replies)
        self.sent: list[PeerRequest] = []
        self.link = LeaderLink(self.here, self.state, lambda: self.address, self.call)

    async def call(self, address: str, request: PeerRequest, limit_s: float) -> PeerAnswer:
        # As on the wire: what does not survive it does not arrive.
        decoded: PeerRequest = unpack(pack(request), cast(Any, PeerRequest))
        assert decoded == request
        self.sent.append(decoded)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        async with asyncio.timeout(limit_s):
            answer: PeerAnswer = unpack(pack(await reply(request)), cast(Any, PeerAnswer))
        return answer


def commits(revision: int = 0) -> Reply:
    async def reply(request: PeerRequest) -> PeerAnswer:
        return Submitted(result="vm-9", replayed=False, revision=revision)

    return reply


def fails(error: NovacronError) -> Reply:
    async def reply(request: PeerRequest) -> PeerAnswer:
        raise error

    return reply


def refuses(error: NovacronError, revision: int = 0) -> Reply:
    async def reply(request: PeerRequest) -> PeerAnswer:
        return PeerRefused(problem=problem_of(error), revision=revision)

    return reply


async def never(request: PeerRequest) -> PeerAnswer:
    await asyncio.Event().wait()
    raise AssertionError


def test_where_it_leads_nothing_leaves_the_process() -> None:
    async def main() -> None:
        world = World(never)
        world.here.leads = True
        assert await world.link.submit(CORDON) == "done-here"
        assert await world.link.ask("node-1", QUERY) == b"asked here"
        assert world.here.given == [CORDON, QUERY]
        assert not world.sent

    run_virtual(main())


def test_a_command_goes_to_the_leader_as_it_is() -> None:
    async def main() -> None:
        create = CreateVm(name="a", tenant="default", labels={"x": "y"}, spec=spec(), by=USER)
        world = World(commits())
        assert await world.link.submit(create) == "vm-9"
        decided = await world.link.submit(KEYED)
        assert decided == Decided("vm-9", replayed=False)
        first, second = world.sent
        assert isinstance(first, Submit)
        assert isinstance(second, Submit)
        assert (first.command, first.key) == (create, None)
        assert (second.command, second.key) == (CORDON, KEYED.key)

    run_virtual(main())


def test_what_was_written_is_here_when_the_answer_is() -> None:
    async def main() -> None:
        world = World(commits(revision=7))
        submitting = asyncio.ensure_future(world.link.submit(CORDON))
        await asyncio.sleep(1)
        assert not submitting.done()
        world.state.advanced(7)
        assert await submitting == "vm-9"

    run_virtual(main())


def test_a_replica_that_stays_behind_says_that_it_was_done() -> None:
    async def main() -> None:
        world = World(commits(revision=7))
        with pytest.raises(OutcomeUnknown, match="was made"):
            await world.link.submit(CORDON)
        assert len(world.sent) == 1

    run_virtual(main())


def test_what_stood_against_it_is_here_when_the_refusal_is() -> None:
    async def main() -> None:
        world = World(refuses(NameTaken("web"), revision=7))
        submitting = asyncio.ensure_future(world.link.submit(CORDON))
        await asyncio.sleep(1)
        assert not submitting.done()
        world.state.advanced(7)
        with pytest.raises(NameTaken):
            await submitting

    run_virtual(main())


def test_a_replica_that_stays_behind_says_that_nothing_was_done() -> None:
    async def main() -> None:
        world = World(refuses(NameTaken("web"), revision=7))
        with pytest.raises(Unavailable, match="web"):
            await world.link.submit(CORDON)
        assert len(world.sent) == 1

    run_virtual(main())


def test_a_replica_that_stays_behind_does_not_say_of_a_doubt_that_nothing_was_done() -> None:
    async def main() -> None:
        doubt = refuses(OutcomeUnknown("etcd does not answer"), revision=7)
        world = World(doubt)
        with pytest.raises(OutcomeUnknown, match="does not answer"):
            await world.link.submit(CORDON)
        assert len(world.sent) == 1
        world = World(doubt, commits())
        assert (await world.link.submit(KEYED)).result == "vm-9"

    run_virtual(main())


def test_a_request_waits_while_nobody_leads() -> None:
    async def main() -> None:
        world = World(refuses(NoLeader("not yet")), fails(Disconnected("gone")), commits())
        world.address = None
        submitting = asyncio.ensure_future(world.link.submit(CORDON))
        await asyncio.sleep(2)
        assert not submitting.done()
        assert not world.sent
        world.address = "r3:8444"
        assert await submitting == "vm-9"
        assert len(world.sent) == 3

    run_virtual(main())


def test_a_request_that_waits_goes_on_here_when_this_replica_wins() -> None:
    async def main() -> None:
        world = World(fails(Disconnected("gone")))
        submitting = asyncio.ensure_future(world.link.submit(CORDON))
        await asyncio.sleep(1)
        world.here.leads = True
        assert await submitting == "done-here"

    run_virtual(main())


def test_in_the_end_it_is_refused_and_nothing_was_done() -> None:
    async def main() -> None:
        world = World(fails(Disconnected("gone")))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await world.link.submit(CORDON)
        assert loop.time() - began_s <= SUBMIT_LIMIT_S
        world.address = None
        with pytest.raises(NoLeader):
            await world.link.submit(CORDON)

    run_virtual(main())


def test_what_may_have_been_done_is_done_again_under_its_key_only() -> None:
    async def main() -> None:
        world = World(fails(OutcomeUnknown("no answer")), commits())
        with pytest.raises(OutcomeUnknown):
            await world.link.submit(CORDON)
        assert len(world.sent) == 1
        world = World(fails(OutcomeUnknown("no answer")), commits())
        assert (await world.link.submit(KEYED)).result == "vm-9"
        assert len(world.sent) == 2

    run_virtual(main())


def test_a_leader_that_hangs_is_left_once_another_leads() -> None:
    async def main() -> None:
        world = World(never, commits())
        plain = asyncio.ensure_future(world.link.submit(CORDON))
        await asyncio.sleep(1)
        assert not plain.done()
        world.address = "r3:8444"
        with pytest.raises(OutcomeUnknown, match="replaced"):
            await plain
        world.replies = [never, commits()]
        keyed = asyncio.ensure_future(world.link.submit(KEYED))
        await asyncio.sleep(1)
        world.address = "r2:8444"
        assert (await keyed).result == "vm-9"

    run_virtual(main())


@pytest.mark.parametrize(
    "error",
    [
        NameTaken("the name 'a' is taken"),
        ValidationFailed((FieldError("/spec/vcpus", "too_small", "is below 1"),)),
        UpgradeBlocked((FieldError("/nodes/n1", "old_agent", "is 0.1.0"),)),
    ],
)
def test_a_refusal_is_the_leaders_own(error: NovacronError) -> None:
    async def main() -> None:
        world = World(refuses(error))
        with pytest.raises(type(error)) as refused:
            await world.link.submit(CORDON)
        assert problem_of(refused.value) == problem_of(error)
        assert len(world.sent) == 1

    run_virtual(main())


def test_a_node_is_asked_through_the_leader() -> None:
    async def main() -> None:
        async def answers(request: PeerRequest) -> PeerAnswer:
            assert isinstance(request, AskNode)
            return NodeAnswered(data=request.node_id.encode())

        world = World(fails(OutcomeUnknown("lost")), answers)
        assert await world.link.ask("node-1", QUERY) == b"node-1"
        world = World(refuses(NodeUnreachable("not connected")))
        with pytest.raises(NodeUnreachable, match="not connected"):
            await world.link.ask("node-1", QUERY)
        world = World(fails(OutcomeUnknown("lost")))
        with pytest.raises(NodeUnreachable, match="did not answer"):
            await world.link.ask("node-1", QUERY)

    run_virtual(main())


def test_a_command_that_is_not_forwardable_never_leaves() -> None:
    class Own:
        def decide(self, draft: Any) -> ApiKey:
            return ApiKey(id="a", sha256="", principal="", role="", created_at=datetime.now(UTC))

    async def main() -> None:
        world = World(commits())
        with pytest.raises(AssertionError, match="never leaves"):
            await world.link.submit(Own())
        assert not world.sent

    run_virtual(main())


def test_an_unknown_code_keeps_its_meaning() -> None:
    told = problem_of(Unavailable("later"))
    newer = error_of(type(told)(**{**_fields(told), "code": "of_a_newer_release"}))
    assert isinstance(newer, Unavailable)
    assert str(newer) == "later"


def _fields(told: Any) -> dict[str, Any]:
    return {name: getattr(told, name) for name in told.__struct_fields__}
