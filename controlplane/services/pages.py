"""Pages of lists: limits, cursors, and the one moment that all pages of a walk show.

A cursor is opaque to clients. It names the last key of its page, the filter it belongs to and the
revision that the first page was read at: the walk goes on through the records as they were then,
and a name in its filter means what it meant then. With another filter it is refused, because the
walk would skip or repeat items without anybody noticing; where the moment is no longer known it has
expired, and the client starts again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from controlplane.services.revisions import (
    ClusterRevision,
    epoch_of,
    parse_cluster_revision,
    present,
)
from controlplane.state import ClusterState, Then
from shared.codec import pack, unpack
from shared.errors import (
    CursorExpired,
    FieldError,
    RecordUnreadable,
    Unavailable,
    ValidationFailed,
)
from shared.model import Record

LIMIT_DEFAULT = 50
# A page of 500 VMs is 1.2 MB of JSON and takes about 10 ms to make.
LIMIT_MAX = 500
# Holds what a filter may name: 16 objects, which may be unknown words of 63 plain characters. As a
# query parameter each of its own may be sent as 12; servers take 64 KiB of URL.
_CURSOR_LENGTH_MAX = 1600
_FINGERPRINT_BYTES = 6

R = TypeVar("R", bound=Record)
Item = TypeVar("Item")

Limit = Annotated[int, Meta(ge=1, le=LIMIT_MAX, description="how many items a page holds")]
CursorText = Annotated[
    str,
    Meta(max_length=_CURSOR_LENGTH_MAX, description="next_cursor of the page before; same filter"),
]


class Cursor(Struct, frozen=True, array_like=True):
    """``at`` is empty in a cursor of release 0.1, which knew no moment."""

    last: str
    fingerprint: bytes
    at: str = ""
    objects: tuple[str, ...] = ()


class Walk(Struct, frozen=True):
    """Where a client is in a list: behind ``last`` (None: before the first), as of ``at``.

    ``objects`` are the ids of those that its filter names.
    """

    at: ClusterRevision
    last: str | None
    fingerprint: bytes
    objects: tuple[str, ...] = ()

    def cursor(self, last: str) -> str:
        """Return the cursor of a page that ends with ``last``."""
        raw = pack(Cursor(last, self.fingerprint, str(self.at), self.objects))
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def walk(
    state: ClusterState, cursor: str | None, *filters: object, objects: tuple[str, ...] = ()
) -> Walk:
    """Return where a request for a page stands; without a cursor a new walk begins, as of now.

    ``objects`` are the ids that the filter's names stand for now: a new walk takes them along.
    Raises ValidationFailed, CursorExpired; Unavailable while this replica is behind the walk.
    """
    fingerprint = _fingerprint(filters)
    if cursor is None:
        return Walk(present(state), None, fingerprint, objects)
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        read = unpack(raw, Cursor)
    except (binascii.Error, ValueError, RecordUnreadable):
        raise _refused("bad_format", "is not a cursor of this API") from None
    if read.fingerprint != fingerprint:
        raise _refused("not_allowed", "belongs to a list with another filter")
    at = parse_cluster_revision(read.at)
    if at is None or at.epoch != epoch_of(state):
        raise CursorExpired("the cursor is of before an upgrade or a restore: list from the start")
    if at.revision > state.revision:
        raise Unavailable("this replica has not seen the revision of the cursor yet")
    return Walk(at, read.last, fingerprint, read.objects)


def cut(
    here: Walk, found: Sequence[Item], limit: int, key: Callable[[Item], str]
) -> tuple[Sequence[Item], str | None]:
    """Return the page where a walk stands, and the cursor of the next; ``found`` is by ``key``."""
    start = 0 if here.last is None else bisect_right(found, here.last, key=key)
    page = found[start : start + limit]
    more = start + limit < len(found)
    return page, here.cursor(key(page[-1])) if more else None


def records(state: ClusterState, kind: type[R], at: ClusterRevision) -> Then[R]:
    """Return the records as a walk shows them, until other tasks get their turn.

    Raises CursorExpired.
    """
    then = state.then(kind, at.revision)
    if then is None:
        raise CursorExpired(
            "this replica no longer knows what the list was when the walk began: list again"
        )
    return then


def _fingerprint(filters: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(pack(filters), digest_size=_FINGERPRINT_BYTES).digest()


def _refused(code: str, message: str) -> ValidationFailed:
    return ValidationFailed((FieldError("/cursor", code, message),))
