"""API tokens as text: ``nck_<id>_<secret>``.

Owns the format and the digest, so that whoever makes a token and whoever checks one agree. Stores
nothing: a key's record (``shared.model.ApiKey``) holds the digest, and the secret is shown once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from msgspec import Struct

from shared.errors import Unauthenticated
from shared.ids import base32hex

PREFIX = "nck"
SECRET_BITS = 256
SECRET_LENGTH = -(-SECRET_BITS // 5)
# The longest text that is worth taking apart: prefix, a long kind, an id, a secret.
_TEXT_MAX = 200


class Token(Struct, frozen=True):
    """A key's id and its secret; ``str()`` is the text that a client sends."""

    id: str
    secret: str

    def __str__(self) -> str:
        return f"{PREFIX}_{self.id}_{self.secret}"

    def __repr__(self) -> str:
        return f"Token({self.id!r}, ...)"  # secrets stay out of logs and tracebacks


def new_token(key_id: str) -> Token:
    return Token(key_id, new_secret())


def new_secret() -> str:
    return base32hex(secrets.randbits(SECRET_BITS), SECRET_LENGTH)


def parse_token(text: str) -> Token:
    """Take a token's text apart; raises Unauthenticated, which never repeats the text."""
    parts = text.split("_")
    if len(text) > _TEXT_MAX or len(parts) != 3 or parts[0] != PREFIX or not all(parts):
        raise Unauthenticated(f"the token does not look like {PREFIX}_<id>_<secret>")
    return Token(parts[1], parts[2])


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret's text, in hex, as ``ApiKey.sha256`` holds it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, sha256: str) -> bool:
    """Tell whether ``secret`` has this digest, in constant time."""
    return hmac.compare_digest(digest(secret).encode(), sha256.encode())
