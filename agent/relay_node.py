"""One node's relays: both sides behind the port ``Relays``, and who this node is to others."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Mapping
from typing import Any

from agent.config import AgentConfig, TlsConfig
from agent.relay import RelayTarget
from agent.relay_link import client_context, identity_in, server_context
from agent.relay_listener import RelayListener
from agent.relay_orders import TlsFiles
from agent.relay_outgoing import OutgoingRelays
from agent.relay_settings import RelaySettings
from agent.relay_spawn import RelaySpawner
from shared.errors import ConfigInvalid, FieldError, Unauthenticated
from shared.tls import Identity, parse_identity

# OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)


class NodeRelays:
    """The port ``Relays`` on real processes; takes relays in from ``start`` to ``stop``."""

    def __init__(self, settings: RelaySettings, environment: Mapping[str, str]) -> None:
        """``environment`` is this agent's own; relay processes run in it."""
        self._spawner = RelaySpawner(environment)
        self._listener = RelayListener(settings, self._spawner)
        self._outgoing = OutgoingRelays(settings, self._spawner)

    def start(self, host: str, port: int) -> int:
        """Listen and return the port (for ``port`` 0); raises OSError when it is taken."""
        return self._listener.start(host, port)

    async def run(self) -> None:
        """Take relays in, until cancelled."""
        await self._listener.run()

    def stop(self) -> None:
        """Stop listening; every relay goes on, which is what they are processes for."""
        self._listener.stop()
        self._spawner.forget()

    async def admit(self, name: str, source_node: str) -> str:
        return await self._listener.admit(name, source_node)

    async def withdraw(self, name: str) -> None:
        await self._listener.withdraw(name)

    async def revoke(self, name: str) -> None:
        await self._listener.revoke(name)

    async def open(self, name: str, target: RelayTarget, token: str) -> str:
        return await self._outgoing.open(name, target, token)

    async def close(self, name: str) -> None:
        await self._outgoing.close(name)


def relay_settings(config: AgentConfig) -> RelaySettings:
    """Return the settings of an agent's relays. Raises ConfigInvalid for unusable TLS files."""
    tls = relay_files(config.tls)
    return RelaySettings(
        directory=config.state_dir.absolute() / "relay",
        libvirt_socket=config.relay.libvirt_socket,
        cell=own_identity(tls).cell,
        tls=tls,
    )


def relay_files(config: TlsConfig) -> TlsFiles:
    """Return what this agent shows to other nodes' agents, and knows them by."""
    return TlsFiles(
        ca=str((config.peers_ca or config.ca).absolute()),
        certificate=str(config.certificate.absolute()),
        key=str(config.key.absolute()),
    )


def own_identity(files: TlsFiles) -> Identity:
    """Return whom the certificate of ``files`` speaks for, as a peer would read it.

    That it is out of date does not matter here. Raises ConfigInvalid.
    """
    try:
        return parse_identity(identity_in(own_certificate(files)))
    except (OSError, Unauthenticated) as error:
        raise _unusable(error) from error


def own_certificate(files: TlsFiles) -> dict[str, Any]:
    """Return what the certificate of ``files`` says, as ``ssl.SSLSocket.getpeercert`` tells it.

    It shakes hands with itself, since only that makes Python's TLS take a certificate apart. That
    it is out of date does not matter here. Raises ConfigInvalid.
    """
    try:
        client, server = client_context(files), server_context(files)
        server.verify_mode = ssl.CERT_NONE
        client.verify_flags |= _NO_CHECK_TIME
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        calls = client.wrap_bio(to_client, to_server)
        answers = server.wrap_bio(to_server, to_client, server_side=True)
        for side in (calls, answers):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        calls.do_handshake()
        return calls.getpeercert() or {}
    except OSError as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> ConfigInvalid:
    return ConfigInvalid("of TLS", (FieldError("/tls", "unusable", str(error)),))
