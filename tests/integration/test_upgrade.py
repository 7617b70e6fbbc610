"""From 0.1 to this release and past it: who may lead, and what the end of an upgrade waits for."""

from __future__ import annotations

import http
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from controlplane.services.cluster import Readiness
from controlplane.services.views import ClusterView
from controlplane.store import keys
from controlplane.store.port import Committed, Fence, Put
from shared.codec import pack, unpack
from shared.model import SCHEMA_LEVEL, Cluster, LeaderKey
from shared.version import VERSION
from tests import previous_release
from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import BASE, Api, problem_of, until
from tests.integration.replica_process import Cell, ReplicaProcess
from tests.integration.world import SHORT_LEASE, World, new_world

pytestmark = pytest.mark.etcd

FINALIZE = f"{BASE}/cluster/actions/finalize-upgrade"


async def raise_level(world: World, level: int) -> None:
    """Do what a leader of a later release does to end an upgrade, and give its term back."""
    store = world.store()
    try:
        lease = await store.grant_lease(60)
        me = LeaderKey(replica="later", incarnation="1")

        async def wins() -> int:
            leader = (await store.campaign(pack(me), lease)).leader
            return leader.create_revision if leader.lease == lease else 0

        term = await until(wins, "the earlier term to be over")
        mark, found = await store.get(keys.MARK), await store.get(keys.CLUSTER)
        assert mark is not None
        assert found is not None
        raised = replace(unpack(found.value, Cluster), schema_level=level)
        done = await store.commit(
            Fence(term, mark.mod_revision),
            [Put(keys.MARK, mark.value), Put(keys.CLUSTER, pack(raised))],
        )
        assert isinstance(done, Committed)
        await store.revoke_lease(lease)
    finally:
        await store.close()


async def test_a_replica_does_not_lead_a_cluster_above_its_level() -> None:
    async with new_world(SHORT_LEASE) as world:
        await world.api.create("web")
        # It follows while the level is raised, and learns of that by its watch.
        world.replica.stop()
        await raise_level(world, SCHEMA_LEVEL + 1)
        world.replica.resume()
        await until(lambda: _stands_aside(world), "a replica that stands aside")
        # So does one that finds the level when it starts.
        world.replica.terminate()
        world.replica.start()
        await until(lambda: _stands_aside(world), "a replica that stands aside from the start")
        store = world.store()
        try:
            assert await store.get(keys.LEADER) is None
        finally:
            await store.close()
        assert [vm.name for vm in await world.api.vms()] == ["web"]
        assert "not standing for election" in world.replica.log_text()


async def _stands_aside(world: World) -> bool:
    answer = await world.api.send("GET", "/readyz")
    if answer.status_code != http.HTTPStatus.SERVICE_UNAVAILABLE:
        return False
    checks = {c.name: c for c in msgspec.json.decode(answer.content, type=Readiness).checks}
    return not checks["release"].ok and checks["store"].ok


async def test_an_upgrade_from_the_release_before_ends_when_nobody_of_it_is_left(
    tmp_path: Path,
) -> None:
    root = previous_release.unpack(tmp_path)
    old_environment = previous_release.environment(root)
    with EtcdCluster() as etcd, Cell(etcd.endpoints) as cell:
        old = ReplicaProcess(cell, "r1", SHORT_LEASE, environment=old_environment)
        new = ReplicaProcess(cell, "r2", SHORT_LEASE, leads=False)
        with old, new:
            async with Api(new.api_url, cell, cell.token) as api:
                await _upgrade(old, api)


async def _upgrade(old: ReplicaProcess, api: Api) -> None:
    async def sees_both() -> ClusterView | None:
        seen = await api.get(ClusterView, "/cluster")
        return seen if len(seen.replicas) == 2 else None

    seen = await until(sees_both, "a replica of this release beside one of the release before")
    assert (seen.schema_level, seen.upgrade_pending) == (SCHEMA_LEVEL - 1, True)
    assert [blocker.pointer for blocker in seen.upgrade_blockers] == ["/replicas/r1"]

    old.kill()

    async def leads() -> bool:
        return (await api.send("GET", "/readyz")).status_code == http.HTTPStatus.OK

    await until(leads, "the replica of this release to lead")
    refused = await api.send("POST", FINALIZE)
    problem = problem_of(refused)
    assert (problem.status, problem.code) == (409, "upgrade_blocked")
    assert [error.pointer for error in problem.errors] == ["/replicas/r1"]

    async def finalized() -> ClusterView | None:
        answer = await api.send("POST", FINALIZE)
        if answer.status_code != http.HTTPStatus.OK:
            return None
        return msgspec.json.decode(answer.content, type=ClusterView)

    # Its registration outlives the replica for a while.
    done = await until(finalized, "the end of the upgrade")
    assert (done.version, done.schema_level) == (VERSION, SCHEMA_LEVEL)
    assert not done.upgrade_pending
