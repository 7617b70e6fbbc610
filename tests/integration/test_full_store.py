"""etcd without room: told clearly, reads and guests go on, the term lives, and a repair ends it."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.services.views import ClusterView, EventList
from controlplane.store.etcd_grpc import GrpcMember
from controlplane.store.etcd_rpc import DeleteOp, PutOp, Txn, prefix_end
from shared.errors import StoreFull
from shared.model import VmPhase
from tests.contract.store_worlds import CALL_S
from tests.integration.replica_api import Api, Refused, until
from tests.integration.replica_process import ReplicaProcess
from tests.integration.simulated_agent import WitnessNode
from tests.integration.test_two_replicas import follower
from tests.integration.world import SHORT_LEASE, World, new_world

pytestmark = pytest.mark.etcd

QUOTA_BYTES = 8 * 2**20
# What somebody else keeps in the same etcd: nothing that NovaCron could compact away.
FILLER = "/somebody-else/"
MEASURED_S = 0.15
REPAIR = "/api/v1/cluster/actions/repair-store"


async def fill_up(world: World) -> None:
    member = GrpcMember(world.etcd.endpoints[0], None)
    try:
        with pytest.raises(StoreFull):
            await _put_for_ever(member)
    finally:
        await member.close()


async def _put_for_ever(member: GrpcMember) -> None:
    number = 0
    while True:
        number += 1
        await member.txn(Txn((), (PutOp(f"{FILLER}{number}", bytes(2**18)),)), CALL_S)
        # etcd measures its size every 100 ms; faster than that it is filled past its quota.
        await asyncio.sleep(MEASURED_S)


async def remove_filler(world: World) -> None:
    member = GrpcMember(world.etcd.endpoints[0], None)
    try:
        await member.txn(Txn((), (DeleteOp(FILLER, prefix_end(FILLER)),)), CALL_S)
    finally:
        await member.close()


async def room(api: Api) -> str:
    return (await api.get(ClusterView, "/cluster")).store.room


async def test_a_full_store_is_told_harms_no_guest_and_is_repaired() -> None:
    quota = f"--quota-backend-bytes={QUOTA_BYTES}"
    # Told as less than it is: what fills etcd is then still scarce when it is packed well.
    settings = {**SHORT_LEASE, "etcd": {"quota_bytes": QUOTA_BYTES * 3 // 4}}
    async with new_world(settings, etcd_options=(quota,)) as world, world.agent(WitnessNode("n1")):
        api = world.api
        await api.done(await api.create("web"))
        web = await api.vm("web")
        leader = (await api.get(ClusterView, "/cluster")).leader
        await fill_up(world)

        for write in (api.create("db"), api.act("web", "stop"), api.delete("web")):
            with pytest.raises(Refused) as refused:
                await write
            problem = refused.value.problem
            assert (problem.status, problem.code) == (507, "store_full")
            assert "repair-store" in problem.detail

        async def is_told() -> bool:
            return await room(api) == "full"

        await until(is_told, "a replica that says so")
        ready = await api.send("GET", "/readyz")
        assert ready.status_code == 200
        assert {"name": "room", "ok": False}.items() <= ready.json()["checks"][-1].items()
        assert "\nnovacron_store_full 1.0\n" in (await api.send("GET", "/metrics")).text
        assert (await api.send("GET", "/api/v1/vms/web/console-log")).status_code == 200
        assert (await api.vm("web")).status.phase is VmPhase.RUNNING
        # The lease, of 2 s, was renewed all the time.
        assert (await api.get(ClusterView, "/cluster")).leader == leader

        # With all of it still there, room is scarce at best: for what cannot be done without.
        repaired = await api.send("POST", REPAIR)
        assert (repaired.status_code, repaired.json()["store"]["room"]) == (200, "scarce")
        with pytest.raises(Refused) as refused:
            await api.create("db")
        assert "new VMs are refused" in refused.value.problem.detail
        assert world.starts_and_ends(web.id) == (1, 0)
        await api.done(await api.act("web", "stop"))
        await api.done(await api.act("web", "start"))

        await remove_filler(world)
        assert (await api.send("POST", REPAIR)).json()["store"]["room"] == "enough"
        events = (await api.get(EventList, "/events", limit=500)).items
        assert [e.kind for e in events].count("cluster.store_repaired") == 2
        await api.done(await api.delete("web"))
        await api.done(await api.create("db"))
        await world.agrees()


async def test_a_follower_repairs_what_lets_nobody_lead() -> None:
    quota = f"--quota-backend-bytes={QUOTA_BYTES}"
    async with (
        new_world(SHORT_LEASE, etcd_options=(quota,)) as world,
        follower(world) as (second, api),
    ):
        await fill_up(world)
        world.replica.kill()

        async def nobody_leads() -> bool:
            return (await api.get(ClusterView, "/cluster")).leader is None

        await until(nobody_leads, "the end of the lease")
        assert (await api.vms()) == ()
        # Without room there is no lease to lead under.
        await until(lambda: _says(second, "the campaign failed"), "a campaign in vain")
        await remove_filler(world)
        repaired = await api.send("POST", REPAIR)
        assert repaired.status_code == 200, repaired.text
        leader = (await api.get(ClusterView, "/cluster")).leader
        assert leader is not None
        assert leader.replica == "r2"
        await api.create("web", power="stopped")
        world.api = api


async def _says(replica: ReplicaProcess, text: str) -> bool:
    return text in replica.log_text()
