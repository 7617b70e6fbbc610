"""Why a replica takes no connection of this agent: what TLS says, and gRPC keeps to itself.

A handshake of its own, made after gRPC has failed, with the same certificates. Blocking; bounded.
"""

from __future__ import annotations

import socket
import ssl

from agent.config import TlsConfig
from shared.addresses import host_and_port

LIMIT_S = 3.0
REFUSED = "it refuses this node's certificate, and its log says why"


def why_not(address: str, tls: TlsConfig) -> str:
    """Return what stands against a connection to ``address``; empty if nothing does."""
    host, port = host_and_port(address)
    try:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.load_cert_chain(tls.certificate, tls.key)
        context.set_alpn_protocols(["h2"])
    except OSError as error:
        return f"this node's certificates cannot be read: {error}"
    try:
        with (
            socket.create_connection((host, port), LIMIT_S) as connection,
            context.wrap_socket(connection, server_hostname=host) as link,
        ):
            # In TLS 1.3 a client hears of its own certificate after its handshake; gRPC's servers
            # close without saying why, and write that into their own log.
            return "" if link.recv(1) else REFUSED
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not good here: {error.verify_message}"
    except ssl.SSLError:
        return REFUSED
    except OSError as error:
        return (error.strerror or str(error)).lower()
