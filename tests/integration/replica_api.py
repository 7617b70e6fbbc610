"""A client of one replica's API for tests, which tells refused, accepted and unknown apart."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx2
import msgspec
from msgspec import Struct

from controlplane.services.views import NodeList, NodeView, OperationView, VmList, VmView
from shared.model import OperationState, Problem
from shared.states import OPERATION_ENDS
from tests.integration.replica_process import Cell

BASE = "/api/v1"
# What a test waits for comes within seconds; this only ends a test that has failed.
WAIT_LIMIT_S = 60.0
POLL_S = 0.05
# Longer than a replica takes to refuse a write while its store is away.
ANSWER_S = 20.0

T = TypeVar("T")


class Refused(Exception):
    """A problem, as the replica answered it."""

    def __init__(self, status: int, problem: Problem) -> None:
        super().__init__(f"{status} {problem.code}: {problem.detail}")
        self.status = status
        self.problem = problem


class Lost(Exception):
    """The connection broke: nobody knows what became of the request."""


class Api:
    """One client with its connections; ``token`` None sends none."""

    def __init__(self, url: str, cell: Cell, token: str | None) -> None:
        context = ssl.create_default_context(cafile=str(cell.files.ca_file))
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx2.AsyncClient(
            base_url=url, verify=context, headers=headers, timeout=ANSWER_S
        )

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[bytes, bytes] | None = None,
        **query: Any,
    ) -> httpx2.Response:
        """Return any answer. Raises Lost."""
        try:
            return await self._client.request(
                method, path, json=body, params=query, headers=headers
            )
        except httpx2.TransportError as error:
            raise Lost(f"{method} {path}: {error!r}") from error

    @asynccontextmanager
    async def stream(self, path: str, accept: str) -> AsyncIterator[httpx2.Response]:
        """Yield an answer whose head has come and whose body goes on. Raises Lost."""
        try:
            async with self._client.stream("GET", path, headers={"Accept": accept}) as answer:
                yield answer
        except httpx2.TransportError as error:
            raise Lost(f"GET {path}: {error!r}") from error

    async def get(self, kind: type[T], path: str, **query: Any) -> T:
        """Return an object below the API's base. Raises Refused, Lost."""
        return _decode(await self.send("GET", BASE + path, **query), kind)

    async def post(self, kind: type[T], path: str, body: Any = None) -> T:
        """Ask for a change that is done at once, and return what it is of. Raises Refused, Lost."""
        return _decode(await self.send("POST", BASE + path, body), kind)

    async def write(self, method: str, path: str, body: Any = None) -> OperationView:
        """Send a change and return the operation it became. Raises Refused, Lost."""
        answer = await self.send(method, BASE + path, body)
        operation = _decode(answer, OperationView)
        assert answer.status_code == 202, "a change is accepted, not done"
        return operation

    async def create(self, name: str, **spec: Any) -> OperationView:
        return await self.write("POST", "/vms", new_vm(name, **spec))

    async def act(self, name: str, action: str, body: Any = None) -> OperationView:
        return await self.write("POST", f"/vms/{name}/actions/{action}", body)

    async def delete(self, name: str) -> OperationView:
        return await self.write("DELETE", f"/vms/{name}")

    async def vm(self, name: str) -> VmView:
        return await self.get(VmView, f"/vms/{name}")

    async def vms(self) -> tuple[VmView, ...]:
        return (await self.get(VmList, "/vms", limit=500)).items

    async def node(self, name: str) -> NodeView:
        return await self.get(NodeView, f"/nodes/{name}")

    async def nodes(self) -> tuple[NodeView, ...]:
        return (await self.get(NodeList, "/nodes")).items

    async def ended(self, operation: OperationView) -> OperationView:
        """Return the operation once it has ended, over any absence of the replica."""

        async def look() -> OperationView | None:
            found = await self.get(OperationView, f"/operations/{operation.id}", wait=1)
            return found if found.state in OPERATION_ENDS else None

        return await until(look, f"the end of {operation.kind} {operation.id}")

    async def done(self, operation: OperationView) -> OperationView:
        """Return the operation once it has succeeded."""
        end = await self.ended(operation)
        assert end.state is OperationState.SUCCEEDED, end
        return end


def new_vm(name: str, **spec: Any) -> dict[str, Any]:
    """Return the body that creates a small VM with one disk."""
    return {
        "name": name,
        "spec": {
            "vcpus": 1,
            "memory_mib": 64,
            "boot": {"kernel": "tiny-kernel", "initrd": "tiny-initrd"},
            "disks": [{"name": "root", "size_gib": 1}],
            **spec,
        },
    }


async def until(look: Callable[[], Awaitable[T | None]], what: str) -> T:
    """Return what ``look`` finds, once that is true; the replica may be away meanwhile."""
    seen: object = None
    try:
        async with asyncio.timeout(WAIT_LIMIT_S):
            while True:
                try:
                    found = await look()
                    if found:
                        return found
                    seen = found
                except (Refused, Lost) as error:
                    seen = error
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"never seen: {what}; at last {seen!r}") from None


def problem_of(answer: httpx2.Response) -> Problem:
    """Return the problem in an answer, whose head must tell the same."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = msgspec.json.decode(answer.content, type=Problem)
    assert problem.status == answer.status_code
    return problem


def _decode(answer: httpx2.Response, kind: type[T]) -> T:
    if answer.status_code >= 400:
        raise Refused(answer.status_code, problem_of(answer))
    assert issubclass(kind, Struct), "answers are read as views"
    return msgspec.json.decode(answer.content, type=kind)
