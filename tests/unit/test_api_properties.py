"""No input breaks the API: whatever is sent gets an answer that the OpenAPI document knows."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.api.routes import ROUTES
from tests.unit.api_world import World, new_vm

# Each is a cell of its own: 30 ms.
EXAMPLES = 150
METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS")

# Keys and texts that mean something somewhere, beside those that mean nothing anywhere.
words = st.sampled_from(
    ["name", "spec", "vcpus", "disks", "boot", "kernel", "labels", "web-1", "n1", "lan", "..", ""]
)
texts = st.one_of(words, st.text(max_size=20))
numbers = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([2**63, -1])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda children: st.one_of(
        st.lists(children, max_size=4), st.dictionaries(texts, children, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Return bytes, any JSON, or a good VM with one value replaced or added."""
    kind = draw(st.sampled_from(["bytes", "json", "vm", "vm"]))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "json":
        return msgspec.json.encode(draw(values))
    vm: dict[str, Any] = copy.deepcopy(
        new_vm(disks=[{"name": "root", "size_gib": 1}], nics=[{"network": "lan"}])
    )
    place: Any = vm
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from([*keys, "other"]) if isinstance(place, dict) else st.just(0))
        if not isinstance(place, list | dict) or not keys:
            break
        child = place.get(key) if isinstance(place, dict) else place[key]
        if not isinstance(child, list | dict) or not child or draw(st.booleans()):
            place[key] = draw(values)
            break
        place = child
    return msgspec.json.encode(vm)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    route = draw(st.sampled_from(ROUTES))
    method = draw(st.one_of(st.just(route.method), st.sampled_from(METHODS)))
    path = route.path
    for name in ("vm", "node", "operation"):
        path = path.replace(f"{{{name}}}", draw(texts))
    terms = st.tuples(st.sampled_from([*route.query.__struct_fields__, "x"]), texts | numbers)
    query = "&".join(f"{name}={value}" for name, value in draw(st.lists(terms, max_size=3)))
    return {
        "method": method,
        "path": path,
        "query": query.encode("utf-8", "replace"),
        "body": draw(bodies()),
        "headers": draw(
            st.lists(
                st.tuples(
                    st.sampled_from([b"x-novacron-min-revision", b"content-length", b"accept"]),
                    st.binary(max_size=20),
                ),
                max_size=2,
            )
        ),
    }


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(sent=requests())
def test_no_request_breaks_the_api(sent: dict[str, Any]) -> None:
    status, content_type, body = asyncio.run(_exchange(sent))
    assert status < 500 or status == 503, (status, body)
    if status >= 400 and not (sent["path"] == "/readyz" or sent["method"] == "HEAD"):
        assert content_type == b"application/problem+json"
        problem = msgspec.json.decode(body)
        assert problem["status"] == status
        assert bool(problem.get("errors")) == (problem["code"] == "validation")


async def _exchange(sent: dict[str, Any]) -> tuple[int, bytes, bytes]:
    world = World()
    node_id = world.join("n1")
    async with world.client() as client:
        created = (await client.post("/api/v1/vms", json=new_vm())).json()
    world.run(created["target"], node_id)
    scope: dict[str, Any] = {
        "type": "http",
        "method": sent["method"],
        "path": sent["path"],
        "raw_path": sent["path"].encode("utf-8", "replace"),
        "root_path": "",
        "query_string": sent["query"],
        "headers": [(b"authorization", f"Bearer {world.token}".encode()), *sent["headers"]],
        "client": None,
    }
    parts: list[bytes] = []
    begun: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent["body"], "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            begun.append(message)
        else:
            parts.append(message["body"])

    async with asyncio.timeout(30):
        await world.app()(scope, receive, send)
    headers = dict(begun[0]["headers"])
    return begun[0]["status"], headers[b"content-type"], b"".join(parts)
