"""The previous release beside the present one, in this process: its packages under another name.

Its modules are read from the archive that skew tests unpack. Every import of its own packages is
led to ``previous.…``, but for modules whose text, and that of all they import, is the same in both
releases: those are shared, and so are the errors, of which the present ones are a superset. What
passes between the two is translated by the names of its classes and fields, as it would be on a
wire; fields, and members of sets, that the other side does not know are dropped.
"""

from __future__ import annotations

import ast
import enum
import importlib
import importlib.abc
import importlib.machinery
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from msgspec import Struct

from tests.previous_release import ARCHIVE, VERSION
from tests.source_tree import ROOT

PREFIX = "previous."
PACKAGES = ("agent", "controlplane", "shared")
# Errors are caught by class, wherever they come from; and a process knows one form of each message
# of etcd's, which neither release uses here.
SHARED_BY_DECREE = frozenset({"shared.errors", "controlplane.store.etcd_pb2"})


def load(name: str) -> ModuleType:
    """Import a module of the previous release."""
    _install()
    return importlib.import_module(PREFIX + name)


def to_previous(value: Any) -> Any:
    """Return what a value of the present release is in the previous one."""
    return _translated(value, lambda name: name if name in _shared() else PREFIX + name)


def to_present(value: Any) -> Any:
    return _translated(value, lambda name: name.removeprefix(PREFIX))


class Translated:
    """A port of the present release, as the previous one uses it."""

    def __init__(self, port: Any) -> None:
        self._port = port

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            result = found(
                *map(to_present, arguments),
                **{key: to_present(value) for key, value in named.items()},
            )
            return _awaited(result) if hasattr(result, "__await__") else to_previous(result)

        return call


async def _awaited(result: Any) -> Any:
    got = await result
    return Translated(got) if hasattr(got, "receive") else to_previous(got)


def _translated(value: Any, other: Any) -> Any:
    if isinstance(value, Struct):
        kind = _class(other(type(value).__module__), type(value).__name__)
        if kind is type(value):
            return value
        known = kind.__struct_fields__
        return kind(
            **{
                field: _translated(getattr(value, field), other)
                for field in type(value).__struct_fields__
                if field in known
            }
        )
    if isinstance(value, enum.Enum):
        return _class(other(type(value).__module__), type(value).__name__)(value.value)
    if isinstance(value, frozenset):
        return frozenset(_translated(each, other) for each in value if _is_known(each, other))
    if type(value) in (tuple, list):
        return type(value)(_translated(each, other) for each in value)
    if isinstance(value, dict):
        return {key: _translated(each, other) for key, each in value.items()}
    return value


def _is_known(value: Any, other: Any) -> bool:
    """Whether the other side knows a member of a set, like a permission."""
    if not isinstance(value, enum.Enum):
        return True
    kind = _class(other(type(value).__module__), type(value).__name__)
    return any(each.value == value.value for each in kind)


@cache
def _class(module: str, name: str) -> Any:
    _install()
    return getattr(importlib.import_module(module), name)


class _Loader(importlib.abc.Loader):
    def __init__(self, name: str) -> None:
        self._name = name

    def exec_module(self, module: ModuleType) -> None:
        if self._name:
            path = _path(self._name)
            code = compile(_renamed(_texts()[self._name]), path, "exec", dont_inherit=True)
            exec(code, module.__dict__)
        if self._name == "controlplane.app":
            # It would keep the collector from all objects of this process, for ever.
            module.__dict__["gc"] = SimpleNamespace(collect=int, freeze=int)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if f"{fullname}." == PREFIX:
            return importlib.machinery.ModuleSpec(fullname, _Loader(""), is_package=True)
        name = fullname.removeprefix(PREFIX)
        if name == fullname or name not in _texts():
            return None
        package = any(each.startswith(f"{name}.") for each in _texts())
        return importlib.machinery.ModuleSpec(fullname, _Loader(name), is_package=package)


@cache
def _install() -> None:
    sys.meta_path.append(_Finder())


@cache
def _texts() -> dict[str, str]:
    """Return the source of every module of the previous release, by its name."""
    found: dict[str, str] = {}
    with zipfile.ZipFile(ARCHIVE) as archive:
        for path in archive.namelist():
            inside = path.removeprefix(f"novacron-{VERSION}/")
            if inside.endswith(".py") and inside.split("/")[0] in PACKAGES:
                name = inside.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
                found[name] = archive.read(path).decode()
    return found


@cache
def _shared() -> frozenset[str]:
    """Return the modules that both releases have in common, with all that they import."""
    same = {name for name, text in _texts().items() if _present_text(name) == text}
    same |= SHARED_BY_DECREE
    while True:
        others = {
            name
            for name in same - SHARED_BY_DECREE
            if any(used not in same for used in _imports(ast.parse(_texts()[name])))
        }
        if not others:
            return frozenset(same)
        same -= others


def _present_text(name: str) -> str | None:
    for path in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
        if (ROOT / path).exists():
            return (ROOT / path).read_text()
    return None


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in _texts() else str(node.module)


def _renamed(text: str) -> ast.Module:
    """Parse a module and lead its imports to where its release's modules are."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            names = {f"{node.module}.{name.name}" for name in node.names} & _texts().keys()
            wanted = names or {str(node.module)}
            if not wanted <= _shared():
                node.module = f"{PREFIX}{node.module}"
        elif isinstance(node, ast.Import):
            assert not any(_is_ours(name.name) for name in node.names), "imports are from-imports"
    return tree


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in PACKAGES


def _path(name: str) -> str:
    return f"{ARCHIVE}/{name.replace('.', '/')}.py"
