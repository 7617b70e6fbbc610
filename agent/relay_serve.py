"""The destination's end of one relay, as a process: from an accepted connection to libvirt.

Who is at the other end must have a certificate of this cell, name a token that is admitted for the
node in it, and be the first to: the token is used up before libvirt is touched. Everybody else is
sent away with a log line. Standard library only, since its start is part of a migration's time.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import sys
import time
from pathlib import Path

from agent import relay_link
from agent.relay_files import claim, own_key, used_file
from agent.relay_orders import Admitted, ServeOrder, serve_order
from agent.relay_process import CONNECTION_FD, begin, say
from agent.relay_pump import Pump

# The exit status that tells the agent that no token was used.
REFUSED = 3
# libvirtd's socket is on this node; one that takes nobody in this time hangs.
LIBVIRT_LIMIT_S = 5.0


def main() -> None:
    order = serve_order(begin(handed_over=1))
    connection = socket.socket(fileno=CONNECTION_FD)
    address = connection.getpeername()[0]
    deadline_s = time.monotonic() + order.greeting_limit_s
    try:
        with relay_link.answer(connection, order.tls, deadline_s) as link:
            peer = relay_link.identity(link)
            admitted = _use_token(link, peer, order, deadline_s)
            _relay(link, admitted, order)
    except PermissionError as error:
        say("warning", "a relay was refused", address=address, reason=str(error))
        sys.exit(REFUSED)
    except OSError as error:
        say("warning", "a relay failed", address=address, reason=str(error))
        sys.exit(REFUSED)


def _use_token(link: ssl.SSLSocket, peer: str, order: ServeOrder, deadline_s: float) -> Admitted:
    """Use the token up that the peer names. Raises PermissionError."""
    digest = hashlib.sha256(relay_link.read_token(link, deadline_s)).hexdigest()
    admitted = next((each for each in order.admitted if each.digest == digest), None)
    if admitted is None:
        raise PermissionError(f"{peer} has no token that is admitted")
    if admitted.source != peer:
        raise PermissionError(f"{peer} has the token of {admitted.source}")
    if not claim(used_file(Path(order.directory), admitted.name), own_key()):
        raise PermissionError(f"the token of {admitted.name} was used or revoked")
    return admitted


def _relay(link: ssl.SSLSocket, admitted: Admitted, order: ServeOrder) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as local:
        local.settimeout(LIBVIRT_LIMIT_S)
        local.connect(order.libvirt_socket)
        link.settimeout(LIBVIRT_LIMIT_S)
        link.sendall(relay_link.ACCEPTED)
        say("info", "relaying", relay=admitted.name, peer=admitted.source)
        ending = Pump(local, link, order.linger_limit_s).run()
    say("info", "a relay ended", relay=admitted.name, peer=admitted.source, reason=ending)
