"""What both sides of an agent's relays are given: paths, identities, limits."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from agent.relay_link import GREETING_LIMIT_S
from agent.relay_orders import TlsFiles
from shared.tls import Identity, Role

# A VM's id and a generation; it becomes part of file names.
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
# The source's libvirtd is told the socket's path right after it listens.
IDLE_LIMIT_S = 60.0
# libvirt closes both directions together; what hangs on one of them is not waited for.
LINGER_LIMIT_S = 30.0


class RelaySettings(Struct, frozen=True, kw_only=True):
    """``directory`` is the agent's alone; ``cell`` is the one of its own certificate.

    ``client_uid`` is the user that this node's libvirtd runs as.
    """

    directory: Path
    libvirt_socket: Path
    cell: str
    tls: TlsFiles
    client_uid: int = 0
    idle_limit_s: float = IDLE_LIMIT_S
    greeting_limit_s: float = GREETING_LIMIT_S
    linger_limit_s: float = LINGER_LIMIT_S

    def agent_identity(self, node_name: str) -> str:
        return str(Identity(self.cell, Role.AGENT, node_name))


def checked(name: str) -> str:
    """Return ``name``, which becomes part of paths."""
    assert _NAME.fullmatch(name), f"{name!r} names no relay"
    return name
