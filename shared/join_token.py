"""Join tokens as text: ``njt_<id>_<secret>_<fingerprint>``.

The fingerprint is the SHA-256 of the cell's CA certificate (DER, hex): whoever has the token knows
the control plane by it, before any file of the cell is on the node.
"""

from __future__ import annotations

import re

from msgspec import Struct

from shared.errors import Unauthenticated

PREFIX = "njt"
_TEXT = re.compile(
    rf"{PREFIX}_(?P<id>[a-z0-9-]{{1,60}})_(?P<secret>[a-z0-9]{{1,80}})_"
    r"(?P<ca>[0-9a-f]{64})\Z"
)


class JoinTokenText(Struct, frozen=True):
    """``str()`` is the text that an operator hands to a node."""

    id: str
    secret: str
    ca_sha256: str

    def __str__(self) -> str:
        return f"{PREFIX}_{self.id}_{self.secret}_{self.ca_sha256}"

    def __repr__(self) -> str:
        return f"JoinTokenText({self.id!r}, ...)"  # secrets stay out of logs and tracebacks


def parse_join_token(text: str) -> JoinTokenText:
    """Take a token's text apart; raises Unauthenticated, which never repeats the text."""
    found = _TEXT.match(text.strip())
    if found is None:
        raise Unauthenticated(
            f"the join token does not look like {PREFIX}_<id>_<secret>_<fingerprint of the CA>"
        )
    return JoinTokenText(found["id"], found["secret"], found["ca"])
