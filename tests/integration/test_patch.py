"""A VM that is changed in place on a real replica: its guest notices nothing."""

from __future__ import annotations

import pytest

from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import World

pytestmark = pytest.mark.etcd


async def test_a_patch_touches_no_running_guest(world: World) -> None:
    async with world.agent(WitnessNode("n1")):
        await world.api.done(await world.api.create("web"))
        vm = await world.api.vm("web")
        patch = {
            "labels": {"tier": "gold"},
            # No node has it: the guest stays where it is all the same.
            "spec": {"placement": {"node_labels": {"zone": "none"}}, "ha": {"priority": 7}},
        }
        headers = {b"If-Match": f'"{vm.revision}"'.encode()}
        changed = await world.api.send("PATCH", "/api/v1/vms/web", patch, headers=headers)
        again = await world.api.send("PATCH", "/api/v1/vms/web", patch, headers=headers)
        assert (changed.status_code, again.status_code) == (200, 412)
        world.replica.kill()
        world.replica.restart()
        await world.agrees()
        assert (await world.api.vm("web")).labels == {"tier": "gold"}
        assert world.starts_and_ends(vm.id) == (1, 0)
