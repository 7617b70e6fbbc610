"""Who a certificate speaks for, and the PEM files of a process.

A certificate of NovaCron's CA names its holder in one URI: ``novacron://<cell>/<role>/<name>``.
This module reads such URIs and loads files; it never makes keys or certificates
(``controlplane/pki.py`` does) and never parses X.509, so that an agent needs no cryptography
library beside gRPC's. Whoever verified the chain hands the names in.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from shared.errors import ConfigInvalid, FieldError, Unauthenticated
from shared.ids import CELL_LENGTH

SCHEME = "novacron"

_URI = re.compile(
    rf"^{SCHEME}://(?P<cell>[0-9a-v]{{{CELL_LENGTH}}})/(?P<role>[a-z]+)"
    r"/(?P<name>[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?)\Z"
)
# A PEM file holds a key or a short chain; more than this is the wrong file.
_PEM_BYTES_MAX = 1024 * 1024


class Role(enum.StrEnum):
    """What a certificate's holder may be; there is no fifth kind.

    A node's QEMU speaks to other nodes' QEMUs only, a member of etcd to members and replicas:
    whoever talks to agents or replicas refuses both.
    """

    AGENT = "agent"
    REPLICA = "replica"
    QEMU = "qemu"
    MEMBER = "member"


class Identity(Struct, frozen=True):
    """A certificate's holder: its cell, its role there, and its name (a node's or a replica's)."""

    cell: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.cell}/{self.role}/{self.name}"


class TlsMaterial(Struct, frozen=True):
    """What a process shows and trusts, as PEM."""

    ca: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "TlsMaterial(...)"  # keys stay out of logs and tracebacks


def parse_identity(uri: str) -> Identity:
    """Return who ``uri`` names; raises Unauthenticated when it is not such a URI."""
    match = _URI.match(uri)
    if match is None or match["role"] not in set(Role):
        raise Unauthenticated(f"{uri[:200]!r} is no identity of NovaCron")
    return Identity(match["cell"], Role(match["role"]), match["name"])


def identity_among(names: Iterable[str | bytes]) -> Identity:
    """Return the one identity among a certificate's subject alternative names.

    ``names`` are bare values of any kind (DNS, IP, URI), as gRPC gives them under
    ``x509_subject_alternative_name``. Raises Unauthenticated when there is none, or more than
    one: then nobody could say for whom the certificate speaks.
    """
    texts = [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names]
    uris = [text for text in texts if text.startswith(f"{SCHEME}://")]
    if len(uris) != 1:
        raise Unauthenticated(f"the certificate names {len(uris)} identities of NovaCron, not one")
    return parse_identity(uris[0])


def load_material(ca: Path, certificate: Path, key: Path) -> TlsMaterial:
    """Read a process's three PEM files; raises ConfigInvalid with every fault at once."""
    faults: list[FieldError] = []
    material = TlsMaterial(
        ca=_read_pem(ca, "/tls/ca", "CERTIFICATE", faults),
        certificate=_read_pem(certificate, "/tls/certificate", "CERTIFICATE", faults),
        key=_read_pem(key, "/tls/key", "PRIVATE KEY", faults),
    )
    if faults:
        raise ConfigInvalid("of TLS", tuple(faults))
    return material


def _read_pem(path: Path, pointer: str, label: str, faults: list[FieldError]) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_PEM_BYTES_MAX)
    except OSError as error:
        faults.append(FieldError(pointer, "unreadable", f"{path}: {error.strerror}"))
        return b""
    if f"{label}-----".encode() not in data:
        faults.append(FieldError(pointer, "not_pem", f"{path} holds no PEM block {label!r}"))
    return data
