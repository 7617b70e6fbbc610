"""A lab of full nodes: machines with systemd and sshd, and nothing of NovaCron on them.

    with FullLab(3) as lab:
        lab.node("n1").run("systemctl status")

It is one of this machine's labs: only one runs at a time, whether its nodes are light or full, and
whatever happens to the process that builds it, nothing stays.
"""

from __future__ import annotations

import shutil
from types import TracebackType

from tests.lab import layout, machine, network, signals
from tests.lab.full_node import FullNode, make_key
from tests.lab.full_root import ensure_root
from tests.lab.layout import LabError
from tests.lab.link import SupervisorLink
from tests.lab.processes import kill_all

COMMANDS = ("ip", "mmdebstrap", "ssh", "ssh-keygen", "systemd-nspawn", "unshare")


class FullLab:
    def __init__(self, nodes: int) -> None:
        self.link = SupervisorLink()
        self.nodes = tuple(
            FullNode(name=f"n{i + 1}", address=layout.node_address(i)) for i in range(nodes)
        )
        self._built = False

    def node(self, name: str) -> FullNode:
        return next(node for node in self.nodes if node.name == name)

    def up(self) -> None:
        """Boot every node and return once all of them run; nothing stays when it fails."""
        layout.require_root()
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            raise LabError(f"missing: {', '.join(missing)}; `./dev test` installs what brings them")
        root = ensure_root()
        try:
            with signals.held():
                machine.claim(self.link, lambda line: None)
                self._built = True
            make_key()
            network.create_bridge(replicas=1)
            for node in self.nodes:
                node.prepare(root, self.nodes)
                node.boot(self.link)
            for node in self.nodes:
                node.wait_running(self.link)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End and remove everything; does nothing the second time."""
        with signals.held():
            if self._built:
                self._built = False
                # Machines that shut down in order wait for each other's replicas and members.
                kill_all(lambda: [key for node in self.nodes for key in node.processes()])
                machine.clear(self.link)

    def __enter__(self) -> FullLab:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()
