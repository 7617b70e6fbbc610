"""Who asks: bearer tokens against the records of API keys.

Nothing is cached: a digest of 52 characters takes a microsecond, and a key that is taken back or
runs out stops working with the next request.
"""

from __future__ import annotations

from controlplane.services.context import ROLES, Principal, Scope
from controlplane.state import ClusterState
from controlplane.tokens import matches, parse_token
from shared.clock import Clock
from shared.errors import Unauthenticated, Unavailable

_SCHEME = "bearer"


def authenticate(
    state: ClusterState, clock: Clock, authorization: bytes | None, request_id: str
) -> Principal:
    """Return who an Authorization header speaks for.

    Raises Unauthenticated; Unavailable while this replica has not read the records yet, so that
    nobody takes a good token for a bad one. An unknown key and a wrong secret are told apart by
    nobody.
    """
    if authorization is None:
        raise Unauthenticated("this needs a token: Authorization: Bearer nck_…")
    scheme, _, text = authorization.decode("latin-1").partition(" ")
    if scheme.lower() != _SCHEME:
        raise Unauthenticated("the only scheme here is Bearer")
    token = parse_token(text.strip())
    if state.revision == 0 or state.cluster() is None:
        raise Unavailable("this replica has not read the cluster's records yet; try again shortly")
    stored = state.api_keys.get(token.id)
    if stored is None or not matches(token.secret, stored.record.sha256):
        raise Unauthenticated("the token is not valid here")
    key = stored.record
    if key.expires_at is not None and key.expires_at <= clock.now():
        raise Unauthenticated("the token has expired")
    return Principal(
        name=key.principal,
        permissions=ROLES.get(key.role, frozenset()),
        scope=Scope(),
        request_id=request_id,
    )
