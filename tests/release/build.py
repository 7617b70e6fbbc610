"""Builds a release: for each part one archive that is installed without any network.

    dist/novacron-agent-0.2.0-py311-x86_64.tar
        requirements.txt        every wheel's exact version and SHA-256
        wheels/                 the part's own, and all that it needs
        systemd/                its units, users and directories

The wheels fit the Python and the machine that they are built with: build on the release of Debian
that the nodes run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from shared.version import VERSION
from tests.release.parts import PARTS, REPOSITORY, SOURCE_DATE_EPOCH, Part, write_projects

DIST_DIR = REPOSITORY / "dist"


def archive_name(part: Part, version: str = VERSION) -> str:
    """Return the name of a part's archive, which says what it can be installed on."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return f"{part.distribution}-{version}-{python}-{platform.machine()}.tar"


def build(
    say: Callable[[str], None], dist: Path = DIST_DIR, version: str = VERSION
) -> tuple[Path, ...]:
    """Build every part's archive in ``dist`` and return them; raises CalledProcessError.

    ``version``: what it calls itself, for those who try an upgrade to the same code.
    """
    dist.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        projects = Path(scratch) / "projects"
        own = Path(scratch) / "own"
        for project in write_projects(projects, version):
            _pip("wheel", "--no-deps", "--wheel-dir", str(own), str(project))
        archives = []
        for part in PARTS:
            root = Path(scratch) / part.distribution
            _gather(part, version, own, root)
            archives.append(_archive(root, dist / archive_name(part, version)))
            say(f"{archives[-1]}: {archives[-1].stat().st_size / 2**20:.1f} MiB")
    return tuple(archives)


def _gather(part: Part, version: str, own: Path, root: Path) -> None:
    """Put everything that a part is installed from under ``root``."""
    wheels = root / "wheels"
    requirement = f"{part.distribution}=={version}"
    _pip("wheel", "--find-links", str(own), "--wheel-dir", str(wheels), requirement)
    (root / "requirements.txt").write_text("".join(map(_pinned, sorted(wheels.iterdir()))))
    units = root / "systemd"
    units.mkdir()
    for file in (REPOSITORY / "systemd").glob(f"{part.distribution}.*"):
        shutil.copy(file, units / file.name)


def _pinned(wheel: Path) -> str:
    name, version, *_ = wheel.name.split("-")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{name}=={version} --hash=sha256:{digest}\n"


def _archive(root: Path, path: Path) -> Path:
    """Pack ``root``; nothing of this machine, its users or the present time gets into it."""
    draft = path.with_suffix(".draft")
    with tarfile.open(draft, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.add(file, file.relative_to(root), recursive=False, filter=_nobodys)
    return draft.rename(path)


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mode = 0o755 if entry.isdir() else 0o644
    entry.mtime = int(SOURCE_DATE_EPOCH)
    return entry


def _pip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # What it says besides is of use only where it fails.
        stderr=subprocess.STDOUT,
        env=os.environ | {"SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH},
    )
