"""How the suites are chosen and cut: ``--long``, ``--shard i/n`` and ``--resume FILE``.

Without ``--long`` the tests marked ``long`` are left out; with it, only they run. A shard is chosen
by a hash of each test's name, so that it stays the same whatever else is added. The resume file
lists the tests that passed, one a line; a later run with the same file leaves them out.

Whatever a test runs may set up logging for its process: each test finds it as pytest set it up.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("novacron")
    group.addoption("--long", action="store_true", help="run the long tests, and only them")
    group.addoption("--shard", type=_shard, metavar="I/N", help="run the I-th of N parts")
    group.addoption("--resume", type=Path, metavar="FILE", help="leave out what passed before")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("resume")
    if path is not None:
        config.pluginmanager.register(_Passed(path), "novacron-passed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants_long = bool(config.getoption("long"))
    shard: tuple[int, int] | None = config.getoption("shard")
    passed = config.pluginmanager.get_plugin("novacron-passed")
    done = passed.done if isinstance(passed, _Passed) else frozenset()
    chosen: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        fits = (item.get_closest_marker("long") is not None) == wants_long
        fits = fits and item.nodeid not in done
        fits = fits and (shard is None or _part(item.nodeid, shard[1]) == shard[0])
        (chosen if fits else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class _Passed:
    """Appends each passed test to the resume file at once, so that a killed run counts too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = frozenset(lines)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # The last phase: a test whose clean-up fails has not passed.
        if report.when == "call":
            self._passed_call = report.passed
        if report.when == "teardown" and report.passed and self._passed_call:
            with self._path.open("a") as file:
                file.write(report.nodeid + "\n")
        if report.when == "setup":
            self._passed_call = False


def _shard(text: str) -> tuple[int, int]:
    """Take ``i/n`` apart, with i from 1 to n; returns (i, n)."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise pytest.UsageError(f"--shard {text}: give i/n with i from 1 to n")
    return int(first), int(second)


def _part(nodeid: str, parts: int) -> int:
    return int.from_bytes(hashlib.sha256(nodeid.encode()).digest()[:8], "big") % parts + 1
