"""The lab: etcd members, replicas and nodes on this machine, built and taken down as one.

    with Lab(LabPlan(nodes=2)) as lab:
        lab.node("n1").crash(lab.link)

A plan without replicas builds nodes only, with a libvirtd and no agent. One lab at a time: it
refuses to start over what another left. Whatever happens to the process that builds a lab, nothing
stays: the supervisor notices its end. Only ``release`` lets a lab outlive its builder.
"""

from __future__ import annotations

import grp
import http.client
import os
import pwd
import random
import shutil
import ssl
import time
from functools import partial
from pathlib import Path
from types import TracebackType

from msgspec import Struct

from controlplane.cell_files import CellFiles
from shared.clock import SystemClock
from tests.lab import configs, etcd, layout, machine, network, runtime, signals, state
from tests.lab.api import LabApi
from tests.lab.capabilities import share_capabilities
from tests.lab.configs import CELL_DIR, Replica
from tests.lab.etcd import Member
from tests.lab.guest_image import ensure_guest_artefacts
from tests.lab.layout import LabError
from tests.lab.link import SupervisorLink
from tests.lab.machine import Say
from tests.lab.nodes import LightNode
from tests.lab.runtime import Release
from tests.lab.supervisor import Program

COMMANDS = ("etcd", "ip", "libvirtd", "nft", "nsenter", "qemu-system-x86_64", "setpriv", "unshare")
# The first inventory includes a trial boot under KVM, on a busy machine one after the other.
NODES_READY_LIMIT_S = 180.0
REPLICA_READY_LIMIT_S = 60.0


