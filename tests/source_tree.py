"""The source as data, for the tests that hold the tree to its rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("agent", "controlplane", "shared")
# Made by protoc; its own test regenerates it.
GENERATED = frozenset({"controlplane/store/etcd_pb2.py"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def files(*folders: str) -> list[str]:
    """Return the hand-written Python files below some folders, as paths from the root."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return [name for name in names if name not in GENERATED]


def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(text(file))


def module_name(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> frozenset[str]:
    return frozenset(module_name(file) for file in files(*PACKAGES, "tests"))


@cache
def imports(file: str) -> frozenset[str]:
    """Return the full names of what a file imports, wherever in it the import stands."""
    return frozenset(_imports(file))


def imports_any(file: str, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(file))


def functions(file: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for found in ast.walk(tree(file)):
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            yield found


def words(identifier: str) -> set[str]:
    """Return the words an identifier is made of, in lowercase."""
    return {word.lower() for word in _WORD.findall(identifier)}


def dotted(expression: ast.expr) -> str:
    """Return ``a.b.c`` for such an expression, and nothing for any other."""
    if isinstance(expression, ast.Name):
        return expression.id
    if isinstance(expression, ast.Attribute):
        prefix = dotted(expression.value)
        return f"{prefix}.{expression.attr}" if prefix else ""
    return ""


def _imports(file: str) -> Iterator[str]:
    for found in ast.walk(tree(file)):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.module is not None, f"{file} imports relatively"
            for alias in found.names:
                full = f"{found.module}.{alias.name}"
                # ``from a import b`` is the module a.b, or a name within a.
                yield full if full in modules() else found.module
