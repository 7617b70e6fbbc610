"""The directory that ``novacron init`` makes: who the cell is, its CAs, and all certificates.

    cluster.json                 id, cell, created_at
    ca.crt  ca.key               the CA; the key leaves this directory only as a copy to replicas
    agents-ca.crt  agents-ca.key the CA of agents that join; replicas sign with it
    qemu-ca.crt  qemu-ca.key     the CA of the nodes' QEMUs; nothing else trusts it
    etcd-ca.crt  etcd-ca.key     the CA of etcd's members and of those who may talk to them
    admin.token                  the first admin's token, as text
    admin-key.json               shared.model.ApiKey of that token
    replicas/NAME/controlplane.{crt,key}
    replicas/NAME/etcd.{crt,key} what it shows to etcd
    members/NAME/etcd.{crt,key}  what a member shows to replicas and other members
    nodes/NAME/agent.{crt,key}
    nodes/NAME/peers.crt         whom its agent takes for another node's
    nodes/NAME/qemu/             what the node's /etc/pki/qemu is to hold, by QEMU's own file names

Agents know a replica by its address and our CA. A node's address is in its own certificate and in
its QEMU's too, and a guest may break out into QEMU: so agents that join get certificates of a CA
that vouches for no replica, and QEMUs of one that agents never see.
etcd lets in whomever its CA vouches for, to all that it holds: so nobody else gets one of that CA.

Every step adds what is missing and changes nothing that exists, so that a run that was cut off, or
one with more names, is simply run again. A key is always written before what is derived from it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from controlplane import pki, tokens
from shared import durable_files
from shared.clock import Clock
from shared.errors import FieldError, ValidationFailed
from shared.ids import IdSource, new_cell
from shared.model import ApiKey
from shared.tls import Identity, Role

ADMIN = "admin"
_CA = "ca"
_AGENTS_CA = "agents-ca"
_QEMU_CA = "qemu-ca"
_ETCD_CA = "etcd-ca"
_AUTHORITIES = {
    _CA: "NovaCron cell {cell}",
    _AGENTS_CA: "NovaCron cell {cell} agents",
    _QEMU_CA: "NovaCron cell {cell} QEMU",
    _ETCD_CA: "NovaCron cell {cell} etcd",
}
# By the names that libvirt hands to QEMU.
_QEMU_FILES = (
    "server-key.pem",
    "server-cert.pem",
    "client-key.pem",
    "client-cert.pem",
    "ca-cert.pem",
)


class Rotation(enum.StrEnum):
    """The steps from one CA to the next; everybody has to have the files of one before the next.

    BEGIN: both are trusted, the old one signs. SWITCH: both are trusted, the new one signs, and
    certificates of the old one are made anew. END: the new one alone is trusted. DONE: everybody
    has the files of END, and the next rotation may begin.
    """

    BEGIN = "begin"
    SWITCH = "switch"
    END = "end"
    DONE = "done"


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
        return self.root / f"{_CA}.crt"

    @property
    def token_file(self) -> Path:
        return self.root / "admin.token"

    def ensure_cell(self, token_ttl: timedelta | None = None) -> ClusterFile:
        """Make the cell itself: its name, its CAs and the first admin's token.

        Raises ValidationFailed when files are there that do not fit each other.
        """
        pki.make_directory(self.root)
        cluster = self._cluster()
        for stem, title in _AUTHORITIES.items():
            self._ensure_authority(stem, title.format(cell=cluster.cell))
        self._ensure_admin(cluster.cell, token_ttl)
        return cluster

    def reissue(self, stems: Iterable[str]) -> None:
        """Remove certificates and their keys, so that they are made anew.

        ``stems`` are such as ``replicas/r1/etcd``. The certificate goes first: a key that is alone
        is used again, a certificate without its key would be in the way.
        """
        for stem in stems:
            for end in ("crt", "key"):
                (self.root / f"{stem}.{end}").unlink(missing_ok=True)

    def rotate(self, step: Rotation) -> None:
        """Bring each CA one step on its way to a new key; what is there already is left alone.

        The files with certificates hold both CAs meanwhile, the one that signs first. Raises
        ValidationFailed for a step whose time has not come.
        """
        cluster = self.ensure_cell()
        ended = self.root / "rotation-ended"
        if step is Rotation.DONE:
            ended.unlink(missing_ok=True)
            return
        if ended.exists() and step is not Rotation.END:
            return  # not everybody has the files of the last step yet
        for stem, title in _AUTHORITIES.items():
            self._rotate(stem, title.format(cell=cluster.cell), step)
        if step is Rotation.END:
            ended.touch(pki.PUBLIC_MODE)

    def _rotate(self, stem: str, title: str, step: Rotation) -> None:
        certificate, key = self.root / f"{stem}.crt", self.root / f"{stem}.key"
        new_key = self.root / f"{stem}.new.key"
        trusted = pki.split(certificate.read_bytes())
        if step is Rotation.BEGIN:
            if len(trusted) == 1:
                made = self._key(new_key, self.root / f"{stem}.new.crt")
                new = pki.make_authority(title, made, self._clock.now()).certificate_pem()
                self._replace(certificate, trusted[0] + new)
        elif step is Rotation.SWITCH:
            if len(trusted) == 1:
                raise _unfit(certificate, "holds one CA: begin first")
            if new_key.exists():
                pair = pki.is_pair(trusted[0], new_key.read_bytes())
                new, old = trusted if pair else reversed(trusted)
                self._replace(certificate, new + old)
                new_key.replace(key)
        else:
            if new_key.exists():
                raise _unfit(certificate, "is of the old CA still: switch first")
            self._replace(certificate, trusted[0])

    def _replace(self, path: Path, data: bytes) -> None:
        if path.read_bytes() != data:
            durable_files.replace(path, data, pki.PUBLIC_MODE)
            self.made.append(path)

    def missing(
        self, replicas: Iterable[str], nodes: Iterable[str], members: Iterable[str]
    ) -> list[Path]:
        """Return what a run with these names would make, and make nothing."""
        names = ["cluster.json"]
        names += [f"{stem}.{end}" for stem in _AUTHORITIES for end in ("key", "crt")]
        if not (self.root / "admin-key.json").exists():
            names += ["admin.token", "admin-key.json"]
        stems = [
            f"replicas/{name}/{part}" for name in replicas for part in ("controlplane", "etcd")
        ]
        stems += [f"members/{name}/etcd" for name in members]
        for name in nodes:
            stems.append(f"nodes/{name}/agent")
            names.append(f"nodes/{name}/peers.crt")
            names += [f"nodes/{name}/qemu/{file}" for file in _QEMU_FILES]
        names += [f"{stem}.{end}" for stem in stems for end in ("key", "crt")]
        return [path for path in map(self.root.joinpath, names) if not path.exists()]

    def add_replica(self, name: str, address: str) -> None:
        place = self.root / "replicas" / name
        self._enrol(_CA, Role.REPLICA, name, address, place / "controlplane")
        self._enrol(_ETCD_CA, Role.REPLICA, name, address, place / "etcd")

    def add_member(self, name: str, address: str) -> None:
        self._enrol(_ETCD_CA, Role.MEMBER, name, address, self.root / "members" / name / "etcd")

    def add_node(self, name: str, address: str) -> None:
        place = self.root / "nodes" / name
        self._enrol(_CA, Role.AGENT, name, address, place / "agent")
        peers = place / "peers.crt"
        if not peers.exists():
            trusted = [(self.root / f"{stem}.crt").read_bytes() for stem in (_AGENTS_CA, _CA)]
            self._write(peers, b"".join(trusted), pki.PUBLIC_MODE)
        self._add_qemu(name, address, place / "qemu")

    def _add_qemu(self, name: str, address: str, directory: Path) -> None:
        certificate, key = directory / "server-cert.pem", directory / "server-key.pem"
        self._issue(_QEMU_CA, Role.QEMU, name, address, certificate, key)
        # A node's QEMU receives and sends as the same one.
        self._copy(key, directory / "client-key.pem", pki.KEY_MODE)
        self._copy(certificate, directory / "client-cert.pem", pki.PUBLIC_MODE)
        self._copy(self.root / f"{_QEMU_CA}.crt", directory / "ca-cert.pem", pki.PUBLIC_MODE)

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

    def _ensure_authority(self, stem: str, title: str) -> None:
        certificate_file = self.root / f"{stem}.crt"
        key = self._key(self.root / f"{stem}.key", certificate_file)
        if not certificate_file.exists():
            authority = pki.make_authority(title, key, self._clock.now())
            self._write(certificate_file, authority.certificate_pem(), pki.PUBLIC_MODE)

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

    def _enrol(self, authority: str, role: Role, name: str, address: str, stem: Path) -> None:
        certificate, key = stem.with_suffix(".crt"), stem.with_suffix(".key")
        self._issue(authority, role, name, address, certificate, key)

    def _issue(
        self,
        authority: str,
        role: Role,
        name: str,
        address: str,
        certificate_file: Path,
        key_file: Path,
    ) -> None:
        directory = certificate_file.parent
        pki.make_directory(directory.parent)
        pki.make_directory(directory)
        key = self._key(key_file, certificate_file)
        if certificate_file.exists():
            return
        identity = Identity(self._cluster().cell, role, name)
        stem = self.root / authority
        signer = pki.load_authority(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        pem = pki.issue(signer, identity, [address], key.public_key(), self._clock.now())
        self._write(certificate_file, pem, pki.PUBLIC_MODE)

    def _copy(self, source: Path, target: Path, mode: int) -> None:
        if not target.exists():
            self._write(target, source.read_bytes(), mode)

    def _key(self, path: Path, certificate_file: Path) -> ec.EllipticCurvePrivateKey:
        if not path.exists():
            if certificate_file.exists():
                raise _unfit(path, f"is gone while {certificate_file} is there; restore or remove")
            self._write(path, pki.key_pem(pki.new_key()), pki.KEY_MODE)
        return pki.load_key(path.read_bytes(), path)

    def _ids(self, cell: str) -> IdSource:
        return IdSource(cell, self._clock, self._rng)

    def _write(self, path: Path, data: bytes, mode: int) -> None:
        durable_files.write_new(path, data, mode)
        self.made.append(path)


def _json(record: Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def _unfit(path: Path, message: str) -> ValidationFailed:
    return ValidationFailed((FieldError(str(path), "unfit", message),))