class LabPlan(Struct, frozen=True, kw_only=True):
    """How large a lab is; ``cpus`` and ``memory_mib`` are what each node says it has.

    ``disk_leases``: a virtlockd on each node keeps two nodes from running guests on one disk.
    ``previous`` names replicas, and nodes whose agents, begin as the previous release.
    """

    nodes: int = 3
    replicas: int = 1
    members: int = 1
    cpus: int = 4
    memory_mib: int = 2048
    artefacts: bool = True
    disk_leases: bool = False
    previous: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raise LabError for a size that the lab cannot have."""
        if not 1 <= self.nodes <= layout.NODES_MAX:
            raise LabError(f"a lab has 1 to {layout.NODES_MAX} nodes")
        if not 0 <= self.replicas <= layout.REPLICAS_MAX:
            raise LabError(f"a lab has 0 to {layout.REPLICAS_MAX} replicas")
        if self.replicas and self.members not in layout.MEMBERS:
            raise LabError("etcd runs with 1, 3 or 5 members")


class Lab:
    """One lab; ``say`` is told what happens, a line at a time."""

    def __init__(self, plan: LabPlan | None = None, say: Say = lambda text: None) -> None:
        self.plan = plan or LabPlan()
        self.link = SupervisorLink()
        self.members = tuple(
            Member(i) for i in range(self.plan.members if self.plan.replicas else 0)
        )
        self.replicas = tuple(
            Replica(name=f"r{i + 1}", address=layout.replica_address(i))
            for i in range(self.plan.replicas)
        )
        self.nodes: tuple[LightNode, ...] = ()
        self._node_ids: dict[str, str] = {}
        self._releases = dict.fromkeys(self.plan.previous, Release.PREVIOUS)
        self._say = say
        self._built = False

    def up(self) -> state.LabState:
        """Build everything and return once every node is ready; nothing stays when it fails."""
        self.plan.check()
        require_able()
        try:
            self._claim_machine()
            self._build(self._guest() if self.plan.artefacts else None)
        except BaseException:
            self.down()
            raise
        return self.state()

    def down(self) -> None:
        """End and remove everything this lab has built; does nothing the second time."""
        with signals.held():
            if self._built:
                self._built = False
                machine.clear(self.link)

    def release(self) -> None:
        """Let the lab live on after this process; ``./dev lab down`` ends it."""
        self.link.detach()
        self.link.forget()
        self._built = False

    def state(self) -> state.LabState:
        """Return what the lab consists of, with the pids of the moment."""
        recorded = state.read_state()
        if recorded is None:
            raise LabError("the lab is not built yet")
        return recorded

    def api(self) -> LabApi:
        """Return a client of the lab's API that is logged in as its administrator."""
        return LabApi.of(self.state())

    def node(self, name: str) -> LightNode:
        """Return a node by its name."""
        return next(n for n in self.nodes if n.name == name)

    def restart_node(self, name: str) -> str:
        """Let a node fail and boot again; returns its new boot id."""
        node = self.node(name)
        node.crash(self.link)
        node.boot(self.link)
        node.wait_for_libvirtd(self.link)
        if self.replicas:
            node.start_agent(self.link, self.release_of(name))
        return node.boot_id()

    def release_of(self, name: str) -> Release:
        """Return whose code a replica runs, or a node's agent."""
        return self._releases.get(name, Release.PRESENT)

    def replace_agent(self, name: str, release: Release) -> None:
        """Put an agent of another release in the place of a node's; its state stays."""
        self.link.stop(state.agent_program(name))
        self._releases[name] = release
        self._write_agent(self.node(name))
        self.node(name).start_agent(self.link, release)

    def replace_replica(self, name: str, release: Release) -> None:
        """Put a replica of another release in the place of one, on its data; wait for it to lead.

        Meant for the only replica of a lab.
        """
        replica = next(r for r in self.replicas if r.name == name)
        self.link.stop(name)
        self._releases[name] = release
        self._write_replica(replica)
        self._start_replica(replica)

    def start_replicas(self) -> None:
        """Start all replicas, and return once they serve.

        Alone the first becomes the leader, so that every lab begins alike.
        """
        for replica in self.replicas:
            self._start_replica(replica)

    def wait_for_nodes(self) -> None:
        """Return once the control plane calls every node ready; raises LabError."""
        api = self.api()

        def is_ready(name: str) -> bool:
            self._node_ids = {n.name: n.id for n in api.nodes() if n.state == "ready"}
            return name in self._node_ids

        try:
            for node in self.nodes:
                self.link.wait_for(
                    state.agent_program(node.name),
                    partial(is_ready, node.name),
                    f"node {node.name} to be ready",
                    limit_s=NODES_READY_LIMIT_S,
                )
        finally:
            api.close()
        self._write_state()

    def _claim_machine(self) -> None:
        with signals.held():
            machine.claim(self.link, self._say)
            self._built = True

    def _build(self, artefact_dir: Path | None) -> None:
        runtime.prepare()
        if self.plan.previous:
            runtime.prepare_previous()
        network.create_bridge(self.plan.replicas)
        with _Step(self._say, f"etcd ({len(self.members)})", bool(self.members)):
            etcd.start(self.members, self.link)
        with _Step(self._say, f"nodes with a libvirtd each ({self.plan.nodes})"):
            self._boot_nodes(artefact_dir)
        if self.replicas:
            self._start_control_plane()
        self._write_state()
        if self.replicas:
            with _Step(self._say, f"agents ({self.plan.nodes})"):
                for node in self.nodes:
                    node.start_agent(self.link, self.release_of(node.name))
                self.wait_for_nodes()

    def _guest(self) -> Path:
        with _Step(self._say, "guest image"):
            return ensure_guest_artefacts()

    def _boot_nodes(self, artefact_dir: Path | None) -> None:
        self.nodes = tuple(
            LightNode(
                name=f"n{i + 1}",
                address=layout.node_address(i),
                zone="abc"[i % 3],
                artefact_dir=artefact_dir,
                disk_leases=self.plan.disk_leases,
            )
            for i in range(self.plan.nodes)
        )
        self._issue_certificates()
        _make_shared_pool()
        for node in self.nodes:
            node.prepare()
            configs.give_qemu_certificates(node)
            share_capabilities(node)
            node.boot(self.link)
        for node in self.nodes:
            node.wait_for_libvirtd(self.link)

    def _start_control_plane(self) -> None:
        with _Step(self._say, f"control plane ({len(self.replicas)})"):
            etcd.wait_for(self.members, self.link)
            for node in self.nodes:
                self._write_agent(node)
            for replica in self.replicas:
                self._write_replica(replica)
            self.start_replicas()

    def _write_agent(self, node: LightNode) -> None:
        configs.write_agent(
            node,
            self.replicas,
            self.release_of(node.name),
            cpus=self.plan.cpus,
            memory_mib=self.plan.memory_mib,
        )

    def _write_replica(self, replica: Replica) -> None:
        endpoints = [member.endpoint for member in self.members]
        configs.write_replica(replica, endpoints, self.release_of(replica.name))

    def _start_replica(self, replica: Replica) -> None:
        self.link.start(_replica_program(replica, self.release_of(replica.name)))
        self.link.wait_for(
            replica.name,
            partial(serves, replica),
            f"replica {replica.name} to be ready",
            limit_s=REPLICA_READY_LIMIT_S,
        )

    def _issue_certificates(self) -> None:
        files = CellFiles(CELL_DIR, SystemClock(), random.Random(os.urandom(16)))
        files.ensure_cell()
        for replica in self.replicas:
            files.add_replica(replica.name, replica.address)
        for node in self.nodes:
            files.add_node(node.name, node.address)

    def _write_state(self) -> None:
        built = bool(self.replicas)
        state.write(
            state.STATE_FILE,
            state.LabState(
                api=tuple(r.url for r in self.replicas),
                ca=str(CELL_DIR / "ca.crt") if built else "",
                token=str(CELL_DIR / "admin.token") if built else "",
                etcd=tuple(m.endpoint for m in self.members),
                members=tuple(
                    state.MemberState(name=m.name, endpoint=m.endpoint) for m in self.members
                ),
                replicas=tuple(state.ReplicaState(name=r.name, url=r.url) for r in self.replicas),
                nodes=tuple(
                    state.NodeState(
                        name=n.name,
                        id=self._node_ids.get(n.name),
                        address=n.address,
                        libvirt_uri=n.libvirt_uri,
                    )
                    for n in self.nodes
                ),
            ),
        )

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()


