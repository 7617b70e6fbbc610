"""Storage pools, volumes and console logs, through libvirt's storage API only.

Every function blocks and runs in a thread of the driver; each takes an open connection. The agent
never opens a VM's file: what a file holds comes through a libvirt stream. Callers keep two calls on
one pool apart, since libvirt refuses to refresh a pool that is being written to.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import libvirt
from lxml import etree

from agent.hypervisor import volume_name
from shared.errors import DiskMissing, FieldError, HypervisorError
from shared.protocol import DestinationQuestion
from shared.units import GIB

CONSOLE_LOG_SUFFIX = ".log"

# The stream hands over pieces of at most this; libvirt's own messages are no larger.
_PIECE_BYTES = 256 * 1024

_log = logging.getLogger(__name__)


def ensure_pools(connection: libvirt.virConnect, targets: Mapping[str, Path]) -> None:
    """Make and start each pool that is not there; a pool that cannot be made is logged, once.

    A node without one of its pools still has guests to look after.
    """
    for name, target in targets.items():
        try:
            _ensure_pool(connection, name, target)
        except libvirt.libvirtError as error:
            _log.warning("pool %s is not usable: %s", name, error)


def pool_target(connection: libvirt.virConnect, name: str) -> Path:
    """Return the directory that holds a pool's volumes."""
    root = etree.fromstring(_pool(connection, name).XMLDesc(0))
    path = root.findtext("./target/path")
    if not path:
        raise HypervisorError(f"pool {name!r} has no directory")
    return Path(path)


def ensure_volume(
    connection: libvirt.virConnect, pool: str, volume: str, size_gib: int, *, make: bool
) -> None:
    found = _pool(connection, pool)
    existing = _volume(found, volume)
    if existing is None and not make:
        raise DiskMissing(f"pool {pool!r} has no volume {volume!r} here")
    if existing is None:
        found.createXML(_volume_xml(volume, size_gib), 0)
        return
    capacity_bytes = existing.info()[1]
    if capacity_bytes != size_gib * GIB:
        raise HypervisorError(
            f"volume {volume!r} in pool {pool!r} has {capacity_bytes / GIB:g} GiB, not {size_gib}"
        )


def delete_volume(connection: libvirt.virConnect, pool: str, volume: str) -> None:
    existing = _volume(_pool(connection, pool), volume)
    if existing is not None:
        existing.delete(0)


def list_volumes(connection: libvirt.virConnect, pool: str) -> tuple[str, ...]:
    found = _pool(connection, pool)
    found.refresh(0)
    return tuple(sorted(found.listVolumes()))


def check_arrival(
    connection: libvirt.virConnect, question: DestinationQuestion
) -> list[FieldError]:
    """Return why a VM's disks keep it from coming here: the shared ones must be here already, and
    those that are copied must not.
    """
    blockers = []
    for disk in question.spec.disks:
        try:
            pool = _pool(connection, disk.pool)
        except HypervisorError as error:
            blockers.append(FieldError("", "missing_pool", str(error)))
            continue
        volume = volume_name(question.vm_id, disk.name)
        here, copied = _volume(pool, volume) is not None, disk.name in question.copied
        if not here and not copied:
            blockers.append(
                FieldError(
                    "",
                    "disk_not_shared",
                    f"pool {disk.pool!r} is said to be shared, but has no volume {volume!r} here",
                )
            )
        if here and copied:
            blockers.append(
                FieldError(
                    "",
                    "volume_exists",
                    f"pool {disk.pool!r} has a volume {volume!r} here already: if other nodes see "
                    "the pool as well, name it in their agents' shared_pools; if not, the volume "
                    "is of an earlier stay, and may be deleted by hand",
                )
            )
    return blockers


def console_log_name(domain_name: str) -> str:
    return f"{domain_name}{CONSOLE_LOG_SUFFIX}"


def console_size(connection: libvirt.virConnect, pool: str, domain_name: str) -> int:
    """Return how many bytes a console log has; 0 for one that was never written."""
    found = _pool(connection, pool)
    # libvirt knows a file's size from the last refresh only.
    found.refresh(0)
    volume = _known_volume(found, console_log_name(domain_name))
    return 0 if volume is None else int(volume.info()[1])


def read_console_log(
    connection: libvirt.virConnect, pool: str, domain_name: str, offset: int, limit_bytes: int
) -> bytes:
    """Return part of a console log; what was never written is empty."""
    found = _pool(connection, pool)
    # libvirt knows a file's size from the last refresh only.
    found.refresh(0)
    volume = _known_volume(found, console_log_name(domain_name))
    if volume is None:
        return b""
    size_bytes = volume.info()[1]
    start = max(0, size_bytes + offset) if offset < 0 else min(offset, size_bytes)
    length = min(limit_bytes, size_bytes - start)
    return _download(connection, volume, start, length) if length > 0 else b""


def _ensure_pool(connection: libvirt.virConnect, name: str, target: Path) -> None:
    try:
        pool = connection.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        pool = connection.storagePoolDefineXML(_pool_xml(name, target), 0)
        pool.build(0)
    if not pool.isActive():
        pool.create(0)


def _pool(connection: libvirt.virConnect, name: str) -> libvirt.virStoragePool:
    try:
        return connection.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        raise HypervisorError(f"this node has no storage pool {name!r}") from error


def _volume(pool: libvirt.virStoragePool, name: str) -> libvirt.virStorageVol | None:
    """Return a volume that libvirt knows, or finds once it looks at the directory again."""
    known = _known_volume(pool, name)
    if known is not None:
        return known
    pool.refresh(0)
    return _known_volume(pool, name)


def _known_volume(pool: libvirt.virStoragePool, name: str) -> libvirt.virStorageVol | None:
    try:
        volume = pool.storageVolLookupByName(name)
        # In a shared pool another node may have deleted it; only a look at its file tells.
        volume.info()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
            raise
        return None
    return volume


def _download(
    connection: libvirt.virConnect, volume: libvirt.virStorageVol, start: int, length: int
) -> bytes:
    stream = connection.newStream(0)
    pieces: list[bytes] = []
    try:
        volume.download(stream, start, length, 0)
        while piece := stream.recv(_PIECE_BYTES):
            pieces.append(piece)
        stream.finish()
    except BaseException:
        with contextlib.suppress(libvirt.libvirtError):
            stream.abort()
        raise
    return b"".join(pieces)


def _pool_xml(name: str, target: Path) -> str:
    root = etree.Element("pool", type="dir")
    etree.SubElement(root, "name").text = name
    etree.SubElement(etree.SubElement(root, "target"), "path").text = str(target)
    return str(etree.tostring(root, encoding="unicode"))


def _volume_xml(name: str, size_gib: int) -> str:
    root = etree.Element("volume")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "capacity", unit="GiB").text = str(size_gib)
    # Thin: the file grows as the guest writes.
    etree.SubElement(root, "allocation").text = "0"
    etree.SubElement(etree.SubElement(root, "target"), "format", type="qcow2")
    return str(etree.tostring(root, encoding="unicode"))
