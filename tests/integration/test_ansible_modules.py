"""The collection's modules and its inventory against a real replica, as playbooks use them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.model import Power, VmPhase
from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import World

pytestmark = pytest.mark.etcd

REPOSITORY = Path(__file__).parents[2]
SPEC = {"vcpus": 1, "memory_mib": 256, "boot": {"kernel": "tiny-kernel", "initrd": "tiny-initrd"}}
LIMIT_S = 120.0


class Ansible:
    """Runs modules on this machine; ``world`` is what they talk to."""

    def __init__(self, world: World, directory: Path) -> None:
        self._directory = directory
        (directory / "ansible.cfg").touch()
        place = directory / "ansible_collections" / "novacron"
        place.mkdir(parents=True)
        (place / "cluster").symlink_to(REPOSITORY / "ansible")
        self._environment = os.environ | {
            "ANSIBLE_COLLECTIONS_PATH": str(directory),
            "ANSIBLE_CONFIG": str(directory / "ansible.cfg"),
            "ANSIBLE_HOME": str(directory / "home"),
            "ANSIBLE_LOCALHOST_WARNING": "False",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "False",
            "ANSIBLE_NOCOLOR": "True",
            "LC_ALL": "C.UTF-8",
            "NOVACRON_ENDPOINT": world.replica.api_url,
            "NOVACRON_CA": str(world.cell.files.ca_file),
            "NOVACRON_TOKEN": world.cell.token,
        }

    async def run(self, module: str, arguments: dict[str, Any], *options: str) -> dict[str, Any]:
        """Return a module's result, also of one that failed (``failed`` is True then).

        ``said`` is all that was printed, with the differences before the result.
        """
        said = await self._said(
            "ansible",
            *("localhost", "-m", f"novacron.cluster.{module}", "-a", json.dumps(arguments)),
            *("-e", f"ansible_python_interpreter={sys.executable}", *options),
        )
        result: dict[str, Any] = json.loads(said[said.index("=> {") + 3 :])
        return {"said": said, "failed": "FAILED! =>" in said, **result}

    async def inventory(self, text: str) -> dict[str, Any]:
        file = self._directory / "cell.novacron.yml"
        file.write_text(text)
        said = await self._said("ansible-inventory", "--inventory", str(file), "--list")
        listed: dict[str, Any] = json.loads(said, object_hook=_plain)
        return listed

    async def _said(self, program: str, *words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name(program)),
            *words,
            env=self._environment,
            cwd=self._directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(LIMIT_S):
            said, _ = await process.communicate()
        return said.decode()


def _plain(found: dict[str, Any]) -> Any:
    """Take off what Ansible marks text with that did not come from its own files."""
    return found.get("__ansible_unsafe", found)


@pytest.fixture
async def ansible(world: World, tmp_path: Path) -> AsyncIterator[Ansible]:
    async with world.agent(WitnessNode("n1")), world.agent(WitnessNode("n2")):
        yield Ansible(world, tmp_path)


async def test_a_vm_becomes_what_is_wanted_and_then_nothing_changes(
    world: World, ansible: Ansible
) -> None:
    wanted: dict[str, Any] = {"name": "web", "spec": SPEC, "labels": {"tier": "gold"}}

    planned = await ansible.run("novacron_vm", wanted, "--check", "--diff")
    assert (planned["changed"], planned["vm"]) == (True, None)
    assert planned["plan"]["blocked"] == 0
    assert await world.api.vms() == ()

    made = await ansible.run("novacron_vm", wanted)
    assert made["changed"]
    assert made["vm"]["status"]["phase"] == VmPhase.RUNNING
    again = await ansible.run("novacron_vm", wanted)
    assert not again["changed"]

    other: dict[str, Any] = {**wanted, "labels": {"zone": "a"}, "state": "stopped"}
    other["spec"] = {**SPEC, "ha": {"priority": 7}}
    planned = await ansible.run("novacron_vm", other, "--check", "--diff")
    assert planned["changed"]
    assert '-        "tier": "gold"' in planned["said"]
    assert '+    "power": "stopped"' in planned["said"]
    assert (await world.api.vm("web")).spec.power is Power.RUNNING
    assert (await ansible.run("novacron_vm", other))["changed"]
    vm = await world.api.vm("web")
    assert (vm.labels, vm.spec.ha.priority) == ({"zone": "a"}, 7)
    assert (vm.status.phase, vm.spec.power) == (VmPhase.STOPPED, Power.STOPPED)
    assert not (await ansible.run("novacron_vm", other))["changed"]

    gone = {"name": "web", "state": "absent"}
    assert (await ansible.run("novacron_vm", gone, "--check"))["changed"]
    assert (await ansible.run("novacron_vm", gone))["changed"]
    assert not (await ansible.run("novacron_vm", gone))["changed"]
    assert await world.api.vms() == ()


async def test_what_cannot_be_is_told_and_changes_nothing(world: World, ansible: Ansible) -> None:
    await world.api.done(await world.api.create("web"))
    before = await world.api.vm("web")

    larger = await ansible.run("novacron_vm", {"name": "web", "spec": {"vcpus": 64}})
    assert larger["failed"]
    assert "another vcpus, which cannot be changed" in larger["msg"]
    bad = await ansible.run("novacron_vm", {"name": "db", "spec": {**SPEC, "vcpus": 0, "typo": 1}})
    assert "/spec/vcpus" in bad["msg"]
    assert "/spec/typo" in bad["msg"]
    nothing = await ansible.run("novacron_vm", {"name": "db"})
    assert "no spec to make one" in nothing["msg"]
    stranger = await ansible.run("novacron_vm", {"name": "db", "spec": SPEC, "token": "nck_a_b"})
    assert "not valid" in stranger["msg"]
    assert [vm.name for vm in await world.api.vms()] == ["web"]
    assert await world.api.vm("web") == before


async def test_a_node_is_drained_and_taken_back(world: World, ansible: Ansible) -> None:
    await world.api.done(await world.api.create("web"))
    name = (await world.api.node((await world.api.vm("web")).status.node or "")).name
    # Simulated nodes of this world send each other no guests.
    drained = {"name": name, "state": "drained", "reason": "new memory", "skip": ["web"]}

    planned = await ansible.run("novacron_node", drained, "--check", "--diff")
    assert planned["changed"]
    assert planned["plan"]
    assert '-    "cordoned": false' in planned["said"]
    assert not (await world.api.node(name)).cordoned
    done = await ansible.run("novacron_node", drained)
    assert done["changed"], done["said"]
    node = await world.api.node(name)
    assert (node.cordoned, node.cordon_reason, node.allocated.vms) == (True, "new memory", 1)
    assert not (await ansible.run("novacron_node", drained))["changed"]

    back = {"name": name, "state": "uncordoned"}
    assert (await ansible.run("novacron_node", back))["changed"]
    assert not (await ansible.run("novacron_node", back))["changed"]
    ready = await ansible.run("novacron_node", {"name": name, "state": "ready"})
    assert (ready["changed"], ready["node"]["state"]) == (False, "ready")
    missing = await ansible.run("novacron_node", {"name": "n9"})
    assert "no node 'n9'" in missing["msg"]


async def test_vms_are_an_inventory(world: World, ansible: Ansible) -> None:
    await world.api.done(await world.api.create("web"))
    await world.api.done(await world.api.create("idle", power="stopped"))
    node = (await world.api.node((await world.api.vm("web")).status.node or "")).name

    listed = await ansible.inventory(
        "plugin: novacron.cluster.vms\nkeyed_groups: [{key: novacron_node, prefix: node}]\n"
    )

    assert list(listed["_meta"]["hostvars"]) == ["web"]
    assert listed["_meta"]["hostvars"]["web"]["novacron_phase"] == VmPhase.RUNNING
    assert listed[f"node_{node}"]["hosts"] == ["web"]
    everything = await ansible.inventory("plugin: novacron.cluster.vms\nphases: []\n")
    assert sorted(everything["_meta"]["hostvars"]) == ["idle", "web"]