def require_able() -> None:
    """Raise LabError when this user or machine cannot have a lab, with what to do about it."""
    layout.require_root()
    missing = [c for c in COMMANDS if shutil.which(c, path=_search_path()) is None]
    if missing:
        raise LabError(f"missing: {', '.join(missing)}; `./dev lab up` installs what provides them")
    try:
        grp.getgrnam(layout.LIBVIRT_GROUP)
        pwd.getpwnam(layout.QEMU_USER)
    except KeyError as error:
        raise LabError(f"{error}: is libvirt-daemon-system installed?") from error


def _make_shared_pool() -> None:
    qemu = pwd.getpwnam(layout.QEMU_USER)
    layout.SHARED_POOL_DIR.mkdir()
    layout.SHARED_POOL_DIR.chmod(0o711)
    os.chown(layout.SHARED_POOL_DIR, qemu.pw_uid, qemu.pw_gid)


def _replica_program(replica: Replica, release: Release) -> Program:
    command = (
        *runtime.unprivileged(layout.REPLICA_UID),
        *(runtime.python(), "-m", "controlplane", "--config", str(replica.config_file)),
    )
    script = "\n".join(("set -e", *runtime.mounts(), 'exec "$@"'))
    return Program(
        name=replica.name,
        arguments=("unshare", "--mount", "/bin/sh", "-c", script, replica.name, *command),
        environment=runtime.environment(replica.directory, release),
    )


def serves(replica: Replica) -> bool:
    """Tell whether a replica says that it is ready."""
    context = ssl.create_default_context(cafile=str(CELL_DIR / "ca.crt"))
    connection = http.client.HTTPSConnection(
        replica.address, layout.API_PORT, timeout=2.0, context=context
    )
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _search_path() -> str:
    return runtime.environment(Path("/"))["PATH"]


class _Step:
    """Says how long a step took, once it is done."""

    def __init__(self, say: Say, what: str, wanted: bool = True) -> None:
        self._say = say
        self._what = what
        self._wanted = wanted

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._wanted and error is None:
            self._say(f"{self._what}: {time.monotonic() - self._started:.1f} s")
