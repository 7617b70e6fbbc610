"""A release is installed from its archive alone, and each part holds only what is its own."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared.version import VERSION
from tests.release.build import archive_name, build
from tests.release.parts import AGENT, CONTROLPLANE, PARTS, Part

# What an agent runs on; each costs memory on every node, but for cryptography and what it brings:
# only the short-lived process that makes keys loads that.
AGENT_DISTRIBUTIONS = {
    "cffi",
    "cryptography",
    "cysystemd",
    "grpcio",
    "libvirt_python",
    "lxml",
    "msgpack",
    "msgspec",
    "novacron_agent",
    "novacron_shared",
    "prometheus_client",
    "psutil",
    "pycparser",
    "typing_extensions",
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    build(lambda line: None, dist)
    return dist


@pytest.fixture(scope="module", params=PARTS, ids=lambda part: str(part.name))
def installed(
    request: pytest.FixtureRequest, archives: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Part, Path]:
    """Return a part and the environment that its archive was installed into, offline."""
    part: Part = request.param
    place = tmp_path_factory.mktemp(part.name)
    (place / "archive").mkdir()
    _run("tar", "--extract", "--file", archives / archive_name(part), "-C", place / "archive")
    environment = place / "environment"
    _run(sys.executable, "-m", "venv", environment)
    _run(
        *(environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"),
        *("--no-index", "--require-hashes", "--find-links", place / "archive" / "wheels"),
        *("--requirement", place / "archive" / "requirements.txt"),
    )
    return part, environment


def _run(*words: str | Path) -> str:
    # Away from the checkout, whose packages would be found first.
    outcome = subprocess.run(words, check=True, capture_output=True, text=True, cwd="/")
    return outcome.stdout


def _site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def test_it_is_complete_without_a_network(installed: tuple[Part, Path]) -> None:
    part, environment = installed
    _run(environment / "bin" / "python", "-m", "pip", "check")
    for script in part.scripts:
        assert "usage" in _run(environment / "bin" / script, "--help").lower()


def test_every_module_of_it_can_be_loaded(installed: tuple[Part, Path]) -> None:
    part, environment = installed
    found = _site_packages(environment)
    for package in (part.name, "shared"):
        modules = sorted(_modules(found, package))
        assert len(modules) > 10
        _run(environment / "bin" / "python", "-c", f"import {', '.join(modules)}")


def _modules(site_packages: Path, package: str) -> Sequence[str]:
    return [
        ".".join(path.relative_to(site_packages).with_suffix("").parts)
        for path in (site_packages / package).rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    ]


def test_it_holds_no_line_of_another_part(installed: tuple[Part, Path]) -> None:
    part, environment = installed
    for other in PARTS:
        there = (_site_packages(environment) / other.name).is_dir()
        assert there == (other is part)


def test_an_agent_brings_nothing_that_it_does_not_need(archives: Path) -> None:
    with tarfile.open(archives / archive_name(AGENT)) as archive:
        wheels = [Path(name) for name in archive.getnames() if name.endswith(".whl")]
    assert {wheel.name.split("-")[0] for wheel in wheels} == AGENT_DISTRIBUTIONS


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.name))
def test_its_units_come_with_it(part: Part, archives: Path) -> None:
    with tarfile.open(archives / archive_name(part)) as archive:
        units = {name for name in archive.getnames() if name.startswith("systemd/")}
    kinds = ("service", "sysusers", "tmpfiles")
    assert units == {f"systemd/{part.distribution}.{kind}" for kind in kinds}


def test_two_builds_of_one_tree_are_the_same(archives: Path, tmp_path: Path) -> None:
    build(lambda line: None, tmp_path)
    for part in (AGENT, CONTROLPLANE):
        assert f"-{VERSION}-" in archive_name(part)
        first, second = (_listed(place / archive_name(part)) for place in (archives, tmp_path))
        assert first == second


def _listed(path: Path) -> str:
    with tarfile.open(path) as archive:
        requirements = archive.extractfile("requirements.txt")
        assert requirements is not None
        return requirements.read().decode()
