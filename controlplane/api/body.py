"""From bytes to typed requests: bodies and query strings, with every fault at once.

Three steps: JSON into plain values, those against the schema (all faults, with JSON pointers), then
into the Struct. Sizes are bounded before anything that takes time in proportion: the event loop
that checks here is the one that renews the leader's lease.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl

import jsonschema
import msgspec
from jsonschema import Draft202012Validator
from msgspec import Struct
from starlette.types import Receive

from controlplane.api.schema import Schema, input_schema
from shared.errors import (
    Disconnected,
    FieldError,
    MalformedRequest,
    PayloadTooLarge,
    ValidationFailed,
)
from shared.units import MIB

# The largest valid VM is below 30 kB; the limit leaves room for what later routes take.
BODY_BYTES_MAX = MIB
# A client on a bad line sends 30 kB in far less; one that never ends would hold a task for good.
BODY_TIMEOUT_S = 30.0
# The largest valid VM has 300 values; checking this many takes about 30 ms.
VALUES_MAX = 2000
# JSON Schema checking and decoding recurse; the deepest valid request has five levels.
DEPTH_MAX = 32
# Nobody reads more than this, and each costs an answer's bytes.
ERRORS_MAX = 100
QUERY_FIELDS_MAX = 64
_POINTER_MAX = 200
_INTEGER = re.compile(r"-?[0-9]{1,18}")

T = TypeVar("T", bound=Struct)


class Reader(Generic[T]):
    """Checks plain values against one Struct's schema and makes the Struct."""

    def __init__(self, kind: type[T], immutable: frozenset[str] = frozenset()) -> None:
        self.kind = kind
        self._immutable = immutable
        schema = input_schema(kind)
        self._validator = _Validator(schema)
        self._properties: dict[str, Schema] = schema["$defs"][kind.__name__]["properties"]
        self._empty = None if schema["$defs"][kind.__name__]["required"] else kind()

    def body(self, raw: bytes) -> T:
        """Return the Struct in a body; an empty body stands for an empty object.

        Raises MalformedRequest, PayloadTooLarge, ValidationFailed.
        """
        if not raw and self._empty is not None:
            return self._empty
        return self._take(_parse(raw) if raw else {}, ())

    def query(self, raw: bytes) -> T:
        """Return the Struct in a query string. Raises MalformedRequest, ValidationFailed."""
        if not raw and self._empty is not None:
            return self._empty
        values: dict[str, Any] = {}
        faults: list[FieldError] = []
        for name, text in _fields(raw):
            schema = self._properties.get(name, {})
            if schema.get("type") == "array":
                values.setdefault(name, []).append(text)
            elif name in values:
                faults.append(FieldError(_pointer([name]), "duplicate", "is given twice"))
            else:
                values[name] = _plain(text, schema)
        return self._take(values, tuple(faults))

    def _take(self, document: Any, faults: tuple[FieldError, ...]) -> T:
        found = dict.fromkeys(faults)
        for error in self._validator.iter_errors(document):
            found.update(dict.fromkeys(map(self._told, _faults(error))))
            if len(found) >= ERRORS_MAX:
                break
        if found:
            raise ValidationFailed(tuple(found)[:ERRORS_MAX])
        try:
            return msgspec.convert(document, self.kind)
        except msgspec.ValidationError as error:
            fault = FieldError("", "not_allowed", str(error))
            raise ValidationFailed((fault,)) from error

    def _told(self, fault: FieldError) -> FieldError:
        """Return a fault as it is, or that what is there cannot be changed."""
        if fault.code == "unknown_field" and fault.pointer in self._immutable:
            return FieldError(fault.pointer, "immutable", "cannot be changed")
        return fault


async def read_body(receive: Receive, content_length: bytes | None) -> bytes:
    """Return a request's whole body. Raises PayloadTooLarge, MalformedRequest, Disconnected."""
    if content_length is not None and content_length.isdigit():
        _check_size(int(content_length[:20]))
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected("the client went away before its request was whole")
                part = message.get("body", b"")
                size += len(part)
                _check_size(size)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise MalformedRequest(f"the body was not whole after {BODY_TIMEOUT_S:g} s") from None


def _check_size(size: int) -> None:
    if size > BODY_BYTES_MAX:
        raise PayloadTooLarge(f"the body is larger than {BODY_BYTES_MAX} bytes")


