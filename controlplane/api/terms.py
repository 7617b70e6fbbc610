"""The headers by which a client ties terms to a write: checked, and made what services take."""

from __future__ import annotations

import hashlib
import re

from controlplane.commands.terms import RequestKey
from controlplane.services.context import Principal
from controlplane.services.requests import WAIT_MAX_S
from shared.errors import FieldError, UnsupportedMediaType, ValidationFailed

IDEMPOTENCY_KEY = "Idempotency-Key"
# A UUID has 36; this leaves room for a name before it.
KEY_LENGTH_MAX = 128
KEY_PATTERN = r"^[\x21-\x7e]+$"
_KEY = re.compile(KEY_PATTERN.removesuffix("$") + r"\Z")
_DIGEST_BYTES = 20
_WAIT = re.compile(r'(?:^|,)\s*wait\s*=\s*"?(?P<seconds>[0-9]{1,9})"?\s*(?:[;,]|$)', re.IGNORECASE)
PATCH_TYPES = ("application/merge-patch+json", "application/json")


def request_key(
    header: bytes | None, principal: Principal, method: str, target: tuple[str, bytes], body: bytes
) -> RequestKey | None:
    """Return what a request is kept under; ``target`` is its path and query string.

    Raises ValidationFailed. Another principal's same key is another key.
    """
    if header is None:
        return None
    text = header.decode("latin-1")
    pointer = f"/{IDEMPOTENCY_KEY}"
    if len(text) > KEY_LENGTH_MAX:
        message = f"must have at most {KEY_LENGTH_MAX} characters"
        raise ValidationFailed((FieldError(pointer, "too_long", message),))
    if _KEY.match(text) is None:
        message = "must be one or more visible ASCII characters"
        raise ValidationFailed((FieldError(pointer, "bad_format", message),))
    path, query = target
    return RequestKey(
        id=_digest(principal.scope.tenant.encode(), principal.name.encode(), header),
        principal=principal.name,
        fingerprint=_digest(method.encode(), path.encode("utf-8", "surrogatepass"), query, body),
    )


def preferred_wait_s(prefer: bytes | None) -> int | None:
    """Return how long a client would have its answer held back for the end of an operation.

    A preference that is none of ours, or that makes no sense, is passed over (RFC 7240).
    """
    match = None if prefer is None else _WAIT.search(prefer.decode("latin-1"))
    return None if match is None else min(int(match["seconds"]), WAIT_MAX_S)


def check_patch_type(content_type: bytes | None) -> None:
    """Raise UnsupportedMediaType for a patch of a kind that this API does not read."""
    if content_type is None:
        return
    given = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if given not in PATCH_TYPES:
        raise UnsupportedMediaType(f"a patch here is {' or '.join(PATCH_TYPES)}")


def _digest(*parts: bytes) -> str:
    """Hash parts so that no two rows of them give the same bytes."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
