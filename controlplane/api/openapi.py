"""The OpenAPI 3.1 document, made of the table of routes and the Structs it names."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from controlplane.api.routes import BASE, ROUTES, Route
from controlplane.api.schema import Schema, components, input_components
from controlplane.api.terms import IDEMPOTENCY_KEY, KEY_LENGTH_MAX, KEY_PATTERN, PATCH_TYPES
from controlplane.services.etags import IF_MATCH
from controlplane.services.requests import WAIT_MAX_S, DryRunQuery, NoBody, NoQuery, PageQuery
from controlplane.services.views import NodeView, OperationView, PlanView, VmView
from shared.model import Problem

VERSION = "3.1.0"
_VIEWS = "#/components/schemas/{name}"
# What a client sends and what it gets are two schemas, even where they are one Struct.
_INPUTS = "#/components/schemas/{name}Input"
_PROBLEM = {"$ref": "#/components/responses/Problem"}
_WRITE_HEADERS: list[Schema] = [
    {
        "name": IDEMPOTENCY_KEY,
        "in": "header",
        "required": False,
        "description": "the same key and request again, within 24 hours, is done once and answered "
        "with what it became (Idempotency-Replayed: true)",
        "schema": {"type": "string", "maxLength": KEY_LENGTH_MAX, "pattern": KEY_PATTERN},
    },
    {
        "name": "Prefer",
        "in": "header",
        "required": False,
        "description": f"wait=N: hold the answer back until the operation has ended, for N seconds "
        f"(at most {WAIT_MAX_S})",
        "schema": {"type": "string"},
    },
    {
        "name": IF_MATCH,
        "in": "header",
        "required": False,
        "description": "only if the object is at one of these ETags; 412 otherwise",
        "schema": {"type": "string"},
    },
]
_READ_HEADERS: list[Schema] = [
    {
        "name": "If-None-Match",
        "in": "header",
        "required": False,
        "description": "an ETag that is known already: 304 without a body if it is still so",
        "schema": {"type": "string"},
    },
]
_SUMMARIES = {
    "400": "The request is malformed",
    "401": "There is no valid token",
    "403": "The permission is lacking",
    "404": "There is no such object",
    "409": "It does not fit the state of the object",
    "410": "The cursor has expired: list from the start",
    "412": "It is not what If-Match names",
    "415": "The body is of a type that is not read here",
    "413": "The body is too large",
    "422": "The request is not valid; every fault is listed",
    "500": "Something broke; the replica's log has it",
    "503": "It cannot be done now; see retryable and Retry-After",
}


def build_document(version: str) -> Schema:
    """Return the document; ``version`` is the release that serves it."""
    views: list[type[Struct]] = [r.view for r in ROUTES if r.view is not None]
    views.append(PlanView)
    inputs = [route.body for route in ROUTES if route.body is not NoBody]
    inputs += [route.query for route in ROUTES]
    found = {f"{k}Input": v for k, v in input_components(inputs, _INPUTS).items()}
    schemas = {**components([*views, Problem], _VIEWS), **found}
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    for name in {f"{route.query.__name__}Input" for route in ROUTES}:
        schemas.pop(name, None)  # queries are listed parameter by parameter
    return {
        "openapi": VERSION,
        "info": {"title": "NovaCron", "version": version, "license": {"name": "see LICENSE"}},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Problem": _problem_response("A problem (RFC 9457)")},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, schemas: dict[str, Schema]) -> Schema:
    operation: Schema = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "tags": [_tag(route)],
        "parameters": [
            *_path_parameters(route),
            *_query_parameters(route, schemas),
            *(_WRITE_HEADERS if route.changes else ()),
            *(_READ_HEADERS if _has_etag(route) and route.method == "GET" else ()),
        ],
        "responses": {
            str(route.status): _success(route),
            **_done_at_once(route),
            **_unchanged(route),
            **_problems(route),
        },
        "security": [] if route.permission is None else [{"token": []}],
    }
    if route.permission is not None:
        operation["x-novacron-permission"] = route.permission.value
    if route.method in ("POST", "PATCH") and route.body is not NoBody:
        schema = {"$ref": _INPUTS.format(name=route.body.__name__)}
        kinds = PATCH_TYPES if route.method == "PATCH" else ("application/json",)
        operation["requestBody"] = {
            "required": bool(schemas[f"{route.body.__name__}Input"].get("required")),
            "content": {kind: {"schema": schema} for kind in kinds},
        }
    return operation


def _path_parameters(route: Route) -> list[Schema]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": "an id" if name == "operation" else "an id or a name",
            "schema": {"type": "string"},
        }
        for name in re.findall(r"{(\w+)}", route.path)
    ]


def _query_parameters(route: Route, schemas: dict[str, Schema]) -> list[Schema]:
    if route.query is NoQuery:
        return []
    properties: dict[str, Any] = schemas[f"{route.query.__name__}Input"]["properties"]
    return [
        {"name": name, "in": "query", "required": False, "schema": _not_null(schema)}
        for name, schema in properties.items()
    ]


def _not_null(schema: Schema) -> Schema:
    """Return a parameter's schema without null, which a query string cannot spell."""
    choices = [c for c in schema.get("anyOf", ()) if c.get("type") != "null"]
    return choices[0] if len(choices) == 1 else schema


