"""controlplane.pki and controlplane.cell_files: keys, certificates and how they are written."""

from __future__ import annotations

import ipaddress
import random
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from controlplane import pki, tokens
from controlplane.cell_files import CellFiles, ClusterFile
from shared.clock import SystemClock
from shared.errors import ValidationFailed
from shared.model import ApiKey
from shared.tls import Identity, Role, load_material, parse_identity

NOW = datetime(2026, 11, 20, tzinfo=UTC)
REPLICA = Identity("k3f9q2", Role.REPLICA, "r1")


class FixedClock(SystemClock):
    def now(self) -> datetime:
        return NOW


def cell_files(directory: Path) -> CellFiles:
    return CellFiles(directory, FixedClock(), random.Random(3))


def certificate_of(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def issued(addresses: list[str], identity: Identity = REPLICA) -> x509.Certificate:
    authority = pki.make_authority("k3f9q2", pki.new_key(), NOW)
    pem = pki.issue(authority, identity, addresses, pki.new_key().public_key(), NOW)
    return x509.load_pem_x509_certificate(pem)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_leaf_names_its_holder_and_where_it_is_reached() -> None:
    names = (
        issued(["10.88.0.1", "r1.example.org"])
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )

    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(REPLICA)]
    assert names.get_values_for_type(x509.DNSName) == ["r1", "localhost", "r1.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("10.88.0.1"),
    ]


