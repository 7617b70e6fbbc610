"""Where the lab keeps things, and the addresses and names that it uses; one lab per machine.

Everything is under one directory with a fixed name, so that a second lab sees the first and
whoever clears up finds everything, whichever checkout it came from. Holds no behaviour.
"""

from __future__ import annotations

import os
from pathlib import Path

STATE_DIR = Path("/var/lib/novacron-lab")
LOG_DIR = STATE_DIR / "logs"
# In the environment of every process that the lab starts. Not NOVACRON_…: that would be taken for
# a setting.
MARK = f"LAB_OF_NOVACRON={STATE_DIR}"
REPOSITORY = Path(__file__).resolve().parents[2]
CACHE_DIR = REPOSITORY / ".cache"
# The logs of the last lab, for whoever wonders what happened in it.
KEPT_LOG_DIR = CACHE_DIR / "lab" / "logs"

# The directory behind every node's pool "shared": one file system that all of them see.
SHARED_POOL_DIR = STATE_DIR / "shared-pool"

BRIDGE = "nclab0"
SUBNET = "10.88.0"
PREFIX_LENGTH = 24
VETH_PREFIX = "nclab-"
CGROUP_PREFIX = "nclab-"
GUEST_BRIDGE = "br-lan"

# Replicas take .1 to .9, nodes .11 and up; both limits keep them apart inside the /24.
REPLICAS_MAX = 9
NODES_MAX = 100
MEMBERS = (1, 3, 5)

API_PORT = 8443
AGENTS_PORT = 8444
# Away from etcd's own 2379 and 2380, where a user's own member may listen.
ETCD_CLIENT_PORT = 12379
ETCD_PEER_PORT = 12479

# Ids that Debian gives to nobody (its policy reserves 60000-64999 for what it hands out itself,
# and this is none of those); they exist inside the lab's namespaces and files only.
AGENT_UID = 64991
REPLICA_UID = 64992
MEMBER_UID = 64993

LIBVIRT_GROUP = "libvirt"
QEMU_USER = "libvirt-qemu"

# What a node sees of the lab, inside its own mount namespace.
NODE_CONFIG_DIR = Path("/var/lib/novacron/config")
NODE_ARTEFACT_DIR = Path("/var/lib/novacron/artefacts")
NODE_STATE_DIR = Path("/var/lib/novacron/agent")
# For QEMU's certificates. /etc/pki/qemu, where QEMU looks by itself, would need a mount point that
# the machine may not have.
NODE_QEMU_PKI_DIR = Path("/etc/libvirt/pki")


def replica_address(index: int) -> str:
    """Return the address of the ``index``-th replica, counted from zero."""
    return f"{SUBNET}.{1 + index}"


def node_address(index: int) -> str:
    """Return the address of the ``index``-th node, counted from zero."""
    return f"{SUBNET}.{11 + index}"


def require_root() -> None:
    """Raise LabError unless the process may build namespaces."""
    if os.geteuid() != 0:
        raise LabError(
            "the lab builds network and mount namespaces, so it needs root: try `sudo ./dev …`, "
            "or `./dev demo --simulated`, which needs none"
        )


class LabError(Exception):
    """Something about the lab that its user can act on; the text says how."""
