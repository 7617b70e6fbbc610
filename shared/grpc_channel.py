"""A gRPC bidirectional stream as a ``Channel``: MessagePack Structs over grpc.aio.

Used by both ends of the agents' two RPCs. A stream is ended by half-closing where that is possible,
since grpc.aio leaks what it cancels.
"""

from __future__ import annotations

import asyncio
from typing import Any, Generic, Protocol, TypeVar

import grpc

from shared.codec import pack, unpack
from shared.errors import Disconnected
from shared.protocol import MESSAGE_BYTES_MAX

Sent = TypeVar("Sent")
Received = TypeVar("Received")

# A stream that is over or broken tells so in any of these ways.
_BROKEN = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)

# gRPC's own limits are stated, never inherited.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
)


class ByteStream(Protocol):
    """What a client's call and a server's context have in common."""

    async def read(self) -> Any: ...

    async def write(self, message: bytes) -> None: ...


class GrpcChannel(Generic[Sent, Received]):
    def __init__(self, stream: ByteStream, received: Any, end: Any) -> None:
        """``received`` is the Struct union to decode; ``end`` half-closes, or ends, the stream."""
        self._stream = stream
        self._received = received
        self._end = end
        # A second write while one is under way breaks the stream, and on a server without an end.
        self._sending = asyncio.Lock()

    async def send(self, message: Sent) -> None:
        data = pack(message)
        try:
            async with self._sending:
                await self._stream.write(data)
        except asyncio.CancelledError as error:
            raise _closed_here(error) from error
        except _BROKEN as error:
            raise Disconnected(f"the stream broke while sending: {_why(error)}") from error

    async def receive(self) -> Received:
        message: Received = unpack(await self._read(), self._received)
        return message

    async def skip(self) -> None:
        """Take a message without looking at it. Raises Disconnected."""
        await self._read()

    async def close(self) -> None:
        await self._end()

    async def _read(self) -> bytes:
        try:
            data = await self._stream.read()
        except asyncio.CancelledError as error:
            raise _closed_here(error) from error
        except _BROKEN as error:
            raise Disconnected(f"the stream broke: {_why(error)}") from error
        if data is grpc.aio.EOF:
            raise Disconnected("the peer ended the stream")
        message: bytes = data
        return message


def _closed_here(cancelled: asyncio.CancelledError) -> BaseException:
    """Return what a cancelled call means: its channel was closed, unless its task is cancelled."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return cancelled
    return Disconnected("the channel was closed")


def _why(error: Exception) -> str:
    details = getattr(error, "details", None)
    text = details() if callable(details) else None
    return text or str(error) or type(error).__name__
