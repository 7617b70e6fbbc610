"""A small HTTPS server that answers as it is told, and a terminal whose time tests own.

The server speaks real TLS with a real certificate of a test's CA, so that the client under test is
the whole client.
"""

from __future__ import annotations

import io
import json
import random
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from msgspec import Struct

from controlplane.cell_files import CellFiles
from controlplane.cli.main import run
from controlplane.cli.terminal import Terminal
from shared.clock import SystemClock

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class Reply(Struct, frozen=True):
    """One answer; ``body`` is JSON unless it is bytes. ``cut``: the connection breaks instead."""

    body: Any
    status: int = 200
    headers: dict[str, str] = {}
    cut: bool = False


class Request(Struct, frozen=True):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class FakeApi:
    """Replies by method and path; the last reply of a route is given again and again."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self._replies: dict[tuple[str, str], list[Reply]] = {}

    def on(self, method: str, path: str, *replies: Any) -> None:
        self._replies[method, f"/api/v1/{path}"] = [
            reply if isinstance(reply, Reply) else Reply(reply) for reply in replies
        ]

    def on_raw(self, method: str, path: str, reply: Reply) -> None:
        self._replies[method, path] = [reply]

    def answer(self, request: Request) -> Reply:
        self.requests.append(request)
        replies = self._replies.get((request.method, request.path))
        if replies is None:
            return problem(404, "not_found", f"nothing is at {request.path}")
        return replies.pop(0) if len(replies) > 1 else replies[0]

    def sent(self, method: str) -> list[Request]:
        return [request for request in self.requests if request.method == method]


class FakeTerminal(Terminal):
    """Catches what is printed. Time passes when it is asked for, and when somebody sleeps."""

    def __init__(self, *, tty: bool = False) -> None:
        self._out_bytes, self._err_bytes = io.BytesIO(), io.BytesIO()
        super().__init__(
            io.TextIOWrapper(self._out_bytes, "utf-8"), io.TextIOWrapper(self._err_bytes, "utf-8")
        )
        self.tty = tty
        self.now_s = 0.0
        self.sleeps_left: int | None = None
        self.looks_left: int | None = None

    @property
    def stdout_is_tty(self) -> bool:
        return self.tty

    @property
    def stderr_is_tty(self) -> bool:
        return self.tty

    @property
    def stdin_is_tty(self) -> bool:
        return False

    def now(self) -> datetime:
        return NOW

    def monotonic_s(self) -> float:
        self.looks_left = _count_down(self.looks_left)
        self.now_s += 0.25
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps_left = _count_down(self.sleeps_left)
        self.now_s += seconds

    @property
    def stdout(self) -> str:
        return self._out_bytes.getvalue().decode()

    @property
    def stderr(self) -> str:
        return self._err_bytes.getvalue().decode()


class Cli:
    """Runs command lines against a fake API and keeps what they print."""

    def __init__(self, api: FakeApi, files: CellFiles, home: Path) -> None:
        self.api = api
        self.files = files
        self.terminal = FakeTerminal()
        self.environ = {
            "HOME": str(home),
            "NOVACRON_ENDPOINT": api.url,
            "NOVACRON_CA": str(files.ca_file),
            "NOVACRON_TOKEN": "nck_key-1_secret",
        }

    def run(self, *arguments: str, terminal: FakeTerminal | None = None) -> int:
        self.terminal = terminal or FakeTerminal()
        return run(arguments, self.environ, self.terminal, random.Random(1))

    @property
    def stdout(self) -> str:
        return self.terminal.stdout

    @property
    def stderr(self) -> str:
        return self.terminal.stderr


def problem(status: int, code: str, detail: str = "", **more: Any) -> Reply:
    body = {"type": f"urn:novacron:problem:{code}", "title": code.replace("_", " ").capitalize()}
    return Reply(
        body | {"status": status, "code": code, "detail": detail} | more,
        status,
        {"Content-Type": "application/problem+json"},
    )


def listing(*items: Any, cursor: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "next_cursor": cursor, "revision": "r7"}


def a_vm(name: str = "web-1", **status: Any) -> dict[str, Any]:
    return {
        "id": f"vm-{name}-id",
        "name": name,
        "tenant": "default",
        "labels": {"tier": "gold"},
        "revision": "r7",
        "created_at": "2026-11-20T11:50:00Z",
        "updated_at": "2026-11-20T11:59:00Z",
        "spec": {
            "vcpus": 2,
            "memory_mib": 2048,
            "power": "running",
            "boot": {"kernel": "tiny-kernel", "initrd": "tiny-initrd", "cmdline": "quiet"},
            "disks": [{"name": "root", "size_gib": 20, "pool": "default"}],
            "nics": [{"network": "lan", "mac": None}],
        },
        "status": {
            "phase": "Running",
            "node": "node-1",
            "node_name": "n1",
            "generation": 7,
            **status,
        },
        "of_a_newer_release": {"x": [1]},
    }


def a_node(node_id: str = "node-1", name: str = "n1", **fields: Any) -> dict[str, Any]:
    return {
        "id": node_id,
        "name": name,
        "labels": {},
        "created_at": "2026-11-18T12:00:00Z",
        "state": "ready",
        "state_since": "2026-11-20T11:00:00Z",
        "cordoned": False,
        "cordon_reason": "",
        "address": "10.88.0.11",
        "inventory": {
            "cpus": 4,
            "memory_mib": 4096,
            "cpu": {"model": "EPYC"},
            "pools": [{"name": "default", "capacity_gib": 50.0, "free_gib": 40.5}],
            "virtualization": "kvm",
            "versions": {"agent": "0.1.0"},
        },
        "allocated": {"vcpus": 2, "memory_mib": 2048, "vms": 1},
        **fields,
    }


def an_operation(state: str = "running", phase: str = "place", **fields: Any) -> dict[str, Any]:
    return {
        "id": "op-1",
        "kind": "vm.create",
        "target": "vm-web-1-id",
        "state": state,
        "phase": phase,
        "steps": [{"name": "place", "state": "pending", "at": None}],
        "progress": None,
        "error": None,
        "created_at": "2026-11-20T11:59:00Z",
        **fields,
    }


@contextmanager
def served(api: FakeApi, certificate: Path, key: Path) -> Iterator[FakeApi]:
    """Serve ``api`` on a free port of the loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = _Server(("127.0.0.1", 0), _handler(api))
    # The handshake belongs to the connection's thread: a failed one must not stop the server.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    api.url = f"https://127.0.0.1:{server.server_address[1]}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_cell(directory: Path) -> CellFiles:
    files = CellFiles(directory, SystemClock(), random.Random(7))
    files.ensure_cell()
    files.add_replica("r1", "127.0.0.1")
    files.add_node("n1", "127.0.0.1")
    return files


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that refuse the certificate are part of the tests."""


def _handler(api: FakeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = api.answer(Request(self.command, url.path, parse_qs(url.query), headers, body))
            if reply.cut:
                self.close_connection = True
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing: requests are kept in ``api.requests``."""

    return Handler


def _count_down(left: int | None) -> int | None:
    """Count one look or sleep; raise KeyboardInterrupt when none is left."""
    if left == 0:
        raise KeyboardInterrupt
    return None if left is None else left - 1
