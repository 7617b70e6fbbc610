"""The directory that ``novacron init`` makes: who the cell is, its CA, and everyone's certificates.

    cluster.json                 id, cell, created_at
    ca.crt  ca.key               the CA; the key leaves this directory only as a copy to replicas
    admin.token                  the first admin's token, as text
    admin-key.json               shared.model.ApiKey of that token
    replicas/NAME/controlplane.{crt,key}
    nodes/NAME/agent.{crt,key}

Every step adds what is missing and changes nothing that exists, so that a run that was cut off, or
one with more names, is simply run again. A key is always written before what is derived from it.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from controlplane import pki, tokens
from shared.clock import Clock
from shared.errors import FieldError, ValidationFailed
from shared.ids import IdSource, new_cell
from shared.model import ApiKey
from shared.tls import Identity, Role

ADMIN = "admin"


class ClusterFile(Struct, frozen=True):
    """``cluster.json``: what a new cluster is told about itself at its first start."""

    id: str
    cell: str
    created_at: datetime


class CellFiles:
    """One such directory; ``made`` lists the files that this object has added, in order."""

    def __init__(self, root: Path, clock: Clock, rng: random.Random) -> None:
        self.root = root
        self.made: list[Path] = []
        self._clock = clock
        self._rng = rng

    @property
    def ca_file(self) -> Path:
        return self.root / "ca.crt"

    @property
    def token_file(self) -> Path:
        return self.root / "admin.token"

    def ensure_cell(self, token_ttl: timedelta | None = None) -> ClusterFile:
        """Make the cell itself: its name, its CA and the first admin's token.

        Raises ValidationFailed when files are there that do not fit each other.
        """
        pki.make_directory(self.root)
        cluster = self._cluster()
        self._ensure_authority(cluster.cell)
        self._ensure_admin(cluster.cell, token_ttl)
        return cluster

    def add_replica(self, name: str, address: str) -> None:
        self._enrol(Role.REPLICA, name, address, self.root / "replicas" / name, "controlplane")

    def add_node(self, name: str, address: str) -> None:
        self._enrol(Role.AGENT, name, address, self.root / "nodes" / name, "agent")

    def _cluster(self) -> ClusterFile:
        path = self.root / "cluster.json"
        if not path.exists():
            cell = new_cell(self._rng)
            new = ClusterFile(self._ids(cell).new("cluster"), cell, self._clock.now())
            self._write(path, _json(new), pki.PUBLIC_MODE)
        try:
            return msgspec.json.decode(path.read_bytes(), type=ClusterFile)
        except msgspec.DecodeError as error:
            raise _unfit(path, f"is not a cluster file: {error}") from error

    def _ensure_authority(self, cell: str) -> None:
        key = self._key(self.root / "ca.key", self.ca_file)
        if not self.ca_file.exists():
            authority = pki.make_authority(cell, key, self._clock.now())
            self._write(self.ca_file, authority.certificate_pem(), pki.PUBLIC_MODE)

    def _ensure_admin(self, cell: str, ttl: timedelta | None) -> None:
        record_file = self.root / "admin-key.json"
        if record_file.exists():
            return  # the token may be gone on purpose: it is only needed to log in
        if not self.token_file.exists():
            token = tokens.new_token(self._ids(cell).new("key"))
            self._write(self.token_file, f"{token}\n".encode(), pki.SECRET_MODE)
        token = tokens.parse_token(self.token_file.read_text().strip())
        now = self._clock.now()
        record = ApiKey(
            id=token.id,
            sha256=tokens.digest(token.secret),
            principal=ADMIN,
            role=ADMIN,
            created_at=now,
            expires_at=None if ttl is None else now + ttl,
        )
        self._write(record_file, _json(record), pki.SECRET_MODE)

    def _enrol(self, role: Role, name: str, address: str, directory: Path, stem: str) -> None:
        certificate_file = directory / f"{stem}.crt"
        pki.make_directory(directory.parent)
        pki.make_directory(directory)
        key = self._key(directory / f"{stem}.key", certificate_file)
        if certificate_file.exists():
            return
        identity = Identity(self._cluster().cell, role, name)
        authority = pki.load_authority(self.ca_file, self.root / "ca.key")
        pem = pki.issue(authority, identity, [address], key, self._clock.now())
        self._write(certificate_file, pem, pki.PUBLIC_MODE)

    def _key(self, path: Path, certificate_file: Path) -> ec.EllipticCurvePrivateKey:
        if not path.exists():
            if certificate_file.exists():
                raise _unfit(path, f"is gone while {certificate_file} is there; restore or remove")
            self._write(path, pki.key_pem(pki.new_key()), pki.KEY_MODE)
        return pki.load_key(path.read_bytes(), path)

    def _ids(self, cell: str) -> IdSource:
        return IdSource(cell, self._clock, self._rng)

    def _write(self, path: Path, data: bytes, mode: int) -> None:
        pki.write_new(path, data, mode)
        self.made.append(path)


def _json(record: Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def _unfit(path: Path, message: str) -> ValidationFailed:
    return ValidationFailed((FieldError(str(path), "unfit", message),))
