"""A stream of typed messages between two parties, as a port.

gRPC is one carrier; the simulation's seeded network is another. Messages arrive in order or the
channel breaks: it never skips one.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

Sent = TypeVar("Sent", contravariant=True)
Received = TypeVar("Received", covariant=True)


class Channel(Protocol[Sent, Received]):
    async def send(self, message: Sent) -> None:
        """Hand over one message; waits while the peer is slow. Raises Disconnected."""
        ...

    async def receive(self) -> Received:
        """Return the next message. Raises Disconnected once the peer is gone."""
        ...

    async def close(self) -> None:
        """End the stream; the peer's ``receive`` raises Disconnected. Never raises."""
        ...
