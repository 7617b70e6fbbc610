"""The mTLS connection between the two ends of a relay: who may be at the other end, and greetings.

TLS 1.3 only, certificates of the cell's CA on both ends. Names of hosts mean nothing here: what a
peer's certificate must have is the one identity that was expected. The caller then sends a magic
word and the token, and the callee one byte once its own side is open; it closes when it refuses.
Whatever is wrong is an OSError. Standard library only, since relay processes use it.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any

from agent.relay_orders import TlsFiles

MAGIC = b"nvr1"
TOKEN_BYTES = 32
ACCEPTED = b"\x01"
# As in ``shared.tls``, whose imports would double the time to start.
SCHEME = "novacron://"

# The other node is near; its agent starts a process within some ten milliseconds.
GREETING_LIMIT_S = 10.0

# libvirt gives up on a silent connection after 30 s. The relay must not be the first to.
SILENCE_LIMIT_S = 60
KEEPALIVE_IDLE_S = 15
KEEPALIVE_PERIOD_S = 15
KEEPALIVE_COUNT = 3


def client_context(files: TlsFiles) -> ssl.SSLContext:
    context = _with_files(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files)
    context.check_hostname = False  # ``check_peer`` asks for more
    return context


def server_context(files: TlsFiles) -> ssl.SSLContext:
    context = _with_files(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)
    context.num_tickets = 0  # nobody resumes, and a peer that only sends would never read them
    return context


def call(address: tuple[str, int], files: TlsFiles, peer: str, token: bytes) -> ssl.SSLSocket:
    """Connect to the relays at ``address``, which must be ``peer``, and show the token."""
    deadline_s = time.monotonic() + GREETING_LIMIT_S
    context = client_context(files)
    connection = socket.create_connection(address, GREETING_LIMIT_S)
    link = _shake_hands(context, connection, deadline_s)
    try:
        if identity(link) != peer:
            raise PermissionError(f"{peer} was expected, and {identity(link)} is there")
        link.sendall(MAGIC + token)
        _read(link, len(ACCEPTED), deadline_s)
    except BaseException:
        link.close()
        raise
    return link


def answer(connection: socket.socket, files: TlsFiles, deadline_s: float) -> ssl.SSLSocket:
    """Return the encrypted connection to somebody with a certificate of the CA."""
    return _shake_hands(server_context(files), connection, deadline_s)


def read_token(link: ssl.SSLSocket, deadline_s: float) -> bytes:
    greeting = _read(link, len(MAGIC) + TOKEN_BYTES, deadline_s)
    if not greeting.startswith(MAGIC):
        raise PermissionError("the peer is no relay, or one of another version")
    return greeting.removeprefix(MAGIC)


def identity(link: ssl.SSLSocket | ssl.SSLObject) -> str:
    """Return the one identity of NovaCron in the peer's certificate, which is verified.

    Raises PermissionError when there is none, or more than one.
    """
    return identity_in(link.getpeercert() or {})


def identity_in(certificate: Mapping[str, Any]) -> str:
    """Return the one identity of NovaCron in a certificate, as ``getpeercert`` tells it.

    Raises PermissionError when there is none, or more than one.
    """
    names = certificate.get("subjectAltName", ())
    # One entry is a pair of its kind and its value.
    uris = [str(entry[1]) for entry in names if entry[0] == "URI"]
    ours = [uri for uri in uris if uri.startswith(SCHEME)]
    if len(ours) != 1:
        raise PermissionError(f"the certificate names {len(ours)} identities of NovaCron, not one")
    return ours[0]


def _with_files(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key)
    return context


def _shake_hands(
    context: ssl.SSLContext, connection: socket.socket, deadline_s: float
) -> ssl.SSLSocket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PERIOD_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_LIMIT_S * 1000)
    connection.settimeout(_left_s(deadline_s))
    # Closes the connection when it fails.
    return context.wrap_socket(connection, server_side=context.protocol == ssl.PROTOCOL_TLS_SERVER)


def _read(link: ssl.SSLSocket, count: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < count:
        link.settimeout(_left_s(deadline_s))
        part = link.recv(count - len(data))
        if not part:
            raise ConnectionAbortedError("the peer closed the connection while greeting")
        data += part
    return data


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the peer did not greet in time")
    return left_s
