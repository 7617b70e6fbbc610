"""The source's side of relays in the agent: opens and closes sockets that lead to other nodes.

Each is a process of its own (``relay_dial``), which writes down who it is before it listens: so an
agent finds what an earlier one opened, and can end it.
"""

from __future__ import annotations

import asyncio
import os
from urllib.parse import quote

from agent.relay import RelayTarget
from agent.relay_dial import READY
from agent.relay_files import NOBODY, dial_file, holder, lives, socket_file, sweep
from agent.relay_orders import DialOrder, encode
from agent.relay_settings import RelaySettings, checked
from agent.relay_spawn import RelaySpawner, kill
from shared.errors import StateConflict, Unavailable

DIAL_MODULE = "agent.relay_dial"
# A relay listens within a tenth of a second; a machine that swaps takes longer.
START_LIMIT_S = 10.0
# One line: that it is ready, or why it is not.
ANSWER_BYTES_MAX = 4096


class OutgoingRelays:
    """Holds nothing but files: they tell what is open."""

    def __init__(self, settings: RelaySettings, spawner: RelaySpawner) -> None:
        self._settings = settings
        self._spawner = spawner
        settings.directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def is_open(self, name: str) -> bool:
        """Tell whether a relay of that name runs, whoever started it."""
        return lives(holder(dial_file(self._settings.directory, checked(name))) or NOBODY)

    async def open(self, name: str, target: RelayTarget, token: str) -> str:
        """Return the URI of a relay that listens; see ``Relays.open``."""
        if self.is_open(name):
            raise StateConflict(f"relay {name} is open already")
        directory = self._settings.directory
        sweep(directory)
        dial_file(directory, name).unlink(missing_ok=True)  # of one that was killed
        order = encode(self._order(name, target, token))
        answer_end, given_end = os.pipe()
        try:
            pid = self._spawner.spawn(DIAL_MODULE, name, order, stdout=given_end)
        except OSError as error:
            os.close(answer_end)
            raise Unavailable(f"relay {name} could not be started: {error}") from error
        finally:
            os.close(given_end)
        try:
            said = await _read_to_end(answer_end)
            if said != READY:
                raise Unavailable(f"relay {name} did not start: {said or 'it ended'}")
        except BaseException:
            self._spawner.kill(pid)  # nobody would know of it
            raise
        finally:
            os.close(answer_end)
        return f"qemu+unix:///system?socket={quote(str(socket_file(directory, name)))}"

    async def close(self, name: str) -> None:
        """End the relay if it runs; see ``Relays.close``."""
        directory = self._settings.directory
        mark = dial_file(directory, checked(name))
        await kill(holder(mark) or NOBODY)
        socket_file(directory, name).unlink(missing_ok=True)
        mark.unlink(missing_ok=True)

    def _order(self, name: str, target: RelayTarget, token: str) -> DialOrder:
        settings = self._settings
        return DialOrder(
            name=name,
            directory=str(settings.directory),
            address=target.address,
            peer=settings.agent_identity(target.node_name),
            token=token,
            tls=settings.tls,
            client_uid=settings.client_uid,
            idle_limit_s=settings.idle_limit_s,
            linger_limit_s=settings.linger_limit_s,
        )


async def _read_to_end(descriptor: int) -> str:
    """Return the line that a relay process says before it lets go of its standard output."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    said = b""
    loop.add_reader(descriptor, readable.set)
    try:
        async with asyncio.timeout(START_LIMIT_S):
            while len(said) < ANSWER_BYTES_MAX:
                await readable.wait()
                readable.clear()
                try:
                    part = os.read(descriptor, ANSWER_BYTES_MAX)
                except BlockingIOError:
                    continue
                if not part:
                    break
                said += part
    except TimeoutError:
        raise Unavailable(f"a relay said nothing in {START_LIMIT_S:.0f} s") from None
    finally:
        loop.remove_reader(descriptor)
    return said.decode(errors="replace").strip()
