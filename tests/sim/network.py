"""The network between hosts: seeded delays, cuts, stalls and broken streams.

A ``Stream`` is ``shared.channel.Channel`` with the semantics of a gRPC stream over TCP: messages
arrive in order, or the stream breaks and says so to both ends. Nothing is reordered or lost inside
a stream; what a cut holds back arrives when it heals, unless keep-alive broke the stream before.
Messages cross as bytes, so that codecs are exercised. Between streams nothing is promised.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from shared.codec import pack, unpack
from shared.errors import Disconnected
from tests.sim.process import Process, current, later
from tests.sim.trace import Trace
from tests.sim.virtual_loop import true_time_s

# As agent/session_grpc.py waits for a connection, and as shared/grpc_channel.py's keep-alive finds
# a dead peer: 20 s of silence, then 5 s for the answer.
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 25.0
# gRPC's window is 64 KiB: so many small messages may be unread before a sender waits.
WINDOW_MESSAGES = 64
# On a real loop a timer runs a little early, by its clock's resolution. What is not let through
# then is asked for again at once.
TIMER_EARLY_S = 1e-6

Address = str
Link = tuple[str, str]


class Kinds(Struct, frozen=True):
    """What either side of a method decodes; ``lasting`` streams are worth telling of."""

    by_server: Any
    by_client: Any
    lasting: bool = True


class NetworkSettings(Struct, frozen=True, kw_only=True):
    """Delays in one direction are drawn between these two."""

    delay_min_s: float = 0.0002
    delay_max_s: float = 0.003


Serve = Callable[[str, "Stream", str], Awaitable[None]]


class _Listener(Struct):
    process: Process
    serve: Serve
    kinds: dict[str, Any] | None = None

    def kind(self, method: str, usual: Any) -> Any:
        return usual if self.kinds is None else self.kinds[method]

    def serves(self, method: str) -> bool:
        return self.kinds is None or method in self.kinds


class Lost(Exception):
    """What was on its way was given up: its connection is dead."""


class Network:
    """All hosts and the conditions between them; ``cut`` is in one direction."""

    def __init__(
        self,
        rng: random.Random,
        trace: Trace,
        methods: dict[str, Kinds],
        settings: NetworkSettings | None = None,
    ) -> None:
        self._rng = rng
        self._trace = trace
        self._methods = methods
        self._settings = settings or NetworkSettings()
        self._listeners: dict[Address, _Listener] = {}
        self._cuts: dict[Link, asyncio.Event] = {}
        self._slow: dict[Link, tuple[float, float]] = {}
        self._streams: list[tuple[Stream, Stream]] = []

    # What the cluster does.

    def listen(
        self,
        process: Process,
        address: Address,
        serve: Serve,
        kinds: dict[str, Any] | None = None,
    ) -> None:
        """Serve streams that are opened to ``address``, each in a task of the process.

        ``kinds``: the only methods it knows, and what it takes their messages for.
        """
        listener = _Listener(process, serve, kinds)
        self._listeners[address] = listener

        def forget() -> None:
            if self._listeners.get(address) is listener:
                del self._listeners[address]

        process.at_death(forget)

    async def dial(self, address: Address, method: str, kind: Any = None) -> Stream:
        """Open a stream from the current process. Raises Disconnected.

        ``kind``: what it takes the answers for, if not for what the present release does.
        """
        source = current()
        assert source is not None, "only a process dials"
        source.check()
        host = address.partition(":")[0]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self.passage(source.host, host)
                if (listener := self._listeners.get(address)) is not None:
                    await listener.process.runs()
                await self.passage(host, source.host)
        except (TimeoutError, Lost):
            raise Disconnected(f"{address} did not accept a connection in time") from None
        finally:
            source.check()
        listener = self._listeners.get(address)
        if listener is None or not listener.serves(method):
            raise Disconnected(f"nothing listens at {address}")
        kinds = self._methods[method]
        there, back = _Pipe(self, source.host, host), _Pipe(self, host, source.host)
        there.opposite, back.opposite = back, there
        client = Stream(source, there, back, kind or kinds.by_client)
        server = Stream(listener.process, back, there, listener.kind(method, kinds.by_server))
        self._streams = [pair for pair in self._streams if not _over(pair)]
        self._streams.append((client, server))
        if kinds.lasting:
            opened = f"{source.incarnation} -> {listener.process.incarnation}"
            self._trace.note(f"open {opened} {method}")
        listener.process.spawn(
            self._serve(listener, method, server, source.host), f"{address}{method}"
        )
        return client

    async def passage(self, source: str, target: str) -> None:
        """Return when something sent now would have arrived. Raises Lost after a long cut."""
        await asyncio.sleep(self.delay_s(source, target))
        if (source, target) not in self._cuts:
            return
        try:
            async with asyncio.timeout(KEEPALIVE_S):
                while (cut := self._cuts.get((source, target))) is not None:
                    await cut.wait()
        except TimeoutError:
            raise Lost(f"{source} -> {target}") from None

    def delay_s(self, source: str, target: str) -> float:
        usual = (self._settings.delay_min_s, self._settings.delay_max_s)
        return self._rng.uniform(*self._slow.get((source, target), usual))

    # What faults do.

    def slow(self, source: str, target: str, least_s: float, most_s: float) -> None:
        """Let everything in one direction take between so long and so long."""
        self._slow[source, target] = (least_s, most_s)

    def speed_up(self, source: str, target: str) -> None:
        self._slow.pop((source, target), None)

    def cut(self, source: str, target: str) -> None:
        """Hold everything back in one direction until it heals."""
        link = (source, target)
        if link in self._cuts:
            return
        cut = self._cuts[link] = asyncio.Event()
        later(KEEPALIVE_S, self._keepalive, link, cut)

    def heal(self, source: str, target: str) -> None:
        cut = self._cuts.pop((source, target), None)
        if cut is None:
            return
        cut.set()
        for pipe in self._pipes():
            if (pipe.source, pipe.target) == (source, target):
                pipe.flow()

    def heal_all(self) -> None:
        self._slow.clear()
        for source, target in list(self._cuts):
            self.heal(source, target)

    def linked(self, one: str, other: str) -> bool:
        """Whether two hosts can hold a connection: bytes pass in both directions."""
        return not self.is_cut(one, other) and not self.is_cut(other, one)

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cuts

    def break_streams(self, one: str, other: str) -> int:
        """Break every stream between two hosts; what is on its way is lost. Return how many."""
        broken = 0
        for client, server in list(self._streams):
            if {client.process.host, server.process.host} == {one, other} and not _over(
                (client, server)
            ):
                client.break_off("the connection was reset")
                server.break_off("the connection was reset")
                broken += 1
        return broken

    def half_open(self, one: str, other: str) -> int:
        """Break one end of every stream between two hosts; return how many.

        The end that accepted it does not learn of that before keep-alive tells, and takes what is
        still on its way: an agent that dials anew says some of it again.
        """
        broken = 0
        for client, server in list(self._streams):
            if {client.process.host, server.process.host} == {one, other} and not client.over:
                client.lose_touch("the connection was reset")
                later(KEEPALIVE_S, server.break_off, "keep-alive got no answer")
                broken += 1
        return broken

    def paused(self, process: Process) -> None:
        """Break a paused process's streams once keep-alive has waited for it in vain."""
        later(KEEPALIVE_S, self._pause_lasts, process, process.stopped)

    def _pause_lasts(self, process: Process, pause: object) -> None:
        if pause is None or process.stopped is not pause:
            return
        for client, server in self._streams:
            if process in (client.process, server.process):
                client.break_off("keep-alive got no answer")
                server.break_off("keep-alive got no answer")

    async def _serve(self, listener: _Listener, method: str, stream: Stream, host: str) -> None:
        try:
            await listener.serve(method, stream, host)
        finally:
            await stream.close()

    def _keepalive(self, link: Link, cut: asyncio.Event) -> None:
        if self._cuts.get(link) is cut:
            self.break_streams(*link)

    def _pipes(self) -> list[_Pipe]:
        return [end.outgoing for pair in self._streams for end in pair]


