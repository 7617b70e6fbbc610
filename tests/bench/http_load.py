"""A load generator of its own process: keep-alive connections, one request at a time on each.

Reads runs from standard input, one JSON object a line, and answers each with a line that holds how
many requests were answered with 200 and in how many seconds. Raw sockets, so that the client is
never what is measured; nothing is pipelined.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time
from typing import Any


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(order: dict[str, Any]) -> dict[str, float]:
    request = (
        f"GET {order['path']} HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {order['token']}\r\nAccept: application/json\r\n\r\n"
    ).encode()
    connections = [_connect(order) for _ in range(order["connections"])]
    for connection in connections:  # the first exchange pays for what later ones do not
        _send(connection, request)
        _read_answer(connection)
    answered = 0
    started = time.perf_counter()
    ends = started + order["seconds"]
    while (now := time.perf_counter()) < ends:
        for connection in connections:
            _send(connection, request)
        for connection in connections:
            _read_answer(connection)
        answered += len(connections)
    took_s = now - started
    for connection in connections:
        connection.close()
    return {"answered": answered, "seconds": took_s}


def _connect(order: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", order["port"]))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not order["ca"]:
        return connection
    context = ssl.create_default_context(cafile=order["ca"])
    return context.wrap_socket(connection, server_hostname="localhost")


def _send(connection: socket.socket, request: bytes) -> None:
    connection.sendall(request)


def _read_answer(connection: socket.socket) -> None:
    data = connection.recv(65536)
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += connection.recv(65536)
    head = data[:end].lower()
    if not head.startswith(b"http/1.1 200"):
        raise SystemExit(f"the answer is {head[:80]!r}")
    length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    missing = length - (len(data) - end - 4)
    while missing > 0:
        missing -= len(connection.recv(65536))


if __name__ == "__main__":
    main()
