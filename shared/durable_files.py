"""Files that are there whole or not at all, also after a loss of power: written beside their place,
with their final mode, and then put there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Put ``data`` at ``path``; raises FileExistsError if it is taken."""
    draft = _draft(path, data, mode, owner_uid=-1)
    try:
        os.link(draft, path)  # unlike a rename, a link never replaces
    finally:
        draft.unlink()
    sync_directory(path.parent)


def replace(path: Path, data: bytes, mode: int, *, owner_uid: int = -1) -> None:
    """Put ``data`` at ``path``, in the place of what is there; ``owner_uid`` -1: this process's."""
    draft = _draft(path, data, mode, owner_uid)
    try:
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have the names in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _draft(path: Path, data: bytes, mode: int, owner_uid: int) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask took
            if owner_uid != -1:  # also to ask for no change is forbidden to a confined service
                os.fchown(file.fileno(), owner_uid, -1)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink()
        raise
    return draft