class Stream:
    """One end of a stream: ``shared.channel.Channel`` for the process that holds it."""

    def __init__(self, process: Process, outgoing: _Pipe, incoming: _Pipe, kind: Any) -> None:
        self.process = process
        self.outgoing = outgoing
        self._incoming = incoming
        self._kind = kind
        process.at_death(self._die)

    @property
    def over(self) -> bool:
        return self._incoming.over and self.outgoing.over

    async def send(self, message: Any) -> None:
        self.process.check()
        await self.outgoing.room()
        self.process.check()
        self.outgoing.put(pack(message))

    async def receive(self) -> Any:
        self.process.check()
        data = await self._incoming.take()
        self.process.check()
        return unpack(data, self._kind)

    async def close(self) -> None:
        """End this side: what was sent still arrives, then the peer's ``receive`` ends."""
        if self.process.alive:
            self.outgoing.end()
            self._incoming.abandon()

    def break_off(self, why: str) -> None:
        self.outgoing.break_off(why)
        self._incoming.break_off(why)

    def lose_touch(self, why: str) -> None:
        """End this side's use of the stream; the peer hears nothing of it."""
        self.outgoing.give_up(why)
        self._incoming.abandon()

    def _die(self) -> None:
        """The kernel closes what a killed process held; without power only keep-alive tells."""
        if self.process.powered:
            self.outgoing.end()
            self._incoming.abandon()
        else:
            later(KEEPALIVE_S, self.break_off, "keep-alive got no answer")


