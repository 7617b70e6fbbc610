"""Whether what an agent shows still speaks for its node: asked of every message that it sends."""

from __future__ import annotations

from controlplane.commands.admission import refusal_of
from controlplane.state import ClusterState
from shared.errors import Unauthenticated


def check_admitted(state: ClusterState, name: str, serial: str) -> None:
    """Raise Unauthenticated unless the certificate with this serial speaks for the node."""
    known = state.admissions.get(name)
    why = refusal_of(None if known is None else known.record, serial)
    if why is not None:
        raise Unauthenticated(why)
