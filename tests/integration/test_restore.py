"""A real replica loses its real etcd: `novacron cluster backup` and `restore`, end to end."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import tomli_w
from msgspec import Struct

from controlplane.services.views import ClusterView, EventList
from shared.model import NodeState, VmPhase
from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import BASE, until
from tests.integration.replica_process import ROOT
from tests.integration.simulated_agent import WitnessNode
from tests.integration.world import SHORT_LEASE, World, new_world

pytestmark = pytest.mark.etcd

DISK = [{"name": "root", "size_gib": 1}]


class Ran(Struct, frozen=True):
    code: int
    out: str
    told: str


async def novacron(world: World, *arguments: str) -> Ran:
    """Run the command as a process of its own, as an operator does."""
    environ = {
        "HOME": str(world.cell.directory),
        "PATH": os.environ["PATH"],
        "NOVACRON_ENDPOINT": world.replica.api_url,
        "NOVACRON_CA": str(world.cell.files.ca_file),
        "NOVACRON_TOKEN": world.cell.token,
    }
    # What names the command's context is no setting of a replica's.
    if arguments[:2] == ("cluster", "restore"):
        environ = {name: environ[name] for name in ("HOME", "PATH")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "controlplane.cli.main", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environ,
    )
    out, told = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), told.decode())


async def restore(world: World, backup: Path, *options: str) -> Ran:
    config = ("--config", str(world.replica.config_file))
    return await novacron(world, "cluster", "restore", str(backup), *config, *options)


@asynccontextmanager
async def another_etcd(world: World) -> AsyncIterator[None]:
    """Give the replica, which is stopped, a new and empty etcd."""
    async with EtcdCluster() as etcd:
        config = world.replica._config({"etcd": {"endpoints": list(etcd.endpoints)}})
        world.replica.config_file.write_text(tomli_w.dumps({**config, **SHORT_LEASE}))
        yield


async def recovered(world: World) -> ClusterView:
    async def look() -> ClusterView | None:
        seen = await world.api.get(ClusterView, "/cluster")
        done = seen.restore is not None and not seen.restore.recovering
        return seen if done else None

    return await until(look, "the end of the recovery")


async def test_a_lost_etcd_is_restored_while_guests_run_on(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(new_world(SHORT_LEASE))
        nodes = [WitnessNode("n1"), WitnessNode("n2")]
        for node in nodes:
            await stack.enter_async_context(world.agent(node, telemetry=False))
        for name in ("stays", "goes"):
            await world.api.done(await world.api.create(name, disks=DISK))
        backup = tmp_path / "cell.backup"

        taken = await novacron(world, "cluster", "backup", str(backup))
        assert (taken.code, taken.out) == (0, f"{backup}\n"), taken
        assert "not in it" in taken.told
        assert stat.S_IMODE(backup.stat().st_mode) == 0o600

        await world.api.done(await world.api.delete("goes"))
        new = await world.api.done(await world.api.create("new", disks=DISK))
        before = {node.name: node.generations() for node in nodes}
        await refused_while_a_replica_runs(world, backup)

        assert world.replica.terminate() == 0
        await stack.enter_async_context(another_etcd(world))
        await refused_when_damaged(world, backup)
        first = await restore(world, backup, "--yes")
        assert first.code == 0, first
        assert "nothing is started, bound or moved before" in first.told
        done = await restored_once_more(world, backup)
        assert int(done.out) > int(first.out)
        world.replica.restart()
        seen = await recovered(world)
        assert seen.epoch == int(done.out)
        assert seen.restore is not None
        assert (seen.restore.unproven, seen.restore.unrecorded) == (0, 1)

        assert {node.name: node.generations() for node in nodes} == before
        assert sum(node.ends[new.target] for node in nodes) == 0
        await world.vm_is("stays", VmPhase.RUNNING)
        assert (await world.vm_is("goes", VmPhase.STOPPED)).status.conditions
        for node in nodes:
            await world.node_is(node, NodeState.READY)
        assert {vm.name for vm in await world.api.vms()} == {"stays", "goes"}
        told = await novacron(world, "cluster", "status")
        assert "1 VMs that no record is of" in told.out
        await history_goes_on(world)
        await world.api.done(await world.api.create("later", disks=DISK))


async def refused_while_a_replica_runs(world: World, backup: Path) -> None:
    refused = await restore(world, backup, "--yes")
    assert refused.code == 1
    for pointer in ("/data_dir", "/etcd/leader", "/etcd/replicas/r1", "/etcd:"):
        assert pointer in refused.told, refused
    assert len(await world.api.vms()) == 2


def damaged(backup: Path) -> Path:
    data = bytearray(backup.read_bytes())
    data[len(data) // 2] ^= 1
    broken = backup.with_suffix(".broken")
    broken.write_bytes(data)
    return broken


async def refused_when_damaged(world: World, backup: Path) -> None:
    refused = await restore(world, damaged(backup), "--yes")
    assert refused.code == 1
    assert "/file" in refused.told
    asked = await restore(world, backup)
    assert asked.code == 2, "nobody can answer"
    missing = await restore(world, backup.with_suffix(".missing"), "--yes")
    assert "unreadable" in missing.told


async def history_goes_on(world: World) -> None:
    """What the copy had is there, what happened after the backup, too, and the restore."""
    assert set(await kinds(world, "cluster.*")) >= {
        "cluster.made",
        "cluster.restored",
        "cluster.recovered",
    }
    assert await kinds(world, "vm.deleted") == ["vm.deleted"]


async def kinds(world: World, term: str) -> list[str]:
    """Return the kinds of the events that a term stands for, oldest first."""
    answer = await world.api.send("GET", f"{BASE}/events", kind=term)
    return [event.kind for event in msgspec.json.decode(answer.content, type=EventList).items]


async def restored_once_more(world: World, backup: Path) -> Ran:
    """Restore the same file again, over the cluster that it has become."""
    refused = await restore(world, backup, "--yes")
    assert refused.code == 1
    assert "--replace deletes them" in refused.told
    done = await restore(world, backup, "--yes", "--replace")
    assert done.code == 0, done
    return done
