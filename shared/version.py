"""Which release this is, and how releases compare."""

from __future__ import annotations

import re

VERSION = "0.2.0"

_RELEASE = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})(?![0-9])")


def release_of(version: str) -> tuple[int, int]:
    """Return what of a version says how its bearer speaks; (0, 0) for what is no version.

    What a release writes and sends stays the same through all its patches.
    """
    match = _RELEASE.match(version)
    return (0, 0) if match is None else (int(match[1]), int(match[2]))
