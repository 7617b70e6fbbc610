"""The OpenAPI document: valid, complete, and true about what is accepted and answered."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import msgspec
import pytest

from controlplane.api.openapi import build_document
from controlplane.api.routes import ROUTES, Route
from controlplane.services.requests import NoBody, NoQuery
from shared.codec import to_json
from tests.unit.api_world import World, new_vm

DOCUMENT: dict[str, Any] = msgspec.json.decode(to_json(build_document("0.1.0")))


def refs(value: Any) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*(refs(child) for child in value.values()))
    if isinstance(value, list):
        return set().union(*(refs(child) for child in value))
    return set()


def resolve(ref: str) -> Any:
    value: Any = DOCUMENT
    for part in ref.removeprefix("#/").split("/"):
        value = value[part]
    return value


def test_structure() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert {"title", "version"} <= set(DOCUMENT["info"])
    operation_ids = [
        op["operationId"] for path in DOCUMENT["paths"].values() for op in path.values()
    ]
    assert len(set(operation_ids)) == len(operation_ids) == len(ROUTES)
    for ref in refs(DOCUMENT):
        assert resolve(ref)
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    used = {ref.rsplit("/", 1)[1] for ref in refs(DOCUMENT)}
    assert set(DOCUMENT["components"]["schemas"]) <= used


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_every_route_is_there_with_what_it_takes_and_answers(route: Route) -> None:
    operation = DOCUMENT["paths"][route.path][route.method.lower()]
    success = operation["responses"][str(route.status)]
    if route.view is None:
        assert route.text in success["content"]
    else:
        schema = success["content"]["application/json"]["schema"]
        assert schema["$ref"] == f"#/components/schemas/{route.view.__name__}"
    in_path = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
    assert in_path == set(re.findall(r"{(\w+)}", route.path))
    in_query = {p["name"] for p in operation["parameters"] if p["in"] == "query"}
    assert in_query == set(() if route.query is NoQuery else route.query.__struct_fields__)
    assert ("requestBody" in operation) == (route.body is not NoBody)
    assert operation["security"] == ([] if route.permission is None else [{"token": []}])
    for status, response in operation["responses"].items():
        if status.startswith(("4", "5")) and route.path != "/readyz":
            assert "application/problem+json" in response["content"]


def test_what_a_client_sends_is_held_to_the_letter() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if name.endswith("Input"):
            assert "unknown" not in schema.get("enum", ())
            if "properties" in schema:
                assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", ["/openapi.json", "/api/v1/openapi.json"])
async def test_it_is_served_to_everyone(path: str) -> None:
    async with World().client(token=None) as client:
        assert (await client.get(path)).json() == DOCUMENT
        assert (await client.post(path)).status_code == 405


async def test_answers_are_what_it_says() -> None:
    """Ask every GET of a cell that has one of each, and check the answers against the document."""
    world = World()
    node_id = world.join("n1")
    async with world.client() as client:
        created = (await client.post("/api/v1/vms", json=new_vm())).json()
        world.run(created["target"], node_id)
        moved = (await client.post("/api/v1/vms/web-1/actions/migrate", json={})).json()
        names = {"vm": "web-1", "node": "n1", "operation": moved["id"]}
        for route in ROUTES:
            if route.method != "GET" or route.view is None:
                continue
            answer = await client.get(route.path.format(**names))
            assert answer.status_code == route.status, route.path
            check(f"#/components/schemas/{route.view.__name__}", answer.json())
        problem = (await client.post("/api/v1/vms", json={})).json()
        check("#/components/schemas/Problem", problem)


def check(ref: str, value: Any) -> None:
    schema = {"$ref": ref, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)
