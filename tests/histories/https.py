"""One client's connections to the replicas, kept open; plain HTTPS, one request at a time.

What was answered is told as it came. What was not is told apart: a request that never left, and one
that may have arrived. Each replica has several connections in stock, so that requests still reach
one that stands still when others have been given up there: it finds them when it goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

# To a replica that stands still the kernel connects; then TLS waits in vain.
CONNECT_LIMIT_S = 1.0


STOCK = 4


class NeverSent(Exception):
    """Nobody took the connection: the request has not left."""


class NoAnswer(Exception):
    """The request may have arrived; there was no whole answer in time."""


class Answer(Struct, frozen=True):
    """``headers`` by their names in lower case; ``body`` is the decoded JSON."""

    status: int
    headers: dict[str, str]
    body: Any

    def text(self, field: str) -> str:
        """Return a text of the body; empty when there is none."""
        found = self.body.get(field) if isinstance(self.body, dict) else None
        return found if isinstance(found, str) else ""


class Wire:
    """The connections of one client; ``urls`` by the replicas' names."""

    def __init__(self, urls: Mapping[str, str], tls: ssl.SSLContext, token: str) -> None:
        self._urls = dict(urls)
        self._tls = tls
        self._token = token
        self._stock: dict[str, list[http.client.HTTPSConnection]] = {name: [] for name in urls}

    def replicas(self) -> tuple[str, ...]:
        return tuple(self._urls)

    def close(self) -> None:
        for connections in self._stock.values():
            for connection in connections:
                connection.close()
            connections.clear()

    def ask(
        self,
        replica: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: object,
        limit_s: float,
    ) -> Answer:
        """Send a request and return its answer. Raises NeverSent, NoAnswer."""
        connection = self._taken(replica)
        assert connection.sock is not None, "a connected connection has a socket"
        connection.sock.settimeout(limit_s)
        sent = {"Authorization": f"Bearer {self._token}", **headers}
        encoded = None
        if body is not None:
            encoded = msgspec.json.encode(body)
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, target, encoded, sent)
            response = connection.getresponse()
            # Without a limit: with one, an answer that was cut off would look like a whole one.
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NoAnswer(f"{type(error).__name__}: {error}") from error
        self._put_back(replica, connection)
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            msgspec.json.decode(data) if data else None,
        )

    def _taken(self, replica: str) -> http.client.HTTPSConnection:
        """Take a connection out of stock that is still open, or make one. Raises NeverSent."""
        stock = self._stock[replica]
        while stock:
            connection = stock.pop()
            # Nobody has asked anything: what is there to read is the other end's goodbye.
            if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()
        return self._connected(replica)

    def _put_back(self, replica: str, connection: http.client.HTTPSConnection) -> None:
        """Put a connection back, and another one beside it if the stock is low."""
        stock = self._stock[replica]
        stock.append(connection)
        if len(stock) < STOCK:
            with contextlib.suppress(NeverSent):
                stock.append(self._connected(replica))

    def _connected(self, replica: str) -> http.client.HTTPSConnection:
        url = urlsplit(self._urls[replica])
        assert url.hostname is not None, f"{replica} has an address"
        connection = http.client.HTTPSConnection(
            url.hostname, url.port, timeout=CONNECT_LIMIT_S, context=self._tls
        )
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise NeverSent(f"{type(error).__name__}: {error}") from error
        return connection
