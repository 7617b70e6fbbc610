"""Fixtures of the CLI's tests; they are imported by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.cell_files import CellFiles
from tests.unit.cli_fake_api import Cli, FakeApi, make_cell, served


@pytest.fixture(scope="session")
def cell(tmp_path_factory: pytest.TempPathFactory) -> CellFiles:
    return make_cell(tmp_path_factory.mktemp("cell") / "pki")


@pytest.fixture
def api(cell: CellFiles) -> Iterator[FakeApi]:
    directory = cell.root / "replicas" / "r1"
    fake = FakeApi()
    with served(fake, directory / "controlplane.crt", directory / "controlplane.key"):
        yield fake


@pytest.fixture
def cli(api: FakeApi, cell: CellFiles, tmp_path: Path) -> Cli:
    return Cli(api, cell, tmp_path / "home")
