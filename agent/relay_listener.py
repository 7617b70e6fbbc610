"""The destination's side of relays in the agent: admits tokens, and hands connections over.

The agent itself reads no byte of a connection: each goes to a process of its own
(``relay_serve``). A token that was admitted and not yet used is known to this process only, by its
hash; one that was used is a file with the process that used it, which later agents find.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import socket
from pathlib import Path

from agent.relay_files import NOBODY, claim, holder, sweep, used_file
from agent.relay_link import TOKEN_BYTES
from agent.relay_orders import Admitted, ServeOrder, encode
from agent.relay_settings import RelaySettings, checked
from agent.relay_spawn import RelaySpawner, kill
from shared.errors import Overloaded, StateConflict

log = logging.getLogger(__name__)

SERVE_MODULE = "agent.relay_serve"
# A node takes in a few VMs at once. The rest is for strangers, who leave within the time for
# greetings; each process takes some 8 MB of its own.
PROCESSES_MAX = 16
# A node's incoming moves are planned a few at a time; each process is handed the whole list.
ADMITTED_MAX = 64
# Whoever was refused costs a process's start: the place of one stays empty for this long.
REFUSED_PAUSE_S = 1.0
# Accepting fails when descriptors run out; they come back when something ends.
ACCEPT_PAUSE_S = 1.0
# As many as may wait while all places are taken.
BACKLOG = PROCESSES_MAX


class RelayListener:
    """Listens from ``start`` to ``stop``; relays that run go on after it."""

    def __init__(self, settings: RelaySettings, spawner: RelaySpawner) -> None:
        self._settings = settings
        self._spawner = spawner
        self._admitted: dict[str, Admitted] = {}
        self._places = asyncio.Semaphore(PROCESSES_MAX)
        self._listening: socket.socket | None = None
        settings.directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def start(self, host: str, port: int) -> int:
        """Listen and return the port (for ``port`` 0); raises OSError when it is taken."""
        assert self._listening is None, "a listener is started once"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self._listening.setblocking(False)
        bound: int = self._listening.getsockname()[1]
        return bound

    async def run(self) -> None:
        """Hand connections over, until cancelled."""
        assert self._listening is not None, "it was started"
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                connection, address = await loop.sock_accept(self._listening)
                with connection:
                    self._hand_over(connection, address[0])
            except OSError as error:
                log.warning("no relay could be accepted", extra={"reason": str(error)})
                loop.call_later(ACCEPT_PAUSE_S, self._places.release)

    def stop(self) -> None:
        """Stop listening; does nothing when it never listened."""
        if self._listening is not None:
            self._listening.close()

    async def admit(self, name: str, source_node: str) -> str:
        """Return a new token for ``source_node``; see ``Relays.admit``."""
        sweep(self._settings.directory)
        if holder(used_file(self._settings.directory, checked(name))) is not None:
            raise StateConflict(f"the token of relay {name} was used or revoked")
        if name not in self._admitted and len(self._admitted) >= ADMITTED_MAX:
            raise Overloaded(f"{ADMITTED_MAX} relays are admitted already")
        token = secrets.token_bytes(TOKEN_BYTES)
        self._admitted[name] = Admitted(
            name, hashlib.sha256(token).hexdigest(), self._settings.agent_identity(source_node)
        )
        return token.hex()

    async def withdraw(self, name: str) -> None:
        """Refuse the token from now on; see ``Relays.withdraw``."""
        self._refuse(name)

    async def revoke(self, name: str) -> None:
        """Refuse the token from now on, and end who used it; see ``Relays.revoke``."""
        used = self._refuse(name)
        await kill(holder(used) or NOBODY)

    def _refuse(self, name: str) -> Path:
        """Have nobody use the token from now on; returns the mark of who has used it."""
        sweep(self._settings.directory)
        self._admitted.pop(checked(name), None)
        used = used_file(self._settings.directory, name)
        # A process that holds the token already finds it used, by nobody.
        claim(used, NOBODY)
        return used

    def _hand_over(self, connection: socket.socket, address: str) -> None:
        if not self._admitted:
            log.info("nobody is expected to relay", extra={"address": address})
            self._free_place(after_refusal=True)
            return
        settings = self._settings
        order = ServeOrder(
            directory=str(settings.directory),
            libvirt_socket=str(settings.libvirt_socket),
            tls=settings.tls,
            admitted=tuple(self._admitted.values()),
            greeting_limit_s=settings.greeting_limit_s,
            linger_limit_s=settings.linger_limit_s,
        )
        self._spawner.spawn(
            SERVE_MODULE,
            address,
            encode(order),
            connection=connection.fileno(),
            ended=lambda status: self._free_place(after_refusal=status != 0),
        )

    def _free_place(self, *, after_refusal: bool) -> None:
        if after_refusal:
            asyncio.get_running_loop().call_later(REFUSED_PAUSE_S, self._places.release)
        else:
            self._places.release()
