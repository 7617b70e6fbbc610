"""docs/configuration.md, rendered from the Structs that the two files are read as.

python -m tests.reference.configuration > docs/configuration.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo, fields

from agent.config import AgentConfig
from controlplane.config import ControlPlaneConfig
from shared.config import PREFIX

HEAD = f"""\
# Configuration

Rendered from the code (`tests/reference/configuration.py`). Two files in TOML, read at a start.
Whatever is wrong with one is told at once, each fault with its place, and nothing runs;
`novacron-agent config check [FILE]` and `novacron-controlplane config check [FILE]` tell the same
and run nothing. A key that is not in these tables is a fault.

A variable `{PREFIX}SECTION__KEY` in the environment stands above the file: `{PREFIX}API__LISTEN`.
The units in `systemd/` set none.
"""
FILES = (
    ("/etc/novacron/agent.toml", AgentConfig),
    ("/etc/novacron/controlplane.toml", ControlPlaneConfig),
)
NAMES = {str: "text", int: "number", float: "number", bool: "true or false", Path: "path"}


def render() -> str:
    """Return the whole page."""
    return "\n".join((HEAD, *(line for path, kind in FILES for line in _file(path, kind))))


def _file(path: str, kind: type[Struct]) -> Iterator[str]:
    yield f"## `{path}`\n"
    yield from _table("", kind)
    for entry in fields(kind):
        section = _section(entry)
        if section is not None:
            yield from _table(entry.encode_name, section)


def _table(name: str, kind: type[Struct]) -> Iterator[str]:
    plain = [entry for entry in fields(kind) if _section(entry) is None]
    nested = [entry for entry in fields(kind) if name and _section(entry) is not None]
    if name:
        yield f"### `[{name}]`\n"
        yield from _words(kind)
    if plain:
        yield "| Key | Value | Default |"
        yield "| --- | --- | --- |"
        yield from (f"| `{e.encode_name}` | {_type(e.type)} | {_default(e)} |" for e in plain)
        yield ""
    for entry in nested:
        section = _section(entry)
        assert section is not None
        yield from _table(f"{name}.{entry.encode_name}", section)


def _words(kind: type[Struct]) -> Iterator[str]:
    """Yield what the Struct says of itself, as text of Markdown."""
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):
        text = " ".join(inspect.cleandoc(kind.__doc__).split())
        yield re.sub(r"``(.+?)``", r"`\1`", text) + "\n"


def _section(entry: FieldInfo) -> type[Struct] | None:
    for choice in get_args(entry.type) or (entry.type,):
        if isinstance(choice, type) and issubclass(choice, Struct):
            return choice
    return None


def _type(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    metadata = getattr(kind, "__metadata__", ())
    if metadata:
        return metadata[0].description or _type(inner[0])
    if origin in (Union, UnionType):
        return _type(next(choice for choice in inner if choice is not NoneType))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list of: {_type(inner[0])}"
    if origin is dict:
        return f"table: {_type(inner[0])} = {_type(inner[1])}"
    return NAMES[kind]


def _default(entry: FieldInfo) -> str:
    if entry.required:
        return "needed"
    value = entry.default
    if value is NODEFAULT:
        value = entry.default_factory()
    if value is None:
        return ""
    return f"`{msgspec.json.encode(value, enc_hook=str).decode()}`"


if __name__ == "__main__":
    sys.stdout.write(render())
