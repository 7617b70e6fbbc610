"""The agent's configuration, ``/etc/novacron/agent.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from shared.config import Address, LogLevel
from shared.errors import ConfigInvalid, FieldError


class TlsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``ca`` vouches for replicas, ``peers_ca`` for other nodes' agents: ``ca`` if left out.

    A node that joins with a token has key and certificate in one file, which its agent replaces:
    ``certificate`` and ``key`` are then the same path, and ``peers_ca`` is there.
    """

    ca: Path
    certificate: Path
    key: Path
    peers_ca: Path | None = None


class HypervisorConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What looks after guests, and what VMs may use of it.

    ``shared_pools``: which of ``pools`` are on storage that other nodes see as well.
    ``probe_kvm``: boot a tiny guest once per boot of the node to learn whether KVM works here;
    without it guests run under emulation. ``qemu_tls_dir``: where this node's QEMU has the
    certificates that encrypt migrations, as its qemu.conf says.
    """

    driver: Literal["libvirt"] = "libvirt"
    uri: str = "qemu:///system"
    artefact_dir: Path = Path("/var/lib/novacron/artefacts")
    pools: tuple[str, ...] = ("default",)
    shared_pools: tuple[str, ...] = ()
    console_pool: str = "novacron-console"
    probe_kvm: bool = True
    qemu_tls_dir: Path = Path("/etc/pki/qemu")


class CapacityConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What VMs may use of this node, when that is less than the machine has."""

    cpus: int | None = None
    memory_mib: int | None = None


class MetricsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Address = "127.0.0.1:9177"


class TelemetryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The control plane's windows hold one point per five seconds."""

    sample_period_s: float = 5.0
    batch_period_s: float = 10.0


class RelayConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where other nodes' relays reach this one, and where they then come out."""

    listen: Address = "0.0.0.0:8445"
    libvirt_socket: Path = Path("/run/libvirt/libvirt-sock")


class AgentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``controlplane``: the agents' address of every replica; ``networks``: name to bridge."""

    node_name: str
    state_dir: Path = Path("/var/lib/novacron/agent")
    address: str
    controlplane: tuple[Address, ...]
    log_level: LogLevel = "info"
    labels: dict[str, str] = {}
    networks: dict[str, str] = {}
    tls: TlsConfig
    hypervisor: HypervisorConfig = HypervisorConfig()
    capacity: CapacityConfig = CapacityConfig()
    metrics: MetricsConfig = MetricsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    relay: RelayConfig = RelayConfig()


def check_pools(config: HypervisorConfig) -> None:
    """Raises ConfigInvalid for a pool that is called shared and is none of the node's."""
    strangers = sorted(set(config.shared_pools) - set(config.pools))
    if strangers:
        message = f"{', '.join(strangers)}: not among pools"
        fault = FieldError("/hypervisor/shared_pools", "unknown_pool", message)
        raise ConfigInvalid("of the agent", (fault,))
