"""The previous release, unpacked from this repository, as a process or a wheel of its own.

It runs with the packages of the present environment: a release's pins differ little from the next
one's, and what is tested is how both sides speak, not how pip resolves.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "0.1.0"
ARCHIVE = Path(__file__).parent / "data" / "previous_release" / f"novacron-{VERSION}.zip"


def unpack(directory: Path) -> Path:
    """Unpack the release's source below ``directory`` and return its root."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(directory)
    return directory / f"novacron-{VERSION}"


def environment(root: Path) -> dict[str, str]:
    """Return what a process of the release needs in its environment to find its own code first."""
    return {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def build_wheel(root: Path, directory: Path) -> Path:
    """Build the release's wheel into ``directory`` and return its path."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--disable-pip-version-check", "--wheel-dir", str(directory), str(root)),
        ],
        check=True,
        timeout=300,
    )
    (wheel,) = directory.glob("novacron-*.whl")
    return wheel
