"""The lab's etcd members: loopback ports of their own, data in the lab's directory."""

from __future__ import annotations

import http.client
import os
import socket
from functools import partial
from pathlib import Path

from msgspec import Struct

from tests.lab import runtime
from tests.lab.layout import ETCD_CLIENT_PORT, ETCD_PEER_PORT, MEMBER_UID, STATE_DIR, LabError
from tests.lab.link import SupervisorLink
from tests.lab.supervisor import Program

# A member that replays a long log takes this long to serve again.
MEMBER_START_LIMIT_S = 60.0


class Member(Struct, frozen=True):
    """One etcd process, counted from zero."""

    index: int

    @property
    def name(self) -> str:
        return f"etcd{self.index + 1}"

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{ETCD_CLIENT_PORT + self.index}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{ETCD_PEER_PORT + self.index}"

    @property
    def directory(self) -> Path:
        return STATE_DIR / "etcd" / self.name


def start(members: tuple[Member, ...], link: SupervisorLink) -> None:
    """Start a new etcd cluster; see ``wait_for``. Raises LabError when a port is taken."""
    for member in members:
        for port in (ETCD_CLIENT_PORT + member.index, ETCD_PEER_PORT + member.index):
            _require_free(port)
    cluster = ",".join(f"{m.name}={m.peer_url}" for m in members)
    for member in members:
        member.directory.mkdir(parents=True)
        member.directory.chmod(0o700)
        os.chown(member.directory, MEMBER_UID, MEMBER_UID)
        link.start(_program(member, cluster))


def wait_for(members: tuple[Member, ...], link: SupervisorLink) -> None:
    """Return once every member serves; raises LabError."""
    for member in members:
        link.wait_for(
            member.name,
            partial(serves, member),
            f"etcd member {member.name} to serve",
            limit_s=MEMBER_START_LIMIT_S,
        )


def serves(member: Member) -> bool:
    """Tell whether a member answers and has a leader."""
    connection = http.client.HTTPConnection(member.endpoint, timeout=1.0)
    try:
        connection.request("GET", "/health")
        return b'"true"' in connection.getresponse().read(1024)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _program(member: Member, cluster: str) -> Program:
    client_url = f"http://{member.endpoint}"
    options = {
        "name": member.name,
        "data-dir": str(member.directory),
        "listen-client-urls": client_url,
        "advertise-client-urls": client_url,
        "listen-peer-urls": member.peer_url,
        "initial-advertise-peer-urls": member.peer_url,
        "initial-cluster": cluster,
        "initial-cluster-token": "novacron-lab",
        # The default of 100,000 makes a restarted member replay for half a minute.
        "snapshot-count": "10000",
        "logger": "zap",
    }
    return Program(
        name=member.name,
        arguments=(
            *runtime.unprivileged(MEMBER_UID),
            "/usr/bin/etcd",
            *(f"--{name}={value}" for name, value in options.items()),
        ),
        environment=runtime.environment(member.directory),
    )


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LabError(f"the lab's etcd needs port {port} on loopback: {error}") from error