class _Pipe:
    """One direction of a stream: bytes in order, each with the time it arrives at the earliest."""

    def __init__(self, network: Network, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self._network = network
        self._on_the_way: deque[tuple[float, bytes | None]] = deque()
        self._arrived: deque[bytes] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._ended = False
        self._abandoned = False
        self._problem: str | None = None
        self._given_up: str | None = None
        self._last_due = 0.0
        self.opposite: _Pipe | None = None

    @property
    def over(self) -> bool:
        return self._problem is not None

    async def room(self) -> None:
        while len(self._on_the_way) + len(self._arrived) >= WINDOW_MESSAGES:
            self._refuse_broken()
            self._changed.clear()
            await self._changed.wait()
        self._refuse_broken()

    def put(self, data: bytes | None) -> None:
        self._refuse_broken()
        now_s = true_time_s()
        due = max(self._last_due, now_s + self._network.delay_s(self.source, self.target))
        self._last_due = due
        self._on_the_way.append((due, data))
        if self._timer is None:
            self._timer = later(due - now_s, self.flow)

    def end(self) -> None:
        if not self._ended and self._problem is None and self._given_up is None:
            self.put(None)
            self._ended = True

    def flow(self) -> None:
        """Let arrive what is due, unless the direction is cut; then healing calls this again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._problem is not None or self._network.is_cut(self.source, self.target):
            return
        now_s = true_time_s()
        while self._on_the_way and self._on_the_way[0][0] <= now_s + TIMER_EARLY_S:
            data = self._on_the_way.popleft()[1]
            if data is None:
                self._problem = "the peer ended the stream"
                assert self.opposite is not None, "pipes come in pairs"
                self.opposite.break_off(self._problem)
            elif not self._abandoned:
                self._arrived.append(data)
        if self._on_the_way and self._problem is None:
            self._timer = later(self._on_the_way[0][0] - now_s, self.flow)
        self._changed.set()

    async def take(self) -> bytes:
        while not self._arrived:
            if self._problem is not None or self._abandoned:
                raise Disconnected(self._problem or "this end closed the stream")
            self._changed.clear()
            await self._changed.wait()
        data = self._arrived.popleft()
        self._changed.set()
        return data

    def abandon(self) -> None:
        """Nobody reads here any more; the sender learns of it when the other direction ends."""
        self._abandoned = True
        self._arrived.clear()
        self._changed.set()

    def break_off(self, why: str) -> None:
        if self._problem is None:
            self._problem = why
            self._on_the_way.clear()
            self._arrived.clear()
            self._changed.set()

    def give_up(self, why: str) -> None:
        """Take nothing more from the sender; what is on its way still arrives."""
        self._given_up = self._given_up or why
        self._changed.set()

    def _refuse_broken(self) -> None:
        problem = self._problem or self._given_up
        if self._ended or problem is not None:
            raise Disconnected(problem or "this end closed the stream")


def _over(pair: tuple[Stream, Stream]) -> bool:
    return pair[0].over and pair[1].over
