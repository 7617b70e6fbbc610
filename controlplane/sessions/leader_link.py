"""The way to the leader, from whichever replica a request came to.

``submit`` and ``ask`` do here what the leader does where this replica leads, and hand the request
to the peer that leads otherwise. While nobody leads a request waits: an election is shorter than
what it may take. What may have been committed is never sent a second time, unless it carries an
idempotency key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from controlplane.commands.draft import Command
from controlplane.commands.forwarded import Forwardable
from controlplane.commands.terms import Decided, OnTerms
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
from shared.errors import (
    Disconnected,
    LeadershipLost,
    NodeUnreachable,
    NoLeader,
    NovacronError,
    OutcomeUnknown,
    Unavailable,
)
from shared.problems import error_of
from shared.protocol import Query

Result = TypeVar("Result")
Answer = TypeVar("Answer")

# While etcd is away, or nobody leads, a request is refused after this: an election of etcd takes 1
# to 2 s, one of a leader under a supervisor less; then the client asks again.
SUBMIT_LIMIT_S = 6.0
# A leader refuses by itself what takes too long; only one that does not answer at all is waited for
# this much longer.
ANSWER_MARGIN_S = 1.0
# A query waits 10 s for its agent (``hub.QUERY_TIMEOUT_S``).
ASK_LIMIT_S = 12.0
# How often a request that waits looks for a leader; the new one is there a few milliseconds after
# it knows.
LOOK_S = 0.05
# How often a request under way looks whether somebody else leads by now.
DOUBT_S = 0.25
# The watch brings a commit to a follower within milliseconds.
CATCH_UP_S = 3.0


class PeerCall(Protocol):
    """Asks the replica at an address, and returns its answer.

    Raises Disconnected when the request certainly did not arrive, OutcomeUnknown when it may have.
    """

    async def __call__(self, address: str, request: PeerRequest, limit_s: float) -> PeerAnswer: ...


class Here(Protocol):
    """What this replica does by itself while it leads."""

    @property
    def leads(self) -> bool: ...

    async def submit(self, command: Command[Result], limit_s: float) -> Result: ...

    async def ask(self, node_id: str, query: Query) -> bytes: ...


class LeaderLink:
    def __init__(
        self,
        here: Here,
        state: ClusterState,
        leader_address: Callable[[], str | None],
        call: PeerCall,
    ) -> None:
        """``leader_address`` is the leading peer's; None when this replica knows of none."""
        self._here = here
        self._state = state
        self._leader_address = leader_address
        self._call = call

    async def submit(self, command: Command[Result]) -> Result:
        """Commit a command wherever the leader is; what it changed, or was refused for, is in this
        replica's memory then.

        Raises the command's refusal, NoLeader and other kinds of Unavailable (nothing happened),
        OutcomeUnknown.
        """
        return await _until_led(
            lambda limit_s: self._submit(command, limit_s),
            SUBMIT_LIMIT_S,
            repeatable=isinstance(command, OnTerms) and command.key is not None,
        )

    async def ask(self, node_id: str, query: Query) -> bytes:
        """Return what a node's agent answers. Raises NodeUnreachable, Overloaded, its problem."""
        try:
            return await _until_led(
                lambda limit_s: self._ask(node_id, query, limit_s), ASK_LIMIT_S, repeatable=True
            )
        except OutcomeUnknown as silent:
            raise NodeUnreachable(f"the leader did not answer for the node: {silent}") from silent

    async def _submit(self, command: Command[Result], limit_s: float) -> Result:
        if self._here.leads:
            return await self._here.submit(command, limit_s)
        order = _order(command, limit_s)
        done = await self._at_leader(order, limit_s + ANSWER_MARGIN_S, Submitted)
        if not await self._has_seen(done.revision):
            raise OutcomeUnknown(
                "the change was made, but this replica has not seen it yet: read it back"
            )
        if isinstance(command, OnTerms):
            decided: Any = Decided(done.result, replayed=done.replayed)
        else:
            decided = done.result
        result: Result = decided
        return result

    async def _ask(self, node_id: str, query: Query, limit_s: float) -> bytes:
        if self._here.leads:
            return await self._here.ask(node_id, query)
        request = AskNode(node_id=node_id, query=query)
        return (await self._at_leader(request, limit_s, NodeAnswered)).data

    async def _at_leader(self, request: PeerRequest, limit_s: float, kind: type[Answer]) -> Answer:
        address = self._leader_address()
        if address is None:
            raise NoLeader("no replica leads at present")
        answer = await self._unless_replaced(address, self._call(address, request, limit_s))
        if isinstance(answer, PeerRefused):
            error = error_of(answer.problem)
            # Whoever asks here next is to find what stood against it.
            seen = await self._has_seen(answer.revision)
            # What may have been done stays so: only a refusal says that nothing was.
            if seen or isinstance(error, OutcomeUnknown):
                raise error
            raise Unavailable(f"{error}; this replica has not seen it yet")
        if not isinstance(answer, kind):
            raise OutcomeUnknown(f"the leader at {address} answered something else")
        return answer

    async def _unless_replaced(self, address: str, call: Awaitable[PeerAnswer]) -> PeerAnswer:
        """Return the answer; one of a replica that does not lead any more is not waited for."""
        calling = asyncio.ensure_future(call)
        try:
            while not calling.done():
                await asyncio.wait({calling}, timeout=DOUBT_S)
                if not calling.done() and self._leader_address() != address:
                    raise OutcomeUnknown(f"the leader at {address} was replaced before it answered")
            return calling.result()
        finally:
            calling.cancel()

    async def _has_seen(self, revision: int) -> bool:
        """Wait until what the leader had seen has come here; False when it does not come."""
        try:
            async with asyncio.timeout(CATCH_UP_S):
                while self._state.revision < revision:
                    await self._state.changes.wait()
        except TimeoutError:
            return False
        return True


async def _until_led(
    attempt: Callable[[float], Awaitable[Result]], limit_s: float, *, repeatable: bool
) -> Result:
    """Return what an attempt returns; try again as long as it certainly did nothing.

    ``repeatable``: one that may have done something does no harm a second time.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limit_s
    while True:
        try:
            return await attempt(end_s - loop.time())
        except (NoLeader, LeadershipLost) as nobody:
            problem: NovacronError = nobody
        except Disconnected as away:
            problem = Unavailable(f"the leader cannot be reached: {away}")
        except OutcomeUnknown as unknown:
            if not repeatable:
                raise
            problem = unknown
        if loop.time() + LOOK_S >= end_s:
            raise problem
        await asyncio.sleep(LOOK_S)


def _order(command: Command[Any], limit_s: float) -> Submit:
    key, expected = None, None
    if isinstance(command, OnTerms):
        key, expected, command = command.key, command.expected, command.command
    assert isinstance(command, Forwardable), f"{type(command).__name__} never leaves its process"
    return Submit(command=command, key=key, expected=expected, limit_s=limit_s)
