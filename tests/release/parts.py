"""The parts that a release is installed as: what each holds, and what it needs.

The repository is one project for those who work on it. A node gets a part of it: the agent's has no
line of the control plane's and the other way round, and neither what only the other one needs.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

from msgspec import Struct

from shared.version import VERSION

REPOSITORY = Path(__file__).parents[2]

# Built like this, the same commit makes the same wheels: 1980 is the first year a zip file knows.
SOURCE_DATE_EPOCH = "315532800"


class Part(Struct, frozen=True, kw_only=True):
    """Something that is installed into a virtual environment of its own.

    ``extras`` are those of pyproject.toml that it needs, ``scripts`` the commands that it brings.
    """

    name: str
    extras: tuple[str, ...]
    scripts: tuple[str, ...]

    @property
    def distribution(self) -> str:
        return f"novacron-{self.name}"


AGENT = Part(name="agent", extras=("agent",), scripts=("novacron-agent",))
CONTROLPLANE = Part(
    name="controlplane",
    extras=("controlplane", "cli"),
    scripts=("novacron-controlplane", "novacron"),
)
PARTS = (AGENT, CONTROLPLANE)
SHARED = "novacron-shared"


def write_projects(directory: Path, version: str = VERSION) -> tuple[Path, ...]:
    """Write a project for each part and one for what they share; returns their directories.

    With another ``version`` they call themselves that, and are the same otherwise.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    project["project"]["version"] = version
    shared = _write(directory, SHARED, "shared", _metadata(project, SHARED, (), ()), project)
    parts = [
        _write(directory, part.distribution, part.name, _part_metadata(project, part), project)
        for part in PARTS
    ]
    named = shared / "shared" / "version.py"
    named.write_text(named.read_text().replace(f'"{VERSION}"', f'"{version}"'))
    return (shared, *parts)


def _part_metadata(project: dict[str, Any], part: Part) -> list[str]:
    extras = project["project"]["optional-dependencies"]
    needs = {need for extra in part.extras for need in extras[extra]}
    own = f"{SHARED}=={project['project']['version']}"
    return _metadata(project, part.distribution, (own, *needs), part.scripts)


def _metadata(
    project: dict[str, Any], name: str, needs: tuple[str, ...], scripts: tuple[str, ...]
) -> list[str]:
    told = project["project"]
    needed = sorted({*needs, *(told["dependencies"] if name == SHARED else ())})
    return [
        "[project]",
        f'name = "{name}"',
        f'version = "{told["version"]}"',
        f'description = "{told["description"]}"',
        f'requires-python = "{told["requires-python"]}"',
        f"dependencies = {needed}",
        "[project.scripts]",
        *(f'{script} = "{told["scripts"][script]}"' for script in scripts),
    ]


def _write(
    directory: Path, name: str, package: str, metadata: list[str], project: dict[str, Any]
) -> Path:
    place = directory / name
    shutil.copytree(
        REPOSITORY / package, place / package, ignore=shutil.ignore_patterns("__pycache__")
    )
    setuptools = project["tool"]["setuptools"]
    data = {
        owner: files
        for owner, files in setuptools["package-data"].items()
        if owner.split(".")[0] == package
    }
    lines = [
        "[build-system]",
        f"requires = {project['build-system']['requires']}",
        f'build-backend = "{project["build-system"]["build-backend"]}"',
        *metadata,
        "[tool.setuptools.packages.find]",
        f'include = ["{package}*"]',
        "[tool.setuptools.package-data]",
        *(f'"{owner}" = {files}' for owner, files in data.items()),
    ]
    (place / "pyproject.toml").write_text("\n".join(lines) + "\n")
    return place
