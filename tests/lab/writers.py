"""Writers of a process of their own: each changes one VM's label again and again, and logs every
answer.

Imports nothing of the product. Reads one JSON object from standard input (``urls``, ``ca``,
``token``, ``log``, ``vms``), prints ``ready``, and writes until standard input ends. Each write
carries an idempotency key and a number that only grows; a writer repeats it, at another replica,
after a lost connection or a 503 that the API documents as retryable, and ends with an error at
anything else.

One line of the log is one request: ``[writer, number, sent, got, status, code]``, times in seconds
of the monotonic clock; status 0 is a connection that broke.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import threading
import time
import urllib.parse
import uuid
from pathlib import Path
from typing import IO, Any

# Longer than a request may take: 6 s while nobody leads, 3 s for a replica that lags, and some.
ANSWER_S = 15.0
# Twelve milliseconds between two writes of eight writers is how exactly a gap is known.
PAUSE_S = 0.1
LABEL = "count"


class Writer(threading.Thread):
    def __init__(self, number: int, order: dict[str, Any], log: IO[str], ended: threading.Event):
        super().__init__(daemon=True)
        self._number = number
        self._urls = [urllib.parse.urlsplit(url) for url in order["urls"]]
        self._replica = number % len(self._urls)
        self._tls = ssl.create_default_context(cafile=order["ca"])
        self._token = order["token"]
        self._vm = order["vms"][number]
        self._log = log
        self._ended = ended
        self._connection: http.client.HTTPSConnection | None = None

    def run(self) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            self._write(count)
            time.sleep(PAUSE_S)

    def _write(self, count: int) -> None:
        body = json.dumps({"labels": {LABEL: str(count)}})
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Content-Type": "application/merge-patch+json",
            "Idempotency-Key": str(uuid.uuid4()),
        }
        while not self._ended.is_set():
            sent = time.monotonic()
            status, code, retryable = self._ask(body, headers)
            line = [self._number, count, sent, time.monotonic(), status, code]
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
            if status == 200:
                return
            if status not in (0, 503) or not retryable:
                raise RuntimeError(f"writer {self._number}: {status} {code}")
            self._replica = (self._replica + 1) % len(self._urls)
            time.sleep(PAUSE_S / 2)

    def _ask(self, body: str, headers: dict[str, str]) -> tuple[int, str, bool]:
        try:
            if self._connection is None:
                url = self._urls[self._replica]
                self._connection = http.client.HTTPSConnection(
                    url.hostname or "", url.port, timeout=ANSWER_S, context=self._tls
                )
            self._connection.request("PATCH", f"/api/v1/vms/{self._vm}", body, headers)
            answer = self._connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            return 0, type(error).__name__, True
        if answer.status != 200:
            self._drop()
        try:
            said = json.loads(text)
        except ValueError:
            raise RuntimeError(f"writer {self._number}: {answer.status} {text[:80]!r}") from None
        return answer.status, said.get("code", ""), bool(said.get("retryable"))

    def _drop(self) -> None:
        """The next request goes to another replica."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def main() -> None:
    order = json.loads(sys.stdin.readline())
    ended = threading.Event()
    threading.excepthook = _end_all
    with Path(order["log"]).open("a", encoding="ascii") as log:
        writers = [Writer(n, order, log, ended) for n in range(len(order["vms"]))]
        for writer in writers:
            writer.start()
        print("ready", flush=True)
        sys.stdin.read()
        ended.set()
        for writer in writers:
            writer.join()


def _end_all(failed: threading.ExceptHookArgs) -> None:
    """End the process when one writer heard what it should not: whoever started it sees that."""
    print(failed.exc_value, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
