"""The configuration files of the lab's replicas and agents, with their certificates beside them.

Each part gets copies that its own id may read and nobody else: keys are never shared.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from tests.lab.layout import (
    AGENT_UID,
    AGENTS_PORT,
    API_PORT,
    GUEST_BRIDGE,
    NODE_ARTEFACT_DIR,
    NODE_CONFIG_DIR,
    NODE_QEMU_PKI_DIR,
    NODE_STATE_DIR,
    QEMU_USER,
    REPLICA_UID,
    STATE_DIR,
)
from tests.lab.nodes import LightNode
from tests.lab.runtime import Release

CELL_DIR = STATE_DIR / "cell"

REPLICA_TOML = """\
name = {name}
data_dir = {data_dir}
log_level = "info"

[api]
listen = {api_listen}
advertise = {api_url}

[agents]
listen = {agents_listen}
advertise = {agents_listen}

[tls]
ca = {ca}
certificate = {certificate}
key = {key}

[etcd]
endpoints = {etcd}

[bootstrap]
cluster_file = {cluster_file}
admin_key_file = {admin_key_file}
"""
# Release 0.2 takes this for an error.
ENROLMENT = """
[enrolment]
agents_ca = {agents_ca}
agents_ca_key = {agents_ca_key}
qemu_ca = {qemu_ca}
qemu_ca_key = {qemu_ca_key}
"""

AGENT_TOML = """\
node_name = {name}
state_dir = {state_dir}
address = {address}
controlplane = {controlplane}
log_level = "info"

[labels]
zone = {zone}

[tls]
ca = {ca}
certificate = {certificate}
key = {key}

[hypervisor]
driver = "libvirt"
uri = "qemu:///system"
artefact_dir = {artefact_dir}
pools = ["default", "shared"]
{hypervisor_since_0_2}

[networks]
lan = {bridge}

[capacity]
cpus = {cpus}
memory_mib = {memory_mib}
"""
# Release 0.1 takes these for errors.
HYPERVISOR_SINCE_0_2 = """\
qemu_tls_dir = {qemu_tls_dir}
shared_pools = ["shared"]
"""


class Replica(Struct, frozen=True, kw_only=True):
    """One control-plane process; ``directory`` is its own."""

    name: str
    address: str

    @property
    def directory(self) -> Path:
        return STATE_DIR / "replicas" / self.name

    @property
    def url(self) -> str:
        return f"https://{self.address}:{API_PORT}"

    @property
    def config_file(self) -> Path:
        return self.directory / "controlplane.toml"


def write_replica(replica: Replica, etcd: Sequence[str], release: Release) -> None:
    """Write a replica's configuration and hand it its certificate, key and first admin key."""
    directory = replica.directory
    (directory / "data").mkdir(parents=True, exist_ok=True)
    issued = CELL_DIR / "replicas" / replica.name
    sources = (
        *(issued / "controlplane.crt", issued / "controlplane.key"),
        *(CELL_DIR / name for name in ("ca.crt", "cluster.json", "admin-key.json")),
        *(CELL_DIR / f"{ca}.{end}" for ca in ("agents-ca", "qemu-ca") for end in ("crt", "key")),
    )
    files = _hand_over(sources, directory, REPLICA_UID)
    enrolment = ENROLMENT.format(
        agents_ca=_toml(files["agents-ca.crt"]),
        agents_ca_key=_toml(files["agents-ca.key"]),
        qemu_ca=_toml(files["qemu-ca.crt"]),
        qemu_ca_key=_toml(files["qemu-ca.key"]),
    )
    replica.config_file.write_text(
        REPLICA_TOML.format(
            name=_toml(replica.name),
            data_dir=_toml(directory / "data"),
            api_listen=_toml(f"{replica.address}:{API_PORT}"),
            api_url=_toml(replica.url),
            agents_listen=_toml(f"{replica.address}:{AGENTS_PORT}"),
            ca=_toml(files["ca.crt"]),
            certificate=_toml(files["controlplane.crt"]),
            key=_toml(files["controlplane.key"]),
            etcd=_toml(list(etcd)),
            cluster_file=_toml(files["cluster.json"]),
            admin_key_file=_toml(files["admin-key.json"]),
        )
        + ("" if release is Release.PREVIOUS else enrolment)
    )
    os.chown(directory / "data", REPLICA_UID, REPLICA_UID)
    os.chown(directory, REPLICA_UID, REPLICA_UID)


def write_agent(
    node: LightNode,
    replicas: Sequence[Replica],
    release: Release,
    *,
    cpus: int,
    memory_mib: int,
) -> None:
    """Write an agent's configuration and certificate where the node will find them."""
    newer = HYPERVISOR_SINCE_0_2.format(qemu_tls_dir=_toml(NODE_QEMU_PKI_DIR))
    issued = CELL_DIR / "nodes" / node.name
    outside = node.inside(NODE_CONFIG_DIR)
    sources = (issued / "agent.crt", issued / "agent.key", CELL_DIR / "ca.crt")
    _hand_over(sources, outside, AGENT_UID)
    (outside / "agent.toml").write_text(
        AGENT_TOML.format(
            name=_toml(node.name),
            state_dir=_toml(NODE_STATE_DIR),
            address=_toml(node.address),
            zone=_toml(node.zone),
            controlplane=_toml([f"{r.address}:{AGENTS_PORT}" for r in replicas]),
            ca=_toml(NODE_CONFIG_DIR / "ca.crt"),
            certificate=_toml(NODE_CONFIG_DIR / "agent.crt"),
            key=_toml(NODE_CONFIG_DIR / "agent.key"),
            artefact_dir=_toml(NODE_ARTEFACT_DIR),
            hypervisor_since_0_2=newer if release is Release.PRESENT else "",
            bridge=_toml(GUEST_BRIDGE),
            cpus=cpus,
            memory_mib=memory_mib,
        )
    )


def give_qemu_certificates(node: LightNode) -> None:
    """Put the certificates of a node's QEMU where its qemu.conf says."""
    pki = node.directory / "etc-libvirt" / NODE_QEMU_PKI_DIR.name
    pki.mkdir()
    issued = CELL_DIR / "nodes" / node.name / "qemu"
    _hand_over(sorted(issued.iterdir()), pki, pwd.getpwnam(QEMU_USER).pw_uid)


def _hand_over(sources: Sequence[Path], target: Path, uid: int) -> dict[str, Path]:
    """Copy files for one owner; returns the copies by file name."""
    copies = {}
    for source in sources:
        copy = copies[source.name] = target / source.name
        shutil.copyfile(source, copy)
        copy.chmod(0o400)
        os.chown(copy, uid, uid)
    return copies


def _toml(value: str | Path | list[str]) -> str:
    """Return a TOML string or list; JSON's notation is TOML's, too."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
