"""How the lab's unprivileged programs reach Python and NovaCron's code.

A checkout or an interpreter may lie in a directory that only its owner may enter (`/root`), while
agents and replicas run under ids of their own. So the lab copies the three packages, and shows the
interpreter's and the libraries' directories to each program in the program's own mount namespace.
Agents and replicas may also run the previous release's code.
"""

from __future__ import annotations

import enum
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests import previous_release
from tests.lab.layout import MARK, REPOSITORY, STATE_DIR

RUNTIME_DIR = STATE_DIR / "runtime"
PACKAGES_DIR = RUNTIME_DIR / "packages"
PYTHON_DIR = RUNTIME_DIR / "python"

PACKAGES = ("agent", "controlplane", "shared")


class Release(enum.Enum):
    """Whose code an agent or replica runs; each has its directory below the runtime's."""

    PRESENT = "present"
    PREVIOUS = "previous"

    @property
    def source_dir(self) -> Path:
        return RUNTIME_DIR / self.value


def prepare(repository: Path = REPOSITORY) -> None:
    """Copy NovaCron's packages, readable to everybody, and make the mount points."""
    for directory in (RUNTIME_DIR, PACKAGES_DIR, PYTHON_DIR):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
    _copy_packages(repository, Release.PRESENT)


def prepare_previous() -> None:
    """Copy the previous release's packages, too."""
    with tempfile.TemporaryDirectory() as directory:
        _copy_packages(previous_release.unpack(Path(directory)), Release.PREVIOUS)


def mounts(target: Path = RUNTIME_DIR) -> list[str]:
    """Return shell commands that show interpreter and libraries under ``target``."""
    shown = {Path(sysconfig.get_path("purelib")): PACKAGES_DIR}
    if not _is_system_python():
        shown[Path(sys.base_prefix)] = PYTHON_DIR
    return [
        f"mount --bind {shlex.quote(str(source))} {target / place.relative_to(RUNTIME_DIR)}"
        for source, place in shown.items()
    ]


def python() -> str:
    """Return the interpreter's path as the program sees it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = Path(sys.base_prefix) if _is_system_python() else PYTHON_DIR
    return str(prefix / "bin" / version)


def environment(home: Path, release: Release = Release.PRESENT) -> dict[str, str]:
    """Return the whole environment of a Python program of the lab."""
    name, _, value = MARK.partition("=")
    chosen = {
        name: value,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "PYTHONPATH": f"{release.source_dir}:{PACKAGES_DIR}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if not _is_system_python():
        chosen["LD_LIBRARY_PATH"] = str(PYTHON_DIR / "lib")
    return chosen


def unprivileged(uid: int, *groups: int) -> tuple[str, ...]:
    """Return the words before a command that runs it under a bare id, without any capability."""
    supplementary = ("--groups", ",".join(map(str, groups))) if groups else ("--clear-groups",)
    return (
        "setpriv",
        f"--reuid={uid}",
        f"--regid={uid}",
        *supplementary,
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    )


def _copy_packages(repository: Path, release: Release) -> None:
    source = release.source_dir
    source.mkdir()
    source.chmod(0o755)
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(repository / package, source / package, ignore=ignored)
    for path in source.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _is_system_python() -> bool:
    return sys.base_prefix == "/usr"
