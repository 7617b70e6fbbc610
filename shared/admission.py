"""How a node is let into a cell: the records of it, and what passes between node and control plane.

A **join token** lets one node in, once. An **admission** says of one node, by its name, which
certificates speak for it; whoever shows another one is refused. A certificate request (PKCS #10,
PEM) proves that its sender has the key, and nothing else in it is taken over: whom a certificate
speaks for is decided by the control plane.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct

from shared.model import Problem, Record

RENEW_METHOD = "/novacron.Agents/Renew"

# A request for a certificate is 500 bytes.
REQUEST_BYTES_MAX = 8 * 1024


class JoinToken(Record, frozen=True, kw_only=True):
    """A token's record; its secret is 256 random bits, of which the SHA-256 is kept.

    ``nodes``: names, or patterns with ``*``, that may join with it; none for any. ``used_by`` is
    the one that did, with the key whose SHA-256 is ``used_key``: it may ask again, nobody else.
    """

    sha256: str
    nodes: tuple[str, ...] = ()
    needs_approval: bool = False
    created_at: datetime
    created_by: str
    expires_at: datetime
    used_by: str = ""
    used_key: str = ""


class Admission(Record, frozen=True, kw_only=True):
    """Which certificates speak for the node whose name is the ``id``.

    ``serials`` are those of its newest certificate and of the one that it was asked for with, in
    hex: an answer that was lost leaves the node with one that counts. A node that is not
    ``approved`` has none yet; one that is ``revoked`` comes back only with a new join token.
    ``key_sha256`` is of the key that it joined with.
    """

    address: str
    approved: bool
    key_sha256: str = ""
    serials: tuple[str, ...] = ()
    expires_at: datetime | None = None
    token: str = ""
    created_at: datetime
    revoked_at: datetime | None = None
    reason: str = ""


class Renewal(Struct, frozen=True, kw_only=True):
    """An agent asks for new certificates, over a connection that its present one vouches for."""

    agent_request: str
    qemu_request: str


class Issued(Struct, frozen=True, kw_only=True, tag="issued"):
    """New certificates, and whom to trust from now on; all PEM.

    ``ca`` vouches for replicas, ``peers_ca`` for other nodes' agents, ``qemu_ca`` for their QEMUs.
    """

    certificate: str
    qemu_certificate: str
    ca: str
    peers_ca: str
    qemu_ca: str
    expires_at: datetime


class RenewalRefused(Struct, frozen=True, kw_only=True, tag="refused"):
    problem: Problem


RenewalAnswer = Issued | RenewalRefused
