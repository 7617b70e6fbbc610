"""Playbooks of the collection, run against a lab's full nodes as an operator runs them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.version import VERSION
from tests.lab.full_node import SSH_OPTIONS, FullNode
from tests.lab.layout import LOG_DIR, REPOSITORY, STATE_DIR, LabError

# A site of five nodes on two cores, with a margin of several times.
PLAYBOOK_LIMIT_S = 1_200.0
FORKS = 10

_RECAP = re.compile(
    r"^(?P<name>\S+)\s+: ok=\d+\s+changed=(?P<changed>\d+)\s+unreachable=(?P<unreachable>\d+)"
    r"\s+failed=(?P<failed>\d+)",
    re.M,
)


class Outcome(Struct, frozen=True):
    """How a playbook ended; ``changed`` has the number of changed tasks of each node."""

    status: int
    text: str
    changed: dict[str, int]

    def checked(self) -> Outcome:
        """Return this if everything went well; raises LabError with what was said otherwise."""
        if self.status:
            raise LabError(f"the playbook ended with {self.status}:\n{self.text[-6_000:]}")
        return self


class Site:
    """The inventory of some full nodes, and playbooks that are run on it.

    ``control`` are the nodes with etcd and a replica; all nodes have an agent.
    """

    def __init__(
        self,
        nodes: tuple[FullNode, ...],
        control: tuple[FullNode, ...],
        archive_dir: Path,
        settings: dict[str, object],
    ) -> None:
        self._directory = STATE_DIR / "site"
        self._directory.mkdir(exist_ok=True)
        self._config = self._directory / "ansible.cfg"
        self._config.touch()
        self._link_collection()
        self.inventory = self._directory / "hosts.json"
        everyone = {node.name: {"novacron_address": node.address} for node in nodes}
        groups = {
            "novacron_etcd": {"hosts": {node.name: {} for node in control}},
            "novacron_controlplane": {"hosts": {node.name: {} for node in control}},
            "novacron_agents": {"hosts": everyone},
        }
        common = {
            "novacron_version": VERSION,
            "novacron_archive_dir": str(archive_dir),
            "ansible_host": "{{ novacron_address }}",
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
            **settings,
        }
        inventory = {"all": {"children": groups, "vars": common}}
        self.inventory.write_bytes(msgspec.json.format(msgspec.json.encode(inventory)))

    def play(self, playbook: str, *options: str) -> Outcome:
        """Run a playbook of the collection, to its end or its failure."""
        process = subprocess.run(
            self._words(playbook, options),
            check=False,
            capture_output=True,
            text=True,
            timeout=PLAYBOOK_LIMIT_S,
            env=self._environment(),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
        )
        text = process.stdout + process.stderr
        with (LOG_DIR / "ansible.log").open("a") as log:
            log.write(text)
        changed = {found["name"]: int(found["changed"]) for found in _RECAP.finditer(text)}
        return Outcome(process.returncode, text, changed)

    def _words(self, playbook: str, options: tuple[str, ...]) -> list[str]:
        program = Path(sys.executable).with_name("ansible-playbook")
        name = f"novacron.cluster.{playbook}"
        return [str(program), "--inventory", str(self.inventory), name, *options]

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "ANSIBLE_COLLECTIONS_PATH": str(self._directory),
            "ANSIBLE_CONFIG": str(self._config),
            "ANSIBLE_FORKS": str(FORKS),
            "ANSIBLE_HOME": str(self._directory / "home"),
            "ANSIBLE_LOCALHOST_WARNING": "False",
            "ANSIBLE_NOCOLOR": "True",
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_SSH_ARGS": f"{shlex.join(SSH_OPTIONS)} -o ControlMaster=auto "
            f"-o ControlPersist=60s -o ControlPath={self._directory}/%C",
            "LC_ALL": "C.UTF-8",
        }

    def _link_collection(self) -> None:
        place = self._directory / "ansible_collections" / "novacron"
        place.mkdir(parents=True, exist_ok=True)
        link = place / "cluster"
        if not link.is_symlink():
            link.symlink_to(REPOSITORY / "ansible")
