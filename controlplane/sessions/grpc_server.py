"""The gRPC server that agents and other replicas dial: mTLS, nothing decided here.

Whoever connects is who its certificate says: streams are for an ``agent`` of this cell, calls for a
``replica``, and anybody else is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
from msgspec import Struct

from controlplane.pki import serial_of
from controlplane.sessions.hub import GREETING_TIMEOUT_S, Hub
from controlplane.sessions.peer_messages import PeerRefused, PeerRequest
from controlplane.sessions.peers import PeerAnswers
from controlplane.sessions.telemetry import TelemetryServer
from shared.admission import Issued, Renewal, RenewalAnswer, RenewalRefused
from shared.channel import Channel
from shared.codec import pack, unpack
from shared.errors import (
    Disconnected,
    NovacronError,
    RecordUnreadable,
    Unauthenticated,
    Unavailable,
)
from shared.grpc_channel import CHANNEL_OPTIONS, GrpcChannel
from shared.problems import problem_of
from shared.protocol import (
    AgentMessage,
    LeaderMessage,
    NotLeader,
    TelemetryAnswer,
    TelemetryMessage,
)
from shared.tls import Identity, Role, TlsMaterial, identity_among

log = logging.getLogger(__name__)

# Two streams for each of the 10,000 nodes a cell is built for.
STREAMS_MAX = 20_000
# On the way out agents are told to go; they find the next leader by themselves.
STOP_GRACE_S = 1.0


class Shown(Struct, frozen=True):
    """What a certificate that was verified says: for whom it speaks, and which one it is."""

    identity: Identity
    serial: str


# Gives the node of a name new certificates, for the one whose serial it has shown.
Renew = Callable[[str, str, Renewal], Awaitable[Issued]]


class AgentServer:
    def __init__(
        self,
        cell: str,
        hub: Callable[[], Hub | None],
        leader_address: Callable[[], str | None],
        telemetry: TelemetryServer,
        peers: PeerAnswers,
        renew: Renew,
    ) -> None:
        """``hub`` is the present term's, if this replica leads."""
        self._renew = renew
        self._cell = cell
        self._hub = hub
        self._leader_address = leader_address
        self._telemetry = telemetry
        self._peers = peers
        self._server: Any = None

    async def start(self, listen: str, tls: TlsMaterial, agents_ca: bytes) -> int:
        """Serve on ``host:port`` and return the port.

        ``agents_ca`` vouches for agents as the CA of ``tls`` does for whoever it names.
        """
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS, maximum_concurrent_rpcs=STREAMS_MAX)
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
            "Telemetry": grpc.stream_stream_rpc_method_handler(self._telemetry_stream),
            "Renew": grpc.unary_unary_rpc_method_handler(self._renewal),
        }
        calls = {"Call": grpc.unary_unary_rpc_method_handler(self._peer_call)}
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("novacron.Agents", handlers),
                grpc.method_handlers_generic_handler("novacron.Replicas", calls),
            )
        )
        credentials = grpc.ssl_server_credentials(
            [(tls.key, tls.certificate)],
            root_certificates=tls.ca + agents_ca,
            require_client_auth=True,
        )
        port: int = self._server.add_secure_port(listen, credentials)
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(STOP_GRACE_S)

    async def _session(self, _: Any, context: Any) -> None:
        channel: GrpcChannel[LeaderMessage, AgentMessage] = GrpcChannel(
            context, AgentMessage, _never_mind
        )
        await self._guard(context, lambda shown: self._lead_session(channel, shown))

    async def _lead_session(
        self, channel: GrpcChannel[LeaderMessage, AgentMessage], shown: Shown
    ) -> None:
        hub = self._hub()
        if hub is None:
            # Answered before its hello, the agent would find the stream over and learn nothing.
            # What is in it costs more than all else: while nobody leads every agent asks every
            # replica.
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await channel.skip()
            await channel.send(NotLeader(agent_address=self._leader_address()))
        else:
            await hub.serve(channel, shown.identity, shown.serial)

    async def _telemetry_stream(self, _: Any, context: Any) -> None:
        channel: Channel[TelemetryAnswer, TelemetryMessage] = GrpcChannel(
            context, TelemetryMessage, _never_mind
        )
        await self._guard(
            context, lambda shown: self._telemetry.serve(channel, shown.identity, shown.serial)
        )

    async def _renewal(self, data: bytes, context: Any) -> bytes:
        """Answer an agent that asks for its next certificates."""
        try:
            shown = self._identify(context)
            renewal = unpack(data, Renewal)
            answer: RenewalAnswer = await self._renew(shown.identity.name, shown.serial, renewal)
        except NovacronError as error:
            log.warning("%s gets no new certificates: %s", context.peer(), error)
            answer = RenewalRefused(problem=problem_of(error))
        return pack(answer)

    async def _peer_call(self, data: bytes, context: Any) -> bytes:
        try:
            identity = identity_among(_names(context))
            request: PeerRequest = unpack(data, cast(Any, PeerRequest))
        except Unauthenticated as error:
            log.warning("%s is refused: %s", context.peer(), error)
            return pack(PeerRefused(problem=problem_of(error)))
        except RecordUnreadable:
            newer = Unavailable("the leader's release does not know this request: upgrade it first")
            return pack(PeerRefused(problem=problem_of(newer)))
        return pack(await self._peers.answer(request, identity))

    async def _guard(self, context: Any, serve: Callable[[Shown], Any]) -> None:
        """Serve a peer whose certificate is an agent's of this cell; log what goes wrong, once."""
        try:
            shown = self._identify(context)
        except Unauthenticated as error:
            log.warning("%s is refused: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        try:
            await serve(shown)
        except (Disconnected, TimeoutError):
            pass
        except NovacronError as error:
            log.warning("the stream of %s ended: %s", shown.identity.name, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("the stream of %s failed", shown.identity.name)
            raise

    def _identify(self, context: Any) -> Shown:
        identity = identity_among(_names(context))
        if identity.role is not Role.AGENT or identity.cell != self._cell:
            raise Unauthenticated(f"{identity} is not an agent of cell {self._cell}")
        (certificate,) = context.auth_context()["x509_pem_cert"]
        return Shown(identity, serial_of(certificate))


def _names(context: Any) -> list[bytes]:
    names: list[bytes] = context.auth_context().get("x509_subject_alternative_name", [])
    return names


async def _never_mind() -> None:
    """A server's stream ends when its handler returns."""
