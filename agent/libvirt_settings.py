"""What the libvirt driver is told about its node; plain data, from the agent's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

_DEFAULT_POOL = "default"
_LIBVIRT_DIR = Path("/var/lib/libvirt")


class LibvirtSettings(Struct, frozen=True, kw_only=True):
    """``networks`` maps network names to bridges of this node.

    ``pool_dirs`` says where a pool that does not exist yet is made; one that exists keeps its own
    target. ``cpus`` and ``memory_mib`` override what the machine has. ``known_virtualization`` is
    the result of an earlier probe in the same boot; it saves the next one.
    """

    uri: str = "qemu:///system"
    artefact_dir: Path = Path("/var/lib/novacron/artefacts")
    pools: tuple[str, ...] = (_DEFAULT_POOL,)
    shared_pools: tuple[str, ...] = ()
    pool_dirs: Mapping[str, Path] = {}
    console_pool: str = "novacron-console"
    console_dir: Path = Path("/var/lib/novacron/console")
    networks: Mapping[str, str] = {}
    network_dir: Path = Path("/sys/class/net")
    cpus: int | None = None
    memory_mib: int | None = None
    machine: str = "pc-q35-7.2"
    cpu_model: str = "qemu64"
    probe_kvm: bool = True
    known_virtualization: str | None = None

    def pool_targets(self) -> dict[str, Path]:
        """Return where each pool, the console's included, is made unless it exists."""
        targets = {name: self.pool_dirs.get(name, _default_dir(name)) for name in self.pools}
        targets[self.console_pool] = self.console_dir
        return targets

    def artefact(self, name: str) -> Path:
        return self.artefact_dir / name


def _default_dir(pool: str) -> Path:
    return _LIBVIRT_DIR / ("images" if pool == _DEFAULT_POOL else pool)
