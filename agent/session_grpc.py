"""How the agent dials replicas: one long-lived mTLS channel to each, a stream per conversation.

The replica must show a certificate of this cell's CA for the address that was dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import grpc

from agent.session import LeaderChannel
from agent.telemetry import TelemetryChannel
from shared.admission import RENEW_METHOD, Renewal, RenewalAnswer
from shared.codec import pack, unpack
from shared.errors import Disconnected
from shared.grpc_channel import CHANNEL_OPTIONS, GrpcChannel
from shared.lifetime import until_one_ends
from shared.protocol import (
    SESSION_METHOD,
    TELEMETRY_METHOD,
    LeaderMessage,
    TelemetryAnswer,
)
from shared.tls import TlsMaterial

# Says in words what stands against a connection to an address; empty if nothing does.
WhyNot = Callable[[str], Awaitable[str]]

CONNECT_TIMEOUT_S = 5.0
# A replica waits up to 6 s for a leader, who notes the new certificate.
RENEW_LIMIT_S = 10.0
# A replica that goes is lost by every agent at once; so long they spread out before they connect to
# it again. Whoever wants a stream meanwhile does not wait for that.
HOLD_JITTER_S = 5.0
# gRPC waits up to two minutes between attempts by default; a leader is back long before that.
RECONNECT_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A channel without streams would be closed after half an hour; the largest value keeps it.
    ("grpc.client_idle_timeout_ms", 2**31 - 1),
)


class Dialler:
    def __init__(self, tls: TlsMaterial, rng: random.Random, why_not: WhyNot | None = None) -> None:
        """``why_not`` says of an address why it takes no connection."""
        self._tls = tls
        self._rng = rng
        self._why_not = why_not
        self._channels: dict[str, Any] = {}
        self._replaced = asyncio.Event()

    async def session(self, address: str) -> LeaderChannel:
        stream = await self._open(address, SESSION_METHOD)
        return GrpcChannel(stream, LeaderMessage, stream.done_writing)

    async def telemetry(self, address: str) -> TelemetryChannel:
        stream = await self._open(address, TELEMETRY_METHOD)
        return GrpcChannel(stream, TelemetryAnswer, stream.done_writing)

    async def renew(self, address: str, renewal: Renewal) -> RenewalAnswer:
        """Ask a replica for new certificates. Raises Disconnected."""
        channel = await self._connected(address)
        try:
            data = await channel.unary_unary(RENEW_METHOD)(pack(renewal), timeout=RENEW_LIMIT_S)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            raise Disconnected(f"{address} did not answer: {error}") from error
        answer: RenewalAnswer = unpack(data, cast(Any, RenewalAnswer))
        return answer

    async def keep_open(self, addresses: Iterable[str]) -> None:
        """Hold a connection to every replica: a new leader is reached without a handshake."""
        addresses = tuple(addresses)
        while True:
            self._replaced.clear()
            await until_one_ends(self._replaced.wait(), *map(self._hold, addresses))

    async def use(self, tls: TlsMaterial) -> None:
        """Show these certificates from now on; streams of others end, and come again."""
        if tls == self._tls:
            return
        before, self._channels = self._channels, {}
        self._tls = tls
        self._replaced.set()
        for channel in before.values():
            await channel.close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _hold(self, address: str) -> None:
        channel = self._channel(address)
        # A channel that is closed, for another certificate, says so in this way.
        with contextlib.suppress(grpc.aio.BaseError):
            while True:
                # gRPC connects again by itself only while somebody asks for a stream.
                state = channel.get_state(try_to_connect=True)
                await channel.wait_for_state_change(state)
                await asyncio.sleep(self._rng.uniform(0, HOLD_JITTER_S))
        await asyncio.sleep(HOLD_JITTER_S)

    def _channel(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            tls = self._tls
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
            options = (*CHANNEL_OPTIONS, *RECONNECT_OPTIONS)
            channel = grpc.aio.secure_channel(address, credentials, options=options)
            self._channels[address] = channel
        return channel

    async def _open(self, address: str, method: str) -> Any:
        channel = await self._connected(address)
        try:
            return channel.stream_stream(method)()
        except grpc.aio.BaseError as error:
            raise Disconnected(f"the channel to {address} was closed") from error

    async def _connected(self, address: str) -> Any:
        channel = self._channel(address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await channel.channel_ready()
        except TimeoutError:
            said = f"{address} did not accept a connection in {CONNECT_TIMEOUT_S:.0f} s"
            reason = "" if self._why_not is None else await self._why_not(address)
            raise Disconnected(f"{said}: {reason}" if reason else said) from None
        except grpc.aio.BaseError as error:
            raise Disconnected(f"the channel to {address} was closed") from error
        return channel
