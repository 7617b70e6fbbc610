"""Following events: one stream after another, each from where the one before was cut.

What a reader has seen is known by the id of its last frame, which goes with every new request: so
no cut, restart or election makes a gap or a repetition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Struct

from controlplane.cli.client import BASE, Query, decode
from controlplane.cli.errors import ApiProblem, Exit, Unreachable
from controlplane.cli.invocation import Invocation
from controlplane.cli.views import PlaceView
from shared.retry import Backoff

# An election or a restart passes in seconds; one who follows for days must not hammer meanwhile.
BACKOFF = Backoff(first_s=0.5, cap_s=5.0)


class Frame(Struct):
    """One frame of a stream; ``event`` is empty for what has no name."""

    event: str = ""
    id: str = ""
    data: bytes = b""


def follow(invocation: Invocation, query: Query, since: str) -> Iterator[msgspec.Raw]:
    """Yield the events after ``since`` as they were sent, until Ctrl-C.

    Raises ApiProblem for what does not pass by waiting.
    """
    streams = _Streams(invocation, query, since)
    while True:
        try:
            yield from streams.next()
        except (Unreachable, ApiProblem) as error:
            if error.exit_with() is not Exit.UNREACHABLE:
                raise
            invocation.terminal.tell(f"{error}; trying again")
        invocation.terminal.sleep(next(streams.delays))


class _Streams:
    """Stream after stream; ``delays`` between them start anew once one has brought something."""

    def __init__(self, invocation: Invocation, query: Query, since: str) -> None:
        self._invocation = invocation
        self._query = query
        self._last = since
        self.delays = BACKOFF.delays(invocation.rng)

    def next(self) -> Iterator[msgspec.Raw]:
        """Open a stream where the one before ended, and yield its events until it ends too."""
        client = self._invocation.client
        with client.stream(f"{BASE}/events", self._query, self._last) as lines:
            for frame in frames(lines):
                if frame.event == "resync":
                    place = decode(frame.data, PlaceView)
                    self._invocation.terminal.tell(f"events are missing here: {place.detail}")
                elif frame.data and frame.event in ("", "message"):
                    yield msgspec.Raw(frame.data)
                # Only now: an event that was not taken must come again.
                self._last = frame.id or self._last
                self.delays = BACKOFF.delays(self._invocation.rng)


def frames(lines: Iterable[bytes]) -> Iterator[Frame]:
    """Put lines together to frames; one that the end of the stream cuts off is none."""
    frame = Frame()
    for line in lines:
        if line == b"":
            if frame != Frame():
                yield frame
            frame = Frame()
            continue
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            frame.event = value.decode("utf-8", "replace")
        elif name == b"id":
            frame.id = value.decode("utf-8", "replace")
        elif name == b"data":
            frame.data += (b"\n" if frame.data else b"") + value
