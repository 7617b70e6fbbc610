"""The cell's certificate authorities: their keys, and certificates for replicas, agents, QEMUs.

Owns every private key that is ever written here, and the modes of files. It never holds a key
longer than a call needs it. Agents do not import it: ``cryptography`` stays out of their memory.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from shared.errors import FieldError, ValidationFailed
from shared.tls import Identity, Role

CA_LIFETIME = timedelta(days=3653)
# The longest that common TLS stacks accept; for what is renewed by an operator.
LEAF_LIFETIME = timedelta(days=825)
# Nodes whose clocks are a little behind must accept a certificate made right now.
BACKDATED = timedelta(minutes=5)

KEY_MODE = 0o400
SECRET_MODE = 0o600
PUBLIC_MODE = 0o644
KEY_DIRECTORY_MODE = 0o700


class Authority(Struct, frozen=True):
    """A CA of one cell."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_serial() -> int:
    return x509.random_serial_number()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_key(pem: bytes, source: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in ``pem``; raises ValidationFailed that names ``source``."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise _invalid(source, "not_a_key", f"holds no readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _invalid(source, "not_a_key", "holds a key that is not an EC key")
    return key


def make_authority(title: str, key: ec.EllipticCurvePrivateKey, now: datetime) -> Authority:
    """Return a new CA around ``key`` that calls itself ``title``."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(new_serial())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def load_authority(certificate_file: Path, key_file: Path) -> Authority:
    """Read a CA back; raises ValidationFailed when the two files are not a pair."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    except ValueError as error:
        raise _invalid(certificate_file, "not_a_certificate", str(error)) from error
    key = load_key(key_file.read_bytes(), key_file)
    if certificate.public_key() != key.public_key():
        raise _invalid(key_file, "not_a_pair", f"is not the key of {certificate_file}")
    return Authority(certificate, key)


def issue(
    authority: Authority,
    identity: Identity,
    addresses: Iterable[str],
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    *,
    lifetime: timedelta = LEAF_LIFETIME,
    serial: int | None = None,
) -> bytes:
    """Return the PEM certificate that lets the holder of ``key`` speak as ``identity``.

    ``serial`` is drawn at random if it is not given. ``addresses`` are host names or IP addresses
    under which peers reach it, beside its name and, but for QEMU, the loopback. Every role is
    server and client: replicas dial replicas, agents dial agents, and QEMUs send guests to QEMUs.
    """
    is_qemu = identity.role is Role.QEMU
    issuer_key_id = authority.certificate.extensions.get_extension_for_class(
        x509.SubjectKeyIdentifier
    ).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(serial or new_serial())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(now + lifetime, authority.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False, enciphers_keys=is_qemu), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName(_alternative_names(identity, addresses)), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def requested_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate request, whose sender has proven to hold it.

    Raises ValueError, which says what is wrong with it.
    """
    request = x509.load_pem_x509_csr(pem)
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ValueError("its key is not of the curve P-256")
    if not request.is_signature_valid:
        raise ValueError("its signature is not of its key")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key, in hex."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of the first certificate in ``pem``, in hex. Raises ValueError."""
    certificate = x509.load_pem_x509_certificates(pem)[0]
    return certificate.fingerprint(hashes.SHA256()).hex()


def serial_of(pem: bytes) -> str:
    """Return a certificate's serial number, in hex. Raises ValueError."""
    return f"{x509.load_pem_x509_certificate(pem).serial_number:x}"


def make_directory(path: Path, mode: int = KEY_DIRECTORY_MODE) -> None:
    """Make ``path`` and its parents; a directory that exists keeps its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=mode, exist_ok=True)


def split(pem: bytes) -> list[bytes]:
    """Return the certificates of a file, each as PEM. Raises ValueError."""
    found = x509.load_pem_x509_certificates(pem)
    return [each.public_bytes(serialization.Encoding.PEM) for each in found]


def is_pair(certificate_pem: bytes, key_pem: bytes) -> bool:
    """Tell whether a certificate is of a key."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    return x509.load_pem_x509_certificate(certificate_pem).public_key() == key.public_key()


def _alternative_names(identity: Identity, addresses: Iterable[str]) -> list[x509.GeneralName]:
    names: dict[str, x509.GeneralName] = {
        str(identity): x509.UniformResourceIdentifier(str(identity)),
    }
    loopback = () if identity.role is Role.QEMU else ("localhost", "127.0.0.1")
    for address in (identity.name, *loopback, *addresses):
        names.setdefault(address, _host_name(address))
    return list(names.values())


def _host_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _usage(*, signs_certificates: bool, enciphers_keys: bool = False) -> x509.KeyUsage:
    """``enciphers_keys`` means nothing for an EC key, but QEMUs before its newest fixes insist."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=enciphers_keys,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _invalid(source: Path, code: str, message: str) -> ValidationFailed:
    return ValidationFailed((FieldError(str(source), code, message),))
