"""What of a replica's machine its processes read and lock before anything else.

Shared by the replica itself and by what is run in its place while it is stopped.
"""

from __future__ import annotations

import fcntl
from datetime import timedelta
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from controlplane import pki
from controlplane.config import BootstrapConfig, EnrolmentConfig, TlsConfig
from controlplane.issuer import Issuer, Trust
from controlplane.leader import Founding
from controlplane.store.etcd_grpc import EtcdTls
from shared.clock import Clock
from shared.errors import ConfigInvalid, FieldError, ValidationFailed
from shared.model import ApiKey, Cluster
from shared.tls import load_material

R = TypeVar("R", Cluster, ApiKey)


def history_file(data_dir: Path) -> Path:
    return data_dir / "history.sqlite"


def read_founding(config: BootstrapConfig) -> Founding:
    """Read what ``novacron init`` made. Raises ConfigInvalid with every fault."""
    faults: list[FieldError] = []
    cluster = _record(config.cluster_file, Cluster, faults)
    admin_key = _record(config.admin_key_file, ApiKey, faults)
    if cluster is None or admin_key is None:
        raise ConfigInvalid("bootstrap", tuple(faults))
    return Founding(cluster, admin_key)


def read_issuer(
    config: EnrolmentConfig | None, cell: str, ca: bytes, clock: Clock
) -> Issuer | None:
    """Read the CAs that nodes' certificates are signed with. Raises ConfigInvalid.

    ``ca`` is the one that vouches for replicas.
    """
    if config is None:
        return None
    try:
        agents_ca, qemu_ca = config.agents_ca.read_bytes(), config.qemu_ca.read_bytes()
        return Issuer(
            cell,
            pki.load_authority(config.agents_ca, config.agents_ca_key),
            pki.load_authority(config.qemu_ca, config.qemu_ca_key),
            Trust(ca, agents_ca, qemu_ca),
            timedelta(seconds=config.certificate_lifetime_s),
            clock,
        )
    except OSError as error:
        fault = FieldError("/enrolment", "unreadable", f"{error.filename}: {error.strerror}")
        raise ConfigInvalid("of enrolment", (fault,)) from error
    except ValidationFailed as unfit:
        raise ConfigInvalid("of enrolment", unfit.errors) from unfit


def _record(path: Path, kind: type[R], faults: list[FieldError]) -> R | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        faults.append(FieldError(str(path), "unreadable", str(error)))
        return None


def etcd_tls(config: TlsConfig | None) -> EtcdTls | None:
    if config is None:
        return None
    material = load_material(config.ca, config.certificate, config.key)
    return EtcdTls(ca=material.ca, certificate=material.certificate, key=material.key)


def only_process(data_dir: Path) -> IO[bytes]:
    """Lock the data directory: a leader key that names this replica is then of a dead process."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (data_dir / "lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigInvalid(
            str(data_dir),
            (FieldError("/data_dir", "in_use", "another process of this replica is running"),),
        ) from error
    return lock
