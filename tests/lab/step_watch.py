"""The steps of migrations as etcd has them: who watches knows of a step once it is written.

Watches the records themselves, beside the control plane, through etcd's own gateway: a fault can
be done within milliseconds of the record that a step's intent is. Reads only.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from controlplane.store.keys import key_of
from shared.codec import unpack
from shared.errors import RecordUnreadable
from shared.model import Operation
from tests.lab.link import wait_until

RECONNECT_PERIOD_S = 0.05

# Called with each version of an operation that is written, in a thread.
Hook = Callable[[Operation], None]


class StepWatch:
    """Watches while it is open. What is written while etcd is away is not seen."""

    def __init__(self, endpoint: str, hook: Hook = lambda operation: None) -> None:
        self.hook = hook
        self.seen: list[tuple[float, Operation]] = []
        self._endpoint = endpoint
        self._watches = threading.Event()
        self._closed = False
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StepWatch:
        self._thread.start()
        wait_until(self._watches.is_set, "etcd to be watched")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError, http.client.HTTPException, AttributeError):
                for operation in self._operations():
                    self.seen.append((time.monotonic(), operation))
                    self.hook(operation)
            time.sleep(RECONNECT_PERIOD_S)

    def _operations(self) -> Iterator[Operation]:
        folder = key_of(Operation, "")
        past = folder[:-1] + chr(ord(folder[-1]) + 1)
        wanted = {"create_request": {"key": _encoded(folder), "range_end": _encoded(past)}}
        connection = self._connection = http.client.HTTPConnection(self._endpoint)
        try:
            connection.request("POST", "/v3/watch", json.dumps(wanted))
            answer = connection.getresponse()
            for line in answer:
                result = json.loads(line).get("result", {})
                if result.get("created"):
                    self._watches.set()
                for event in result.get("events", ()):
                    if event.get("type", "PUT") == "PUT":
                        with contextlib.suppress(RecordUnreadable):
                            yield unpack(base64.b64decode(event["kv"]["value"]), Operation)
        finally:
            connection.close()


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
