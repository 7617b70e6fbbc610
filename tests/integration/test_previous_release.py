"""The previous release can be had from this repository alone: run as it was, and built."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.previous_release import VERSION, build_wheel, environment, unpack
from tests.unit.samples import write_samples


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("previous"))


# Reads every sample whose kind the release knows, and prints the names of those.
READ_SAMPLES = """
import sys
from pathlib import Path
from shared import model, protocol
from shared.codec import unpack
for path in sorted(Path(sys.argv[1]).glob("*.msgpack")):
    kind = getattr(model, path.stem, None) or getattr(protocol, path.stem, None)
    if kind is not None:
        unpack(path.read_bytes(), kind)
        print(path.stem)
"""


def run(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root.parent,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("package", ["agent", "controlplane"])
def test_its_own_code_runs(root: Path, package: str) -> None:
    where = run(root, "-c", f"import {package}; print({package}.__file__)")
    assert Path(where.strip()).is_relative_to(root)
    assert "--config" in run(root, "-m", package, "--help")


def test_it_is_the_version_that_it_says(root: Path) -> None:
    told = run(root, "-c", "from shared.version import VERSION; print(VERSION)")
    assert told.strip() == VERSION


def test_it_reads_what_this_release_writes_of_what_it_knows(root: Path, tmp_path: Path) -> None:
    write_samples(tmp_path)
    read = run(root, "-c", READ_SAMPLES, str(tmp_path)).split()
    assert {"Vm", "Operation", "Node", "Cluster", "Hello", "VmReport", "Desired"} <= set(read)


def test_it_can_be_built(root: Path, tmp_path: Path) -> None:
    wheel = build_wheel(root, tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"novacron-{VERSION}-")
    for package in ("agent", "controlplane/store", "shared"):
        assert f"{package}/__init__.py" in names
