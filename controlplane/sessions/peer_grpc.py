"""How replicas call each other: one long-lived mTLS channel to each, a unary call per request.

The peer must show a certificate of this cell's CA for the address that was dialled.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc

from controlplane.sessions.peer_messages import PEER_METHOD, PeerAnswer, PeerRequest
from shared.codec import pack, unpack
from shared.errors import Disconnected, OutcomeUnknown, Unavailable
from shared.grpc_channel import CHANNEL_OPTIONS
from shared.tls import TlsMaterial

# A replica that is there accepts at once; one that is not refuses, or its machine is silent.
CONNECT_TIMEOUT_S = 1.0
# gRPC waits up to two minutes between attempts by default; a replica is back long before that.
RECONNECT_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class PeerDialler:
    """The port ``PeerCall`` over gRPC."""

    def __init__(self, tls: TlsMaterial) -> None:
        self._credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
        self._channels: dict[str, Any] = {}

    async def __call__(self, address: str, request: PeerRequest, limit_s: float) -> PeerAnswer:
        channel = await self._connected(address, min(limit_s, CONNECT_TIMEOUT_S))
        call = channel.unary_unary(PEER_METHOD)
        try:
            data = await call(pack(request), timeout=limit_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise Unavailable(
                    f"the replica at {address} is of a release that takes nothing from others:"
                    " ask it itself"
                ) from error
            raise OutcomeUnknown(
                f"the replica at {address} did not answer: {_why(error)}"
            ) from error
        answer: PeerAnswer = unpack(data, cast(Any, PeerAnswer))
        return answer

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _connected(self, address: str, limit_s: float) -> Any:
        """Return a channel that is ready: what fails on one that is not, did not arrive."""
        channel = self._channels.get(address)
        if channel is None:
            options = (*CHANNEL_OPTIONS, *RECONNECT_OPTIONS)
            channel = grpc.aio.secure_channel(address, self._credentials, options=options)
            self._channels[address] = channel
        try:
            async with asyncio.timeout(limit_s):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise Disconnected(f"the replica at {address} refuses connections")
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise Disconnected(f"the replica at {address} does not accept connections") from None
        return channel


def _why(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return (details() if callable(details) else None) or str(error)
