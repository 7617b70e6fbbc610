"""What the nodes' libvirtds tell of their domains, as it happens: begun, suspended, resumed, ended.

A process of its own listens to all of them (libvirt's event loop is one for each process) and
writes a line for each event, with its date on the machine's one monotonic clock. `DomainEvents`
starts it and hands on each event at once. A libvirtd that dies is listened to again as soon as it
is back. Asks libvirt for nothing but its events.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple

import libvirt

from tests.lab.link import wait_until
from tests.lab.nodes import LightNode

# One that is being started again listens within a second.
RECONNECT_PERIOD_S = 0.05
LISTEN_LIMIT_S = 30.0
END_LIMIT_S = 10.0
LISTENING = "listening"
# By the numbers of libvirt's virDomainEventType.
KINDS = (
    "defined",
    "undefined",
    "started",
    "suspended",
    "resumed",
    "stopped",
    "shutdown",
    "pmsuspended",
    "crashed",
)


class DomainEvent(NamedTuple):
    """``detail`` is libvirt's number, whose meaning depends on the kind."""

    at: float
    node: str
    domain: str
    kind: str
    detail: int


Hook = Callable[[DomainEvent], None]


class DomainEvents:
    """Listens while it is open; ``hook`` is called in a thread, within a millisecond or two."""

    def __init__(self, nodes: Iterable[LightNode], hook: Hook = lambda event: None) -> None:
        self.seen: list[DomainEvent] = []
        self.hook = hook
        self._uris = {node.name: node.libvirt_uri for node in nodes}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def of(self, domain: str, since: float = 0.0) -> list[DomainEvent]:
        return [e for e in list(self.seen) if e.domain == domain and e.at >= since]

    def __enter__(self) -> DomainEvents:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.domain_events", json.dumps(self._uris)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(
            lambda: {e.node for e in list(self.seen) if e.kind == LISTENING} >= set(self._uris),
            "every node's libvirtd to be listened to",
            limit_s=LISTEN_LIMIT_S,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, reader = self._process, self._reader
        assert process is not None, "it was entered"
        assert reader is not None, "it was entered"
        assert process.stdin is not None, "it was started with a pipe"
        process.stdin.close()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:  # a call to a libvirtd that stands still
            process.kill()
            process.wait()
        reader.join()
        assert process.stdout is not None, "it was started with a pipe"
        process.stdout.close()

    def _read(self) -> None:
        assert self._process is not None, "it was started"
        assert self._process.stdout is not None, "it was started with a pipe"
        for line in self._process.stdout:
            event = DomainEvent(*json.loads(line))
            self.seen.append(event)
            self.hook(event)


class _Listener:
    """Keeps one node's libvirtd listened to."""

    def __init__(self, node: str, uri: str) -> None:
        self._node = node
        self._uri = uri

    def run(self) -> None:
        while True:
            closed = threading.Event()
            with contextlib.suppress(libvirt.libvirtError):
                self._listen(closed)
                closed.wait()
            time.sleep(RECONNECT_PERIOD_S)

    def _listen(self, closed: threading.Event) -> None:
        connection = libvirt.openReadOnly(self._uri)
        connection.registerCloseCallback(lambda *_: closed.set(), None)
        connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._take, None
        )
        _tell(self._node, "", LISTENING, 0)

    def _take(
        self,
        connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        kind: int,
        detail: int,
        opaque: object,
    ) -> None:
        _tell(self._node, domain.name(), KINDS[kind], detail)


_telling = threading.Lock()


def _tell(node: str, domain: str, kind: str, detail: int) -> None:
    line = json.dumps([time.monotonic(), node, domain, kind, detail]) + "\n"
    with _telling:
        sys.stdout.write(line)
        sys.stdout.flush()


def listen(uris: dict[str, str]) -> None:
    """Listen until standard input ends, which it does at the latest with whoever started this."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    for work in (loop, *(_Listener(node, uri).run for node, uri in uris.items())):
        threading.Thread(target=work, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    listen(json.loads(sys.argv[1]))
