"""Certificates for etcd in tests: a CA, a member's for loopback, and a client's."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controlplane.store.etcd_grpc import EtcdTls


def certificates(directory: Path) -> EtcdTls:
    """Make a CA, a member's certificate for 127.0.0.1 in the directory, and a client's."""
    directory.mkdir()
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _signed("ca", ca_key.public_key(), "ca", ca_key)
    pem = {"ca.crt": ca.public_bytes(serialization.Encoding.PEM)}
    for name in ("member", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(name, key.public_key(), "ca", ca_key)
        pem[f"{name}.crt"] = certificate.public_bytes(serialization.Encoding.PEM)
        pem[f"{name}.key"] = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    for name, data in pem.items():
        (directory / name).write_bytes(data)
    return EtcdTls(pem["ca.crt"], pem["client.crt"], pem["client.key"])


def _signed(
    subject: str,
    key: ec.EllipticCurvePublicKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), True)
        .add_extension(x509.SubjectAlternativeName([loopback]), False)
        .sign(issuer_key, hashes.SHA256())
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