def _parse(raw: bytes) -> Any:
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedRequest(f"the body is not JSON: {str(error)[:200]}") from error
    _check_extent(document)
    return document


def _check_extent(document: Any) -> None:
    """Refuse what is larger or deeper than any valid request, before time is spent on it."""
    waiting = [(document, 1)]
    for seen, (value, depth) in enumerate(waiting):
        if depth > DEPTH_MAX:
            raise MalformedRequest(f"the body is nested deeper than {DEPTH_MAX} levels")
        if len(waiting) > VALUES_MAX:
            raise PayloadTooLarge(f"the body holds more than {VALUES_MAX} values")
        if isinstance(value, dict):
            waiting.extend((child, depth + 1) for child in value.values())
        elif isinstance(value, list):
            waiting.extend((child, depth + 1) for child in value)
        assert seen <= VALUES_MAX, "the list is checked before each step"


def _fields(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(raw),
            errors="strict",
            max_num_fields=QUERY_FIELDS_MAX,
        )
    except ValueError as error:
        raise MalformedRequest("the query string is not one") from error


def _plain(text: str, schema: Schema) -> str | int | bool:
    """Return a parameter's text as what its schema wants, where it can be read so."""
    # One that may be left out is a choice between its type and null.
    types = {choice.get("type") for choice in schema.get("anyOf", (schema,))}
    if "integer" in types and _INTEGER.fullmatch(text):
        return int(text)
    if "boolean" in types and text in ("true", "false"):
        return text == "true"
    return text


def _faults(error: Any) -> Iterator[FieldError]:
    """Yield what one finding of the schema's (a jsonschema error) means for the sender."""
    keyword = error.validator
    path = list(error.absolute_path)
    if keyword == "anyOf":
        yield from _faults_of_choice(error)
    elif keyword == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield FieldError(_pointer([*path, name]), "missing", "is required")
    elif keyword == "additionalProperties":
        known = error.schema.get("properties", {})
        for name in error.instance:
            if name not in known:
                yield FieldError(_pointer([*path, name]), "unknown_field", "is not known here")
    else:
        if "propertyNames" in error.absolute_schema_path:
            path.append(error.instance)
        code, message = _CODES[str(keyword)]
        value = error.validator_value
        text = message.format(", ".join(map(str, value)) if isinstance(value, list) else value)
        if keyword == "pattern" and "description" in error.schema:
            text = f"must be {error.schema['description']}"
        yield FieldError(_pointer(path), code, text)


def _faults_of_choice(error: Any) -> Iterator[FieldError]:
    """Leave out that the value is not null: whoever sends one means the other choice."""
    for choice in error.context or ():
        if choice.schema.get("type") != "null":
            yield from _faults(choice)


def _pointer(path: list[Any]) -> str:
    """Return a JSON pointer (RFC 6901), cut where a name is absurdly long."""
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in path)
    pointer = "".join(f"/{part}" for part in parts)
    return pointer if len(pointer) <= _POINTER_MAX else pointer[:_POINTER_MAX] + "…"


_CODES: dict[str, tuple[str, str]] = {
    "type": ("wrong_type", "must be of type {}"),
    "enum": ("not_allowed", "must be one of: {}"),
    "minimum": ("too_small", "must be at least {}"),
    "maximum": ("too_large", "must be at most {}"),
    "minLength": ("too_short", "must have at least {} characters"),
    "maxLength": ("too_long", "must have at most {} characters"),
    "minItems": ("too_short", "must have at least {} items"),
    "maxItems": ("too_long", "must have at most {} items"),
    "maxProperties": ("too_long", "must have at most {} entries"),
    "pattern": ("bad_format", "must match {}"),
}


def _whole_pattern(
    validator: Any, pattern: str, instance: Any, schema: Schema
) -> Iterator[jsonschema.ValidationError]:
    """Check a pattern as ECMA means it: Python's ``$`` would let a newline pass at the end."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError("does not match")


def _is_integer(_: object, instance: object) -> bool:
    """2.0 is no integer here, as it is none for the decoder."""
    return isinstance(instance, int) and not isinstance(instance, bool)


_Validator: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    validators={"pattern": _whole_pattern},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
