"""The lab's network: one bridge for replicas and nodes, a veth pair per node, and cuts in it.

The bridge has no route to anywhere and nothing is translated: traffic stays in the lab.
"""

from __future__ import annotations

import json

from tests.lab.commands import attempt, run
from tests.lab.layout import (
    BRIDGE,
    PREFIX_LENGTH,
    VETH_PREFIX,
    replica_address,
)


def create_bridge(replicas: int) -> None:
    """Create the bridge with one address for each replica, and at least one."""
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    for index in range(max(1, replicas)):
        address = f"{replica_address(index)}/{PREFIX_LENGTH}"
        run("ip", "address", "add", address, "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


def plug_node(name: str, address: str, anchor_pid: int) -> None:
    """Connect a node's network namespace to the bridge as its ``eth0``."""
    port = VETH_PREFIX + name
    inside = ("nsenter", "--target", anchor_pid, "--net", "--")
    run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", anchor_pid)
    run("ip", "link", "set", port, "master", BRIDGE, "up")
    run(*inside, "ip", "address", "add", f"{address}/{PREFIX_LENGTH}", "dev", "eth0")
    run(*inside, "ip", "link", "set", "eth0", "up")


def unplug_node(name: str) -> None:
    """Take a node's cable away; does nothing when there is none."""
    attempt("ip", "link", "delete", VETH_PREFIX + name)


def set_cable(name: str, *, up: bool) -> None:
    """Cut a node off from everything, or connect it again."""
    run("ip", "link", "set", VETH_PREFIX + name, "up" if up else "down")


def drop_between(anchor_pid: int, address: str) -> None:
    """Let the node drop every packet from and to one address, at one stroke; see ``heal``."""
    inside = ("nsenter", "--target", anchor_pid, "--net", "--", "nft")
    rules = ["add table ip lab"]
    for hook, side in (("input", "saddr"), ("output", "daddr")):
        chain = "{ type filter hook " + hook + " priority 0 ; }"
        rules += [
            f"add chain ip lab {hook} {chain}",
            f"add rule ip lab {hook} ip {side} {address} drop",
        ]
    run(*inside, "; ".join(rules))


def heal(anchor_pid: int) -> None:
    """Forget every drop rule of a node."""
    attempt("nsenter", "--target", anchor_pid, "--net", "--", "nft", "delete", "table", "ip", "lab")


def leftover_links() -> list[str]:
    """Return the names of network devices that only a lab creates."""
    links = json.loads(run("ip", "-json", "link", "show"))
    names = sorted(str(link["ifname"]) for link in links)
    return [n for n in names if n == BRIDGE or n.startswith(VETH_PREFIX)]


def remove_links() -> None:
    """Remove every device of the lab; a veth may vanish by itself with its namespace."""
    for name in leftover_links():
        attempt("ip", "link", "delete", name)
