"""What libvirtd found out about QEMU, kept between labs: asking costs three seconds a node.

libvirt itself checks each file against the binary, the kernel and its own version, and asks again
when one does not fit; so a stale cache costs time and nothing else.
"""

from __future__ import annotations

import shutil

from tests.lab.layout import CACHE_DIR, STATE_DIR
from tests.lab.nodes import LightNode

_KEPT = CACHE_DIR / "lab" / "capabilities"
_PLACE = "var-cache-libvirt/qemu/capabilities"
# Each kernel, QEMU and libvirt version leaves a file of its own; beyond this they are old ones.
_FILES_MAX = 16


def share_capabilities(node: LightNode) -> None:
    """Give a node that has not booted yet what an earlier lab's node has found out."""
    if _KEPT.is_dir():
        shutil.copytree(_KEPT, node.directory / _PLACE, dirs_exist_ok=True)


def keep_capabilities() -> None:
    """Keep what the lab's nodes have found out, for the next lab."""
    for found in STATE_DIR.glob(f"nodes/*/{_PLACE}"):
        _KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copytree(found, _KEPT, dirs_exist_ok=True)
    kept = sorted(_KEPT.glob("*.xml"), key=lambda p: p.stat().st_mtime) if _KEPT.is_dir() else []
    for path in kept[:-_FILES_MAX]:
        path.unlink(missing_ok=True)
