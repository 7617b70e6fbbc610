"""JSON Schema, made of the Structs: for checking requests and for the OpenAPI document.

What a client sends is held to the letter: no unknown field, no enum value that only a decoder
knows. What it receives stays open, because a newer release may add to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

Schema = dict[str, Any]

# The value that OpenEnum decodes what it does not know to; nobody may send it.
_UNKNOWN = "unknown"


def components(kinds: Iterable[type[Struct]], ref_template: str) -> dict[str, Schema]:
    """Return the schemas of Structs and of all they are made of, by name."""
    _, found = msgspec.json.schema_components(list(kinds), ref_template=ref_template)
    return found


def input_components(kinds: Iterable[type[Struct]], ref_template: str) -> dict[str, Schema]:
    """Return schemas that refuse what ``components`` leaves open."""
    found = components(kinds, ref_template)
    for schema in found.values():
        if "properties" in schema:
            schema["additionalProperties"] = False
        if "enum" in schema:
            schema["enum"] = [value for value in schema["enum"] if value != _UNKNOWN]
    return found


def input_schema(kind: type[Struct]) -> Schema:
    """Return one schema that stands alone and refuses what ``components`` leaves open."""
    found = input_components([kind], "#/$defs/{name}")
    return {"$ref": f"#/$defs/{kind.__name__}", "$defs": found}
