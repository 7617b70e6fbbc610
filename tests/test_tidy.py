"""The tree is kept tidy: sizes, names, words, and nothing that nobody uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    files,
    functions,
    imports,
    module_name,
    text,
    tree,
    words,
)

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
NESTING_MAX = 4
LINE_COLUMNS_MAX = 100

CODE = files(*PACKAGES)
ALL = files(*PACKAGES, "tests")
TOP_LEVEL_TEXT = ("*.md", "*.toml", "*.yml", "*.yaml", "*.service", "*.j2", "*.sh")

BANNED_NAMES = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}
# Spelled in parts, so that this file does not break its own rule.
UNFINISHED = re.compile(
    r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b"
)
# Traces of the machine that the code was written on.
PLACES = re.compile(r"(?<![\w.])/(?:wo" + r"rk|tmp/w)(?:/|\b)|/home/\w+/|/root/\.")
REGISTRIES = re.compile(
    r"\b(?:[\w-]+\.)*(?:artifactory|nexus|jfrog|devpi|pypi\.org|pythonhosted|docker\.io|"
    r"ghcr\.io|quay\.io)\b",
    re.IGNORECASE,
)

# One word for one thing: a node, a VM, a replica, a member.
OTHER_WORDS = {
    "host",
    "hosts",
    "hypervisor",
    "hypervisors",
    "instance",
    "instances",
    "server",
    "servers",
}
# Identifiers that mean something else by such a word, each with what it means.
ALLOWED_WORDS: dict[str, str] = {
    "AgentServer": "a gRPC server, which serves agents",
    "ApiServer": "an HTTP server",
    "ApiServerSettings": "an HTTP server's",
    "TelemetryServer": "the serving side of the telemetry stream",
    "HypervisorError": "what goes wrong in libvirt and QEMU, as the agent's port names them",
    "HypervisorUnavailable": "the same",
    "_Server": "uvicorn's HTTP server",
    "_host_name": "a name in the sense of DNS",
    "_HOST": "a name in the sense of DNS",
    "_server": "an HTTP or gRPC server",
    "host": "the first part of a network address",
    "host_and_port": "a network address",
    "instance": "JSON Schema's word for the document that is checked",
    "server": "an HTTP or gRPC server",
}

# Modules that nothing imports: a process begins there, or a test reaches them by name.
ENTRY_POINTS = {
    "agent.__main__",
    "agent.relay_serve",
    "controlplane.__main__",
    "controlplane.cli.main",
}
# Imports its commands by the names it spells, so that each start loads only one.
COMMAND_TABLE = "controlplane/cli/main.py"
# What only the simulation and the simulated demo run on is alive through these.
SIMULATIONS = ("tests/lab", "tests/sim")

# Functions that lie deeper, each with why it is clearer so.
DEEP: dict[tuple[str, str], str] = {
    ("controlplane/store/etcd_watch.py", "watch"): "a loop over streams, answers and batches",
}


@pytest.mark.parametrize("file", ALL)
def test_a_module_says_what_it_is(file: str) -> None:
    assert ast.get_docstring(tree(file)), "a module opens with what it owns and what it must not do"


@pytest.mark.parametrize("file", ALL)
def test_a_module_is_not_too_long(file: str) -> None:
    lines = text(file).splitlines()

    assert len(lines) <= MODULE_LINES_MAX
    assert [line for line in lines if len(line) > LINE_COLUMNS_MAX] == []


@pytest.mark.parametrize("file", ALL)
def test_functions_are_short(file: str) -> None:
    long = {
        function.name: function.end_lineno - function.lineno + 1
        for function in functions(file)
        if function.end_lineno is not None
        and function.end_lineno - function.lineno >= FUNCTION_LINES_MAX
    }

    assert long == {}


@pytest.mark.parametrize("file", CODE)
def test_functions_are_flat(file: str) -> None:
    deep = {(file, each.name) for each in functions(file) if depth(each.body) > NESTING_MAX}

    assert deep == {known for known in DEEP if known[0] == file}


BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar)


def depth(body: list[ast.stmt]) -> int:
    """Return how deep blocks lie within one another; an ``elif`` lies beside its ``if``."""
    deepest = 0
    for statement in body:
        if isinstance(statement, BLOCKS):
            deepest = max(deepest, *(level + depth(part) for level, part in _parts(statement)))
    return deepest


def _parts(block: ast.stmt) -> Iterator[tuple[int, list[ast.stmt]]]:
    """Yield the bodies of a block, and how much deeper each of them lies."""
    for name in ("body", "orelse", "finalbody"):
        part = getattr(block, name, [])
        is_elif = name == "orelse" and len(part) == 1 and isinstance(part[0], ast.If)
        yield 0 if is_elif else 1, part
    for handler in getattr(block, "handlers", []):
        yield 1, handler.body


@pytest.mark.parametrize("file", ALL)
def test_a_module_is_named_for_what_it_owns(file: str) -> None:
    assert not words(Path(file).stem) & BANNED_NAMES


@pytest.mark.parametrize("file", ALL)
def test_nothing_is_left_for_later(file: str) -> None:
    assert UNFINISHED.findall(text(file)) == []


@pytest.mark.parametrize("file", [file for file in CODE if "/cli/" not in file])
def test_only_the_command_line_prints(file: str) -> None:
    printing = [
        found.lineno
        for found in ast.walk(tree(file))
        if isinstance(found, ast.Call)
        and isinstance(found.func, ast.Name)
        and found.func.id in ("print", "breakpoint")
    ]

    assert printing == []


def every_text() -> list[str]:
    found = [path for pattern in TOP_LEVEL_TEXT for path in ROOT.glob(pattern)]
    for folder in ("docs", "systemd", "ansible"):
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    others = [path for path in (ROOT / "dev", ROOT / ".ci" / "run") if path.exists()]
    return [*ALL, *sorted(str(path.relative_to(ROOT)) for path in [*found, *others])]


@pytest.mark.parametrize("file", every_text())
def test_no_trace_of_a_machine_or_a_registry(file: str) -> None:
    content = text(file)

    assert PLACES.findall(content) == []
    if file != "tests/test_tidy.py":
        assert REGISTRIES.findall(content) == []


def identifiers(file: str) -> set[str]:
    """Return what a file defines: names of modules, classes, functions, arguments, variables."""
    names = {Path(file).stem}
    for found in ast.walk(tree(file)):
        if isinstance(found, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(found.name)
        elif isinstance(found, ast.arg):
            names.add(found.arg)
        elif isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store):
            names.add(found.id)
        elif isinstance(found, ast.Attribute) and isinstance(found.ctx, ast.Store):
            names.add(found.attr)
    return names


def wrong_words(file: str) -> set[str]:
    return {name for name in identifiers(file) if words(name) & OTHER_WORDS}


@pytest.mark.parametrize("file", files("shared", "controlplane"))
def test_one_word_for_one_thing(file: str) -> None:
    if Path(file).stem in ("server", "grpc_server"):
        return  # modules that are a network server, and nothing else
    assert wrong_words(file) - set(ALLOWED_WORDS) == set()


def test_no_allowed_word_outlives_its_use() -> None:
    used = {name for file in files("shared", "controlplane") for name in wrong_words(file)}

    assert set(ALLOWED_WORDS) - used == set()


def test_no_module_is_dead() -> None:
    """Everything is imported by other code, or is where a process begins."""
    users = [*CODE, *files(*SIMULATIONS)]
    imported = {name for file in users for name in imports(file) if name != module_name(file)}
    imported |= {f"controlplane.cli.{name}" for name in spelled(COMMAND_TABLE)}
    modules = {module_name(file) for file in CODE if not file.endswith("__init__.py")}

    assert modules - imported - ENTRY_POINTS == set()


def spelled(file: str) -> set[str]:
    """Return the first words of all texts in a file."""
    return {
        found.value.split(":")[0].split(".")[0]
        for found in ast.walk(tree(file))
        if isinstance(found, ast.Constant) and isinstance(found.value, str)
    }
