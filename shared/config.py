"""Configuration files: TOML into a Struct, all faults at once, environment variables on top.

A key that the Struct does not have is a fault. ``NOVACRON_<SECTION>__<KEY>`` overrides a key that
the Struct has (``NOVACRON_API__LISTEN``); the value is read as TOML where it is one, else as text.
Nothing else in the tree reads the environment.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import FieldInfo, fields

from shared.errors import ConfigInvalid, FieldError

C = TypeVar("C", bound=Struct)

PREFIX = "NOVACRON_"

# Where something listens or is reached. No scheme: what is spoken there goes without saying.
Address = Annotated[
    str,
    Meta(
        pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):[0-9]{1,5}$",
        description="name:port or address:port, as 10.0.0.1:8444 or [fd00::1]:8444",
    ),
]
LogLevel = Literal["debug", "info", "warning", "error"]
Url = Annotated[
    str,
    Meta(pattern=r"^https?://[^/\s]+$", description="a URL without a path: https://10.0.0.1:8443"),
]


def load_config(path: Path, kind: type[C], environ: Mapping[str, str]) -> C:
    """Read ``path`` as ``kind``. Raises ConfigInvalid with every fault."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _unreadable(path, f"is not TOML: {error}") from error
    _override(table, kind, environ, PREFIX)
    faults = tuple(_faults(table, kind, ""))
    if faults:
        raise ConfigInvalid(str(path), faults)
    return msgspec.convert(table, kind, dec_hook=_decode)


def _unreadable(path: Path, message: str) -> ConfigInvalid:
    return ConfigInvalid(str(path), (FieldError("", "unreadable", message),))


def _override(
    table: dict[str, Any], kind: type[Struct], environ: Mapping[str, str], prefix: str
) -> None:
    for entry in fields(kind):
        name = prefix + entry.encode_name.upper()
        section = _section(entry)
        if section is not None:
            inner = table.get(entry.encode_name, {})
            if isinstance(inner, dict):
                _override(inner, section, environ, f"{name}__")
                if inner:
                    table[entry.encode_name] = inner
        elif name in environ:
            table[entry.encode_name] = _value(environ[name])


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _faults(table: object, kind: type[Struct], pointer: str) -> Iterator[FieldError]:
    if not isinstance(table, dict):
        yield FieldError(pointer, "wrong_type", "must be a table")
        return
    known = {entry.encode_name: entry for entry in fields(kind)}
    for key in table:
        if key not in known:
            names = ", ".join(sorted(known))
            yield FieldError(f"{pointer}/{key}", "unknown_field", f"is not one of {names}")
    for key, entry in known.items():
        if key in table:
            yield from _value_faults(table[key], entry, f"{pointer}/{key}")
        elif entry.required:
            yield FieldError(f"{pointer}/{key}", "missing", "is required")


def _value_faults(value: object, entry: FieldInfo, pointer: str) -> Iterator[FieldError]:
    section = _section(entry)
    if section is not None:
        yield from _faults(value, section, pointer)
        return
    try:
        msgspec.convert(value, entry.type, dec_hook=_decode)
    except msgspec.ValidationError as error:
        yield FieldError(pointer, "invalid", _told(error, entry.type))


def _told(error: msgspec.ValidationError, kind: object) -> str:
    """Return what a person can act on: the rule in words, where the type has them."""
    described = _description(kind)
    return str(error) if described is None else f"must be {described}"


def _description(kind: object) -> str | None:
    for meta in getattr(kind, "__metadata__", ()):
        if meta.description is not None:
            return str(meta.description)
    found = (_description(inner) for inner in get_args(kind))
    return next((text for text in found if text is not None), None)


def _section(entry: FieldInfo) -> type[Struct] | None:
    """Return the Struct that an entry's table is read as; None for a plain value."""
    choices = getattr(entry.type, "__args__", (entry.type,))
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, Struct):
            return choice
    return None


def _decode(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise msgspec.ValidationError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")
