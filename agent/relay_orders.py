"""What an agent hands a relay process: one JSON object on its standard input.

Never on its command line or in its environment, which others may read: an order has the token.
Standard library only, since relay processes read it: each package more is time of a migration.
"""

from __future__ import annotations

import json
from typing import NamedTuple


class TlsFiles(NamedTuple):
    """Paths of PEM files: what this node trusts and shows."""

    ca: str
    certificate: str
    key: str


class DialOrder(NamedTuple):
    """For the source's end. ``peer`` is the identity that the destination must show."""

    name: str
    directory: str
    address: str
    peer: str
    token: str
    tls: TlsFiles
    client_uid: int
    idle_limit_s: float
    linger_limit_s: float


class Admitted(NamedTuple):
    """One token that may be shown: its SHA-256 in hex, and the identity that may show it."""

    name: str
    digest: str
    source: str


class ServeOrder(NamedTuple):
    """For the destination's end; the connection is handed over as a descriptor."""

    directory: str
    libvirt_socket: str
    tls: TlsFiles
    admitted: tuple[Admitted, ...]
    greeting_limit_s: float
    linger_limit_s: float


def encode(order: DialOrder | ServeOrder) -> bytes:
    return json.dumps(order._asdict()).encode()


def dial_order(data: bytes) -> DialOrder:
    fields = json.loads(data)
    return DialOrder(**{**fields, "tls": TlsFiles(*fields["tls"])})


def serve_order(data: bytes) -> ServeOrder:
    fields = json.loads(data)
    admitted = tuple(Admitted(*each) for each in fields["admitted"])
    return ServeOrder(**{**fields, "tls": TlsFiles(*fields["tls"]), "admitted": admitted})
