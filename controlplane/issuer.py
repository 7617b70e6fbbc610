"""Signs nodes' certificates with the CAs that a replica holds the keys of.

Owns those keys in memory, and what a node's certificates say. Who is given one is decided by the
commands of ``commands/admission.py``; nothing here is stored.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from controlplane import pki
from shared.admission import REQUEST_BYTES_MAX, Issued, Renewal
from shared.clock import Clock
from shared.errors import FieldError, ValidationFailed
from shared.tls import Identity, Role


class Draw(Struct, frozen=True):
    """A certificate that may be made: for whose keys, by which number, until when."""

    agent_key: ec.EllipticCurvePublicKey
    qemu_key: ec.EllipticCurvePublicKey
    serial: int
    expires_at: datetime

    @property
    def key_sha256(self) -> str:
        """The agent's key as ``JoinToken.used_key`` has it."""
        return pki.key_digest(self.agent_key)

    @property
    def serial_text(self) -> str:
        """The serial as ``Admission.serials`` has it."""
        return f"{self.serial:x}"


class Trust(Struct, frozen=True):
    """Whom nodes are to trust, as PEM: see ``shared.admission.Issued``."""

    ca: bytes
    agents_ca: bytes
    qemu_ca: bytes


class Issues(Protocol):
    """What the use cases need of an issuer."""

    @property
    def ca_sha256(self) -> str:
        """The fingerprint by which nodes know the control plane before they have a file of it."""
        ...

    @property
    def ca(self) -> bytes: ...

    def draw(self, request: Renewal) -> Draw: ...

    def issue(self, name: str, draw: Draw) -> Issued: ...


class Issuer:
    def __init__(
        self,
        cell: str,
        agents: pki.Authority,
        qemu: pki.Authority,
        trust: Trust,
        lifetime: timedelta,
        clock: Clock,
    ) -> None:
        self._cell = cell
        self._agents = agents
        self._qemu = qemu
        self._trust = trust
        self._lifetime = lifetime
        self._clock = clock
        self.ca_sha256 = pki.fingerprint(trust.ca)
        self.ca = trust.ca
        self.agents_ca = trust.agents_ca

    def draw(self, request: Renewal) -> Draw:
        """Check a node's requests. Raises ValidationFailed with every fault."""
        faults: list[FieldError] = []
        agent_key = _key(request.agent_request, "/agent_request", faults)
        qemu_key = _key(request.qemu_request, "/qemu_request", faults)
        if agent_key is None or qemu_key is None:
            raise ValidationFailed(tuple(faults))
        expires_at = self._clock.now() + self._lifetime
        return Draw(agent_key, qemu_key, pki.new_serial(), expires_at.replace(microsecond=0))

    def issue(self, name: str, draw: Draw) -> Issued:
        """Return certificates that speak for a node.

        Of names they hold its own alone, which is what peers ask for: an address is what a machine
        says of itself, and might be another's.
        """
        now = self._clock.now()
        lifetime = draw.expires_at - now
        certificate = pki.issue(
            self._agents,
            Identity(self._cell, Role.AGENT, name),
            [],
            draw.agent_key,
            now,
            lifetime=lifetime,
            serial=draw.serial,
        )
        qemu_certificate = pki.issue(
            self._qemu,
            Identity(self._cell, Role.QEMU, name),
            [],
            draw.qemu_key,
            now,
            lifetime=lifetime,
        )
        return Issued(
            certificate=certificate.decode(),
            qemu_certificate=qemu_certificate.decode(),
            ca=self._trust.ca.decode(),
            # Nodes that were made by ``novacron init`` have certificates of the cell's own CA.
            peers_ca=(self._trust.agents_ca + self._trust.ca).decode(),
            qemu_ca=self._trust.qemu_ca.decode(),
            expires_at=draw.expires_at,
        )


def _key(request: str, pointer: str, faults: list[FieldError]) -> ec.EllipticCurvePublicKey | None:
    if len(request) > REQUEST_BYTES_MAX:
        faults.append(FieldError(pointer, "too_long", f"more than {REQUEST_BYTES_MAX} bytes"))
        return None
    try:
        return pki.requested_key(request.encode())
    except ValueError as error:
        faults.append(FieldError(pointer, "not_a_request", f"is no PKCS #10 request: {error}"))
        return None