def test_a_qemu_is_reached_from_elsewhere_only() -> None:
    leaf = issued(["10.88.0.11"], Identity("k3f9q2", Role.QEMU, "n1"))

    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["n1"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.88.0.11")]
    # Older QEMUs refuse a certificate without it, although no EC key enciphers anything.
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment


def test_a_leaf_is_back_dated_limited_and_no_authority() -> None:
    leaf = issued([])

    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert leaf.not_valid_after_utc == NOW + timedelta(days=825)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_a_leaf_does_not_outlive_its_authority() -> None:
    authority = pki.make_authority("k3f9q2", pki.new_key(), NOW)
    late = NOW + pki.CA_LIFETIME - timedelta(days=1)

    leaf = x509.load_pem_x509_certificate(
        pki.issue(authority, REPLICA, [], pki.new_key().public_key(), late)
    )

    assert leaf.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_init_makes_everything_with_its_mode(tmp_path: Path) -> None:
    files = cell_files(tmp_path / "cell")
    cluster = files.ensure_cell()
    files.add_replica("r1", "10.88.0.1")
    files.add_node("n1", "10.88.0.11")
    files.add_member("m1", "10.88.0.1")

    root = tmp_path / "cell"
    assert {str(p.relative_to(root)): oct(mode(p)) for p in files.made} == {
        "cluster.json": "0o644",
        "ca.key": "0o400",
        "ca.crt": "0o644",
        "qemu-ca.key": "0o400",
        "qemu-ca.crt": "0o644",
        "agents-ca.key": "0o400",
        "agents-ca.crt": "0o644",
        "etcd-ca.key": "0o400",
        "etcd-ca.crt": "0o644",
        "admin.token": "0o600",
        "admin-key.json": "0o600",
        "replicas/r1/controlplane.key": "0o400",
        "replicas/r1/controlplane.crt": "0o644",
        "replicas/r1/etcd.key": "0o400",
        "replicas/r1/etcd.crt": "0o644",
        "members/m1/etcd.key": "0o400",
        "members/m1/etcd.crt": "0o644",
        "nodes/n1/agent.key": "0o400",
        "nodes/n1/agent.crt": "0o644",
        "nodes/n1/peers.crt": "0o644",
        "nodes/n1/qemu/server-key.pem": "0o400",
        "nodes/n1/qemu/server-cert.pem": "0o644",
        "nodes/n1/qemu/client-key.pem": "0o400",
        "nodes/n1/qemu/client-cert.pem": "0o644",
        "nodes/n1/qemu/ca-cert.pem": "0o644",
    }
    inner = ("replicas/r1", "members/m1", "nodes/n1", "nodes/n1/qemu")
    directories = (root, *(root / directory for directory in inner))
    assert {mode(d) for d in directories} == {0o700}
    assert cluster == msgspec.json.decode((root / "cluster.json").read_bytes(), type=ClusterFile)
    assert cluster.id.startswith(f"cluster-{cluster.cell}")


def test_certificates_are_of_the_ca_and_fit_their_keys(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    cell = files.ensure_cell().cell
    files.add_node("n1", "10.88.0.11")
    directory = tmp_path / "nodes" / "n1"

    leaf = certificate_of(directory / "agent.crt")

    leaf.verify_directly_issued_by(certificate_of(tmp_path / "ca.crt"))
    key = serialization.load_pem_private_key((directory / "agent.key").read_bytes(), None)
    assert key.public_key() == leaf.public_key()
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert parse_identity(uri) == Identity(cell, Role.AGENT, "n1")
    material = load_material(tmp_path / "ca.crt", directory / "agent.crt", directory / "agent.key")
    assert "PRIVATE" not in repr(material)


def test_what_qemu_shows_is_nothing_to_whoever_trusts_the_cell(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    cell = files.ensure_cell().cell
    files.add_node("n1", "10.88.0.11")
    directory = tmp_path / "nodes" / "n1" / "qemu"
    authority = certificate_of(directory / "ca-cert.pem")

    for side in ("server", "client"):
        leaf = certificate_of(directory / f"{side}-cert.pem")
        leaf.verify_directly_issued_by(authority)
        key = pki.load_key((directory / f"{side}-key.pem").read_bytes(), directory)
        assert key.public_key() == leaf.public_key()
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert parse_identity(uri) == Identity(cell, Role.QEMU, "n1")
        with pytest.raises(ValueError, match="Issuer"):
            leaf.verify_directly_issued_by(certificate_of(tmp_path / "ca.crt"))
    agents = certificate_of(tmp_path / "nodes" / "n1" / "agent.crt")
    assert agents.public_key() != leaf.public_key()


def test_etcd_knows_members_and_replicas_by_a_ca_of_its_own(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    cell = files.ensure_cell().cell
    files.add_replica("r1", "10.88.0.1")
    files.add_member("m1", "10.88.0.1")
    authority = certificate_of(tmp_path / "etcd-ca.crt")

    for place, role, name in (
        ("members/m1", Role.MEMBER, "m1"),
        ("replicas/r1", Role.REPLICA, "r1"),
    ):
        leaf = certificate_of(tmp_path / place / "etcd.crt")
        leaf.verify_directly_issued_by(authority)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert parse_identity(uri) == Identity(cell, role, name)
    with pytest.raises(ValueError, match="Issuer"):
        certificate_of(tmp_path / "replicas/r1/controlplane.crt").verify_directly_issued_by(
            authority
        )


def test_the_admin_key_is_the_digest_of_the_token(tmp_path: Path) -> None:
    cell_files(tmp_path).ensure_cell(timedelta(hours=1))

    token = tokens.parse_token((tmp_path / "admin.token").read_text().strip())
    record = msgspec.json.decode((tmp_path / "admin-key.json").read_bytes(), type=ApiKey)

    assert record.id == token.id
    assert tokens.matches(token.secret, record.sha256)
    assert (record.principal, record.role) == ("admin", "admin")
    assert record.expires_at == NOW + timedelta(hours=1)
    assert token.secret not in (tmp_path / "admin-key.json").read_text()


def test_a_second_run_adds_and_changes_nothing(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    files.ensure_cell()
    files.add_node("n1", "10.88.0.11")
    before = everything(tmp_path)

    again = cell_files(tmp_path)
    again.ensure_cell()
    again.add_node("n1", "10.88.0.99")
    again.add_node("n2", "10.88.0.12")

    after = everything(tmp_path)
    assert before.items() <= after.items()
    place = tmp_path / "nodes/n2"
    assert again.made[:3] == [place / "agent.key", place / "agent.crt", place / "peers.crt"]
    assert {p.parent for p in again.made[3:]} == {place / "qemu"}


def test_a_cell_from_before_qemu_had_certificates_gets_them(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    files.ensure_cell()
    files.add_node("n1", "10.88.0.11")
    qemu = [tmp_path / "qemu-ca.key", tmp_path / "qemu-ca.crt"]
    qemu += sorted((tmp_path / "nodes" / "n1" / "qemu").iterdir())
    for path in qemu:
        path.unlink()
    kept = everything(tmp_path)

    again = cell_files(tmp_path)
    again.ensure_cell()
    again.add_node("n1", "10.88.0.11")

    assert sorted(again.made) == sorted(qemu)
    assert kept.items() <= everything(tmp_path).items()


QEMU_FILES = ("server-cert.pem", "client-key.pem", "client-cert.pem", "ca-cert.pem")
LOST = ("ca.crt", "admin-key.json", "nodes/n1/agent.crt", "qemu-ca.crt", "etcd-ca.crt")


@pytest.mark.parametrize("lost", [*LOST, *(f"nodes/n1/qemu/{name}" for name in QEMU_FILES)])
def test_a_run_that_was_cut_off_is_completed(tmp_path: Path, lost: str) -> None:
    files = cell_files(tmp_path)
    files.ensure_cell()
    files.add_node("n1", "10.88.0.11")
    (tmp_path / lost).unlink()
    kept = everything(tmp_path)

    again = cell_files(tmp_path)
    again.ensure_cell()
    again.add_node("n1", "10.88.0.11")

    assert kept.items() <= everything(tmp_path).items()
    key = pki.load_key((tmp_path / "nodes/n1/agent.key").read_bytes(), tmp_path)
    assert certificate_of(tmp_path / "nodes/n1/agent.crt").public_key() == key.public_key()
    pki.load_authority(tmp_path / "ca.crt", tmp_path / "ca.key")


def test_what_is_missing_is_what_a_run_makes(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    missing = files.missing(["r1"], ["n1"], ["m1"])
    assert everything(tmp_path) == {}

    files.ensure_cell()
    files.add_replica("r1", "10.88.0.1")
    files.add_node("n1", "10.88.0.11")
    files.add_member("m1", "10.88.0.1")

    assert sorted(missing) == sorted(files.made)
    assert files.missing(["r1"], ["n1"], ["m1"]) == []
    files.token_file.unlink()
    assert cell_files(tmp_path).missing(["r1"], [], []) == []


def test_a_token_that_was_removed_on_purpose_stays_away(tmp_path: Path) -> None:
    files = cell_files(tmp_path)
    files.ensure_cell()
    files.token_file.unlink()

    cell_files(tmp_path).ensure_cell()

    assert not files.token_file.exists()


KEYS = (
    "ca.key",
    "qemu-ca.key",
    "etcd-ca.key",
    "nodes/n1/agent.key",
    "nodes/n1/qemu/server-key.pem",
)


@pytest.mark.parametrize("key", KEYS)
def test_a_lost_key_is_not_quietly_replaced(tmp_path: Path, key: str) -> None:
    files = cell_files(tmp_path)
    files.ensure_cell()
    files.add_node("n1", "10.88.0.11")
    (tmp_path / key).unlink()

    def again() -> None:
        files = cell_files(tmp_path)
        files.ensure_cell()
        files.add_node("n1", "10.88.0.11")

    with pytest.raises(ValidationFailed, match="is gone"):
        again()

    assert not (tmp_path / key).exists()


def test_files_of_two_cells_do_not_mix(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cell_files(tmp_path / name).ensure_cell()
    key = tmp_path / "a" / "ca.key"
    key.unlink()
    key.write_bytes((tmp_path / "b" / "ca.key").read_bytes())

    with pytest.raises(ValidationFailed, match="not the key of"):
        cell_files(tmp_path / "a").add_node("n1", "10.88.0.11")


@pytest.mark.parametrize("content", [b"", b"not json", b'{"id": 5}'])
def test_a_broken_cluster_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cluster.json").write_bytes(content)

    with pytest.raises(ValidationFailed, match=r"cluster\.json"):
        cell_files(tmp_path).ensure_cell()
