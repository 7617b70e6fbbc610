"""The control plane's configuration, ``/etc/novacron/controlplane.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from controlplane.commands.migrations import MigrationLimits
from controlplane.election import ElectionSettings
from controlplane.scheduler.request import SchedulerSettings
from controlplane.sessions.hub import HubSettings
from controlplane.store.port import ETCD_QUOTA_BYTES
from shared.config import Address, LogLevel, Url

DEFAULT_CONFIG = Path("/etc/novacron/controlplane.toml")


class ApiConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``advertise`` is the URL that clients and other replicas use."""

    listen: Address = "0.0.0.0:8443"
    advertise: Url


class AgentsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Address = "0.0.0.0:8444"
    advertise: Address


class TlsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ca: Path
    certificate: Path
    key: Path


class EtcdConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Without ``tls`` etcd is spoken to in the clear: for loopback only.

    ``quota_bytes`` is what its members are started with (--quota-backend-bytes); etcd does not
    tell, and new VMs are refused before it is used up.
    """

    endpoints: tuple[Address, ...]
    quota_bytes: Annotated[int, Meta(ge=1)] = ETCD_QUOTA_BYTES
    tls: TlsConfig | None = None


class EnrolmentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The CAs with which this replica lets nodes in; their keys are read once, at its start.

    A file may hold several certificates: the first signs, whoever any of them vouches for is
    trusted. ``certificate_lifetime_s``: agents renew theirs after half of it.
    """

    agents_ca: Path
    agents_ca_key: Path
    qemu_ca: Path
    qemu_ca_key: Path
    certificate_lifetime_s: Annotated[float, Meta(ge=60, le=90 * 86400)] = 7 * 86400.0


class BootstrapConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``novacron init`` made; read at every start, used while the cluster is new."""

    cluster_file: Path
    admin_key_file: Path


class ControlPlaneConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    data_dir: Path = Path("/var/lib/novacron/controlplane")
    log_level: LogLevel = "info"
    api: ApiConfig
    agents: AgentsConfig
    tls: TlsConfig
    etcd: EtcdConfig
    bootstrap: BootstrapConfig
    enrolment: EnrolmentConfig | None = None
    election: ElectionSettings = ElectionSettings()
    sessions: HubSettings = HubSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    migrations: MigrationLimits = MigrationLimits()
