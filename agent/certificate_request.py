"""Makes keys and the requests to have them certified, as a function and as a short-lived process.

The agent runs it as a process (``python -m agent.certificate_request NAME``; an existing key comes
on standard input): the library that signs requests stays out of the memory of a daemon that needs
it twice a week. The request's subject is for people; the control plane takes nothing over but the
key.
"""

from __future__ import annotations

import sys

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from msgspec import Struct


class KeyAndRequest(Struct, frozen=True):
    """Both PEM."""

    key: str
    request: str

    def __repr__(self) -> str:
        return "KeyAndRequest(...)"  # keys stay out of logs and tracebacks


def make_request(name: str, key_pem: str = "") -> KeyAndRequest:
    """Return a request for ``key_pem``, or for a new key. Raises ValueError for an unusable one."""
    if key_pem:
        key = serialization.load_pem_private_key(key_pem.encode(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("the key is of another kind than EC")
    else:
        key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = (
        x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return KeyAndRequest(pem.decode(), request.public_bytes(serialization.Encoding.PEM).decode())


def main() -> None:
    made = make_request(sys.argv[1], sys.stdin.read())
    sys.stdout.write(msgspec.json.encode(made).decode())


if __name__ == "__main__":
    main()
