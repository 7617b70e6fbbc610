"""A cluster on full nodes: its inventory, playbooks run on it, and the operator's command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from shared.version import VERSION
from tests.lab.full_node import SSH_OPTIONS, FullNode
from tests.lab.guest_image import INITRD_NAME, KERNEL_NAME, ensure_guest_artefacts
from tests.lab.layout import LOG_DIR, REPOSITORY, STATE_DIR, LabError
from tests.lab.link import wait_until

# A site of five nodes on two cores, with a margin of several times.
PLAYBOOK_LIMIT_S = 1_200.0
FORKS = 10
# Far longer than a cluster takes to come to rest on a busy machine.
REST_LIMIT_S = 180.0
# What a VM of the lab boots.
BOOT = f"--vcpus 1 --memory 192MiB --kernel {KERNEL_NAME} --initrd {INITRD_NAME}"
# Of machines in containers: their cgroups are read-only, and there is no AppArmor.
SETTINGS: dict[str, object] = {
    "agent_qemu_settings": {
        "cgroup_controllers": [],
        "security_driver": "none",
        "namespaces": [],
        "stdio_handler": "file",
    },
    "agent_labels": {"name": "{{ inventory_hostname }}"},
    "agent_cpus": 4,
    "agent_memory_mib": 2048,
}

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
    """``control`` are the nodes with etcd and a replica; all nodes have an agent."""

    def __init__(
        self, nodes: tuple[FullNode, ...], control: tuple[FullNode, ...], archive_dir: Path
    ) -> None:
        self.nodes = nodes
        self.keeper = control[0]
        self.endpoints = [f"https://{node.address}:8443" for node in control]
        self._command = (
            f"NOVACRON_ENDPOINT={','.join(self.endpoints)} NOVACRON_CA=/etc/novacron/pki/ca.crt "
            "NOVACRON_TOKEN=$(cat /etc/novacron/pki/admin.token) "
            "/opt/novacron/current/controlplane/bin/novacron "
        )
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
            **SETTINGS,
        }
        inventory = {"all": {"children": groups, "vars": common}}
        self.inventory.write_bytes(msgspec.json.format(msgspec.json.encode(inventory)))

    def play(self, playbook: str, *options: str) -> Outcome:
        """Run a playbook of the collection, to its end or its failure."""
        process = self._started(playbook, options)
        text, _ = process.communicate(timeout=PLAYBOOK_LIMIT_S)
        return self._outcome(process.returncode, text)

    def play_for(self, seconds: float, playbook: str) -> Outcome:
        """Run a playbook and kill it, with all that it has started here, after so long."""
        process = self._started(playbook, ())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(psutil.NoSuchProcess):  # it was quicker
            playing = psutil.Process(process.pid)
            # Its workers lead groups of their own.
            for each in (playing, *playing.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        text, _ = process.communicate()
        return self._outcome(process.returncode, text)

    def novacron(self, words: str) -> str:
        """Run the command on the first machine, as an operator would; raises LabError."""
        return self.keeper.run(self._command + words, limit_s=REST_LIMIT_S)

    def asked(self, words: str) -> Any:
        """Return what the command says as JSON."""
        return json.loads(self.novacron(f"{words} -o json"))

    def until_all_ready(self) -> None:
        """Return once every node is heard. Raises LabError."""
        wait_until(self._all_ready, "all nodes to be ready", limit_s=REST_LIMIT_S)

    def node_of(self, vm: str) -> FullNode:
        """Return where a VM is."""
        place = self.asked(f"vm show {vm}")["status"]["node"]
        name = self.asked(f"node show {place}")["name"]
        return next(node for node in self.nodes if node.name == name)

    def hand_out_artefacts(self) -> None:
        """Put the tiny guest where an operator would put images."""
        for node in self.nodes:
            self.put_artefacts(node)
            # It would notice within a minute.
            node.run("systemctl restart novacron-agent")
        self.until_all_ready()

    def put_artefacts(self, node: FullNode) -> None:
        artefacts, place = ensure_guest_artefacts(), Path("/var/lib/novacron/artefacts")
        node.run(f"mkdir -p {place}")
        for name in (KERNEL_NAME, INITRD_NAME):
            node.copy(artefacts / name, place / name)

    def _all_ready(self) -> bool:
        told = self.keeper.attempt(f"{self._command} cluster status -o json")
        ready = 0 if told.returncode else json.loads(told.stdout)["nodes"]["ready"]
        return bool(ready == len(self.nodes))

    def _started(self, playbook: str, options: tuple[str, ...]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._words(playbook, options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _outcome(self, status: int, text: str) -> Outcome:
        with (LOG_DIR / "ansible.log").open("a") as log:
            log.write(text)
        changed = {found["name"]: int(found["changed"]) for found in _RECAP.finditer(text)}
        return Outcome(status, text, changed)

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


def guests_of(node: FullNode) -> str:
    """Return the processes that run the node's guests, and since when."""
    return node.run("ps -C qemu-system-x86_64 -o pid=,lstart= || true").strip()


def upgrade_and_back(site: Site, vm: str, directory: Path, there: str) -> None:
    """Run both playbooks under guests and under a client that writes. Raises LabError."""
    guests = {node.name: guests_of(node) for node in site.nodes}
    with ClientWrites(site, vm, directory) as writes:
        for playbook, version in (("upgrade", there), ("rollback", VERSION)):
            began = time.monotonic()
            site.play(playbook, "-e", f"novacron_version={version}").checked()
            print(f"{playbook} of {len(site.nodes)} nodes: {time.monotonic() - began:.0f} s")
            status = site.asked("cluster status")
            assert {replica["version"] for replica in status["replicas"]} == {version}
            agents = site.asked("node ls")["items"]
            assert {n["inventory"]["versions"]["agent"] for n in agents} == {version}
    assert writes.count() > 0
    assert {node.name: guests_of(node) for node in site.nodes} == guests


class ClientWrites:
    """A client that changes one VM's label again and again, and takes no answer but success.

    It is `writers.py`, which repeats what broke or what the API calls retryable, and nothing else.
    """

    def __init__(self, site: Site, vm: str, directory: Path) -> None:
        self._log = directory / "writes"
        ca = directory / "ca.crt"
        ca.write_text(site.keeper.run("cat /etc/novacron/pki/ca.crt"))
        self._order = {
            "urls": site.endpoints,
            "ca": str(ca),
            "token": site.keeper.run("cat /etc/novacron/pki/admin.token").strip(),
            "log": str(self._log),
            "vms": [vm],
        }

    def __enter__(self) -> ClientWrites:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.writers"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._order) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = self._process.poll()
        self._process.communicate(timeout=REST_LIMIT_S)
        if error is None and status is not None:
            raise LabError("the client was answered what no client should be: see its words above")

    def count(self) -> int:
        """Return how many writes were accepted."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return sum(line[4] == 200 for line in lines)
