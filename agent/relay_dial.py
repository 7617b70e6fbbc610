"""The source's end of one relay, as a process: a unix socket for libvirtd, and the way to the peer.

It tells the agent ``ready`` once its socket listens and from then on needs nobody. It takes one
connection, from libvirtd's user, and ends with it, or when none came in time. Nothing of it is left
then but a log line. Standard library only, since its start is part of a migration's time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from agent import relay_link
from agent.relay_files import claim, dial_file, own_key, socket_file
from agent.relay_orders import DialOrder, dial_order
from agent.relay_process import answer, begin, say
from agent.relay_pump import Pump
from shared.addresses import host_and_port

READY = "ready"
# struct ucred: pid, uid, gid.
_CREDENTIALS = struct.Struct("3i")


def main() -> None:
    order = dial_order(begin(handed_over=0))
    directory = Path(order.directory)
    mark = dial_file(directory, order.name)
    if not claim(mark, own_key()):
        answer("a relay of that name is open")
        return
    try:
        _relay(order, socket_file(directory, order.name))
    except OSError as error:
        say("warning", "a relay failed", relay=order.name, peer=order.peer, reason=str(error))
        mark.unlink(missing_ok=True)  # before the agent hears of it, which ends the process
        answer(str(error))
    else:
        mark.unlink(missing_ok=True)


def _relay(order: DialOrder, path: Path) -> None:
    with _listening(path) as listener:
        answer(READY)
        local = _take(listener, order)
    with local:
        link = relay_link.call(
            host_and_port(order.address), order.tls, order.peer, bytes.fromhex(order.token)
        )
        with link:
            say("info", "relaying", relay=order.name, peer=order.peer)
            ending = Pump(local, link, order.linger_limit_s).run()
    say("info", "a relay ended", relay=order.name, peer=order.peer, reason=ending)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a new unix socket, which is gone after the block."""
    path.unlink(missing_ok=True)  # of a relay of that name that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # The mode is there from the beginning: nobody may come in between.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            listener.listen(1)
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _take(listener: socket.socket, order: DialOrder) -> socket.socket:
    """Return the one connection; strangers are sent away. Raises TimeoutError."""
    deadline_s = time.monotonic() + order.idle_limit_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        listener.settimeout(left_s)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        uid = _peer_uid(connection)
        if uid == order.client_uid:
            return connection
        connection.close()
        say("warning", "a relay sent a stranger away", relay=order.name, uid=uid)
    raise TimeoutError(f"nobody used it in {order.idle_limit_s:g} s")


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid
