"""A light node: namespaces of its own with a libvirtd inside, and an agent without privileges.

An anchor process holds the node's network, mount and UTS namespaces; libvirtd and the agent enter
them. `/var/lib`, `/run` and libvirt's directories are the node's own, and so is the boot id: each
start of a node binds a new one over the kernel's. Crashing a node kills all that runs in it.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import uuid
from pathlib import Path

from msgspec import Struct

from tests.lab import network, runtime
from tests.lab.layout import (
    AGENT_UID,
    GUEST_BRIDGE,
    LIBVIRT_GROUP,
    NODE_ARTEFACT_DIR,
    NODE_CONFIG_DIR,
    NODE_QEMU_PKI_DIR,
    NODE_STATE_DIR,
    QEMU_USER,
    SHARED_POOL_DIR,
    STATE_DIR,
)
from tests.lab.link import SupervisorLink
from tests.lab.processes import ProcessKey, find_by_mount, kill_all
from tests.lab.runtime import Release
from tests.lab.state import (
    agent_program,
    anchor_program,
    libvirtd_program,
    virtlockd_program,
)
from tests.lab.supervisor import Program

POOLS = {
    "default": "/var/lib/libvirt/images",
    "novacron-console": "/var/lib/libvirt/novacron-console",
    "shared": "/var/lib/libvirt/shared",
}
READY_FILE = "novacron-lab-ready"
# libvirtd asks every QEMU binary for its capabilities at its first start; slow disks take a while.
LIBVIRTD_START_LIMIT_S = 60.0

LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
unix_sock_group = "{group}"
unix_sock_ro_perms = "0770"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_level = 3
"""
# Namespaces, cgroups and AppArmor profiles belong to the machine, not to a node of the lab; the
# log daemon would be one more process for each node. Whoever connects to a migration port has to
# show a certificate: that is the default's meaning of `verify`, written down since all rests on it.
QEMU_CONF = """\
user = "{user}"
group = "{group}"
dynamic_ownership = 1
cgroup_controllers = []
namespaces = []
security_driver = "none"
stdio_handler = "file"
default_tls_x509_cert_dir = "{pki}"
default_tls_x509_verify = 1
migrate_tls_x509_cert_dir = "{pki}"
migrate_tls_x509_verify = 1
"""
# Locks go to the disks' files themselves: two paths to one file are then one lock, and equal paths
# on two nodes without a file system in common are two.
LOCKD_CONF = "auto_disk_leases = 1\n"
POOL_XML = "<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>\n"

# /dev/kvm becomes what udev makes of it. Where root alone may open it, libvirtd (which asks as
# root) and QEMU (which is not) disagree about it, and libvirtd asks QEMU anew at every call.
INIT = """\
set -e
hostname {name}
if [ -e /dev/kvm ]; then
    rm -f {dir}/kvm
    mknod -m 0660 {dir}/kvm c 10 232
    chgrp kvm {dir}/kvm
    mount --bind {dir}/kvm /dev/kvm
fi
mount --bind {dir}/boot_id /proc/sys/kernel/random/boot_id
mount --bind {dir}/passwd /etc/passwd
mount --bind {dir}/group /etc/group
mount --bind {dir}/hosts /etc/hosts
mount --bind {dir}/etc-libvirt /etc/libvirt
mount --bind {dir}/var-log-libvirt /var/log/libvirt
mount --bind {dir}/var-cache-libvirt /var/cache/libvirt
mount --bind {runtime} {dir}/var-lib{runtime_in_var_lib}
{runtime_mounts}
{artefacts}
mount --bind {shared_pool} {shared_pool_in_node}
mount --bind {run} /run
mount --rbind {dir}/var-lib /var/lib
mount -t sysfs sysfs /sys
ip link set lo up
ip link add {bridge} type bridge
ip link set {bridge} up
touch /run/{ready}
exec sleep infinity
"""


class LightNode(Struct, frozen=True, kw_only=True):
    """One node; ``directory`` holds all its files, as the root namespace sees them."""

    name: str
    address: str
    zone: str = "a"
    artefact_dir: Path | None = None
    disk_leases: bool = False

    @property
    def directory(self) -> Path:
        return STATE_DIR / "nodes" / self.name

    @property
    def libvirt_socket(self) -> Path:
        return self.directory / "run" / "libvirt" / "libvirt-sock"

    @property
    def libvirt_uri(self) -> str:
        """The node's libvirtd for a client in the root namespace."""
        return f"qemu+unix:///system?socket={self.libvirt_socket}"

    def inside(self, path: Path | str) -> Path:
        """Return where a file under the node's `/var/lib` is for the root namespace."""
        return self.directory / "var-lib" / Path(path).relative_to("/var/lib")

    def prepare(self) -> None:
        """Write the node's files once; its disks and records then survive its restarts."""
        for part in ("run", "etc-libvirt", "var-log-libvirt", "var-cache-libvirt", "var-lib"):
            (self.directory / part).mkdir(parents=True)
        (self.directory / "var-log-libvirt" / "qemu").mkdir()
        self._write_libvirt_files()
        self._write_accounts()
        for place in (NODE_ARTEFACT_DIR, NODE_CONFIG_DIR, NODE_STATE_DIR, runtime.RUNTIME_DIR):
            self.inside(place).mkdir(parents=True)
        os.chown(self.inside(NODE_STATE_DIR), AGENT_UID, AGENT_UID)
        (self.directory / "init.sh").write_text(self._init_script())

    def boot(self, link: SupervisorLink) -> None:
        """Start the node with a new boot id: its anchor, its cable and its libvirtd."""
        run_dir = self.directory / "run"
        shutil.rmtree(run_dir)
        (run_dir / "lock").mkdir(parents=True)
        (self.directory / "boot_id").write_text(f"{uuid.uuid4()}\n")
        namespaces = ("--mount", "--uts", "--net", "--propagation=private")
        script = str(self.directory / "init.sh")
        anchor = link.start(
            Program(
                name=anchor_program(self.name),
                arguments=("unshare", *namespaces, "/bin/sh", script),
                environment=runtime.environment(Path("/")),
                restart=False,
            )
        )
        link.wait_for(
            anchor_program(self.name),
            (run_dir / READY_FILE).exists,
            f"node {self.name} to mount its files",
        )
        network.plug_node(self.name, self.address, anchor)
        if self.disk_leases:
            self._start_daemon(link, anchor, virtlockd_program(self.name), "/usr/sbin/virtlockd")
            link.wait_for(
                virtlockd_program(self.name),
                (run_dir / "libvirt" / "virtlockd-sock").exists,
                f"node {self.name}'s virtlockd",
            )
        self._start_daemon(link, anchor, libvirtd_program(self.name), "/usr/sbin/libvirtd")

    def wait_for_libvirtd(self, link: SupervisorLink) -> None:
        """Return once the node's libvirtd listens; raises LabError."""
        link.wait_for(
            libvirtd_program(self.name),
            self.libvirt_socket.exists,
            f"node {self.name}'s libvirtd",
            limit_s=LIBVIRTD_START_LIMIT_S,
        )

    def start_agent(self, link: SupervisorLink, release: Release = Release.PRESENT) -> int:
        """Start the agent under its own id, with no group but libvirt's; returns its pid."""
        libvirt_gid = grp.getgrnam(LIBVIRT_GROUP).gr_gid
        config = str(NODE_CONFIG_DIR / "agent.toml")
        return link.start(
            Program(
                name=agent_program(self.name),
                arguments=(
                    *_entering(link.pid_of(anchor_program(self.name))),
                    *runtime.unprivileged(AGENT_UID, libvirt_gid),
                    *(runtime.python(), "-m", "agent", "--config", config),
                ),
                environment=runtime.environment(NODE_STATE_DIR, release),
            )
        )

    def crash(self, link: SupervisorLink) -> None:
        """Fail the node as its power supply would: nothing in it gets to say goodbye."""
        network.unplug_node(self.name)
        for program in (agent_program, libvirtd_program, virtlockd_program, anchor_program):
            link.stop(program(self.name), grace_s=0.0)
        kill_all(self.processes)

    def processes(self) -> list[ProcessKey]:
        """Return every living process in the node: guests, too."""
        return find_by_mount(f"{STATE_DIR.name}/nodes/{self.name}/var-lib")

    def boot_id(self) -> str:
        """Return the boot id of the node's last start."""
        return (self.directory / "boot_id").read_text().strip()

    def _start_daemon(
        self, link: SupervisorLink, anchor: int, program: str, executable: str
    ) -> None:
        link.start(
            Program(
                name=program,
                arguments=(*_entering(anchor), executable),
                environment=runtime.environment(Path("/")),
            )
        )

    def _write_libvirt_files(self) -> None:
        qemu = pwd.getpwnam(QEMU_USER)
        etc = self.directory / "etc-libvirt"
        own = uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.name}.lab.novacron.invalid")
        etc.joinpath("libvirtd.conf").write_text(
            LIBVIRTD_CONF.format(uuid=own, group=LIBVIRT_GROUP)
        )
        group = grp.getgrgid(qemu.pw_gid).gr_name
        conf = QEMU_CONF.format(user=QEMU_USER, group=group, pki=NODE_QEMU_PKI_DIR)
        if self.disk_leases:
            conf += 'lock_manager = "lockd"\n'
            etc.joinpath("qemu-lockd.conf").write_text(LOCKD_CONF)
        etc.joinpath("qemu.conf").write_text(conf)
        autostart = etc / "storage" / "autostart"
        autostart.mkdir(parents=True)
        for name, path in POOLS.items():
            place = self.inside(path)
            place.mkdir(parents=True)
            os.chown(place, qemu.pw_uid, qemu.pw_gid)
            place.chmod(0o711)
            (etc / "storage" / f"{name}.xml").write_text(POOL_XML.format(name=name, path=path))
            (autostart / f"{name}.xml").symlink_to(f"/etc/libvirt/storage/{name}.xml")

    def _write_accounts(self) -> None:
        """Give the agent's id a name inside the node; the machine's own files stay as they are."""
        user = f"novacron-agent:x:{AGENT_UID}:{AGENT_UID}::{NODE_STATE_DIR}:/usr/sbin/nologin\n"
        group = f"novacron-agent:x:{AGENT_UID}:\n"
        for name, line in (("passwd", user), ("group", group)):
            text = Path("/etc", name).read_text().rstrip("\n") + "\n" + line
            (self.directory / name).write_text(text)
        # libvirtd looks its own name up for every guest; without this it asks a name server.
        hosts = f"127.0.0.1 localhost\n{self.address} {self.name}\n"
        (self.directory / "hosts").write_text(hosts)

    def _init_script(self) -> str:
        inside_runtime = self.inside(runtime.RUNTIME_DIR)
        artefacts = ""
        if self.artefact_dir is not None:
            artefacts = f"mount --bind -o ro {self.artefact_dir} {self.inside(NODE_ARTEFACT_DIR)}"
        return INIT.format(
            name=self.name,
            dir=self.directory,
            runtime=runtime.RUNTIME_DIR,
            runtime_in_var_lib="/" + str(runtime.RUNTIME_DIR.relative_to("/var/lib")),
            runtime_mounts="\n".join(runtime.mounts(inside_runtime)),
            artefacts=artefacts,
            shared_pool=SHARED_POOL_DIR,
            shared_pool_in_node=self.inside(POOLS["shared"]),
            bridge=GUEST_BRIDGE,
            run=self.directory / "run",
            ready=READY_FILE,
        )


def _entering(anchor: int) -> tuple[str, ...]:
    return ("nsenter", f"--target={anchor}", "--mount", "--uts", "--net", "--wd=/", "--")