def _success(route: Route) -> Schema:
    if route.view is None:
        content: Schema = {route.text: {"schema": {"type": "string"}}}
        if route.text == "application/json":
            content = {route.text: {"schema": {"type": "object"}}}
    else:
        content = _json({"$ref": _VIEWS.format(name=_name(route.view))})
    if route.follows:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    response: Schema = {"description": route.summary, "content": content}
    headers: Schema = {}
    if route.status == 202:
        headers["Location"] = {"description": "the operation", "schema": {"type": "string"}}
    if _has_etag(route):
        headers["ETag"] = {"description": "of the object as sent", "schema": {"type": "string"}}
    if route.status == 202:
        headers["Preference-Applied"] = {
            "description": "which part of Prefer was followed",
            "schema": {"type": "string"},
        }
    if route.changes:
        headers["Idempotency-Replayed"] = {
            "description": "this very request was done before",
            "schema": {"type": "string", "enum": ["true"]},
        }
    if headers:
        response["headers"] = headers
    return response


def _done_at_once(route: Route) -> Schema:
    """Return what a write answers that waited for its end, or that was only asked for its plan."""
    if route.status != 202:
        return {}
    views = [_VIEWS.format(name=_name(OperationView))]
    if issubclass(route.query, DryRunQuery):
        views.append(_VIEWS.format(name=_name(PlanView)))
    schema = {"oneOf": [{"$ref": ref} for ref in views]}
    description = "The operation has ended (Prefer: wait), or its plan (dry_run)"
    return {"200": {**_success(route), "description": description, "content": _json(schema)}}


def _unchanged(route: Route) -> Schema:
    if route.method != "GET" or not _has_etag(route):
        return {}
    return {"304": {"description": "It is as If-None-Match says"}}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _has_etag(route: Route) -> bool:
    """Tell whether the answer is one object that has a revision."""
    return route.view in (VmView, NodeView, OperationView)


def _problems(route: Route) -> Schema:
    statuses = ["400", "422", "500", "503"]
    if route.permission is not None:
        statuses += ["401", "403"]
    if "{" in route.path or route.query is not NoQuery:
        statuses.append("404")
    if route.method != "GET" or route.text.startswith("text/plain"):
        statuses += ["409", "413"]
    if issubclass(route.query, PageQuery):
        statuses.append("410")
    if route.changes:
        statuses.append("412")
    if route.method == "PATCH":
        statuses.append("415")
    if route.path == "/readyz":
        statuses.remove("503")
    problems = {status: {**_problem_response(_SUMMARIES[status])} for status in sorted(statuses)}
    if route.path == "/readyz":
        problems["503"] = _success(route)
    return {**problems, "default": _PROBLEM}


def _problem_response(description: str) -> Schema:
    schema = {"$ref": _VIEWS.format(name=Problem.__name__)}
    return {"description": description, "content": {"application/problem+json": {"schema": schema}}}


def _operation_id(route: Route) -> str:
    words = route.path.removeprefix(BASE)
    parts = [part.strip("{}").replace("-", "_") for part in words.split("/") if part]
    if words is route.path:
        parts.insert(0, _tag(route))
    return "_".join([route.method.lower(), *parts])


def _tag(route: Route) -> str:
    parts = route.path.split("/")
    return parts[3] if route.path.startswith(BASE) else "process"


def _name(view: type[Struct]) -> str:
    return view.__name__
