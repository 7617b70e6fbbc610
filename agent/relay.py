"""The relays of live migrations, as the agent's migration code needs them.

A migration's source libvirtd never reaches the destination's over the network: it connects to a
unix socket of its own node, and those bytes go over mTLS between the two nodes to the destination's
libvirt socket. Both ends are processes of their own (``docs/decisions/0007-relay-processes.md``).
A name is ``<vm id>.<generation>`` of the attempt that moves; it is used for one relay, ever.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class RelayTarget(Struct, frozen=True):
    """The other end: ``address`` is ``host:port`` of its relays, ``node_name`` whom to expect."""

    address: str
    node_name: str


class Relays(Protocol):
    """Both sides: a destination admits, withdraws and revokes, a source opens and closes.

    Neither ``revoke`` nor ``close`` asks whether a migration still needs the relay: libvirt may
    resume a guest on both nodes when its connection breaks around the switch.
    """

    async def admit(self, name: str, source_node: str) -> str:
        """Return a new token for ``source_node``; of a name's tokens only one is ever used.

        Raises StateConflict when a token of that name was used or revoked, Overloaded.
        """
        ...

    async def withdraw(self, name: str) -> None:
        """Refuse the name's token for good; a relay that has used it goes on."""
        ...

    async def revoke(self, name: str) -> None:
        """Refuse the name's token for good, and end the relay that used it.

        When it returns, no byte comes through any more. Raises OutcomeUnknown when the process does
        not end in time; then it is to be called again.
        """
        ...

    async def open(self, name: str, target: RelayTarget, token: str) -> str:
        """Return the URI by which this node's libvirtd, and nobody else, reaches the target's.

        It works for one connection, which must come soon. Raises StateConflict when a relay of that
        name is open, Unavailable when it could not be opened.
        """
        ...

    async def close(self, name: str) -> None:
        """End the relay if it is open, whoever opened it; its connections are closed on return.

        Raises OutcomeUnknown as ``revoke`` does.
        """
        ...
