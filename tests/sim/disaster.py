"""The loss of etcd's data in a small cluster, and the restore of a backup: steps of a story."""

from __future__ import annotations

import itertools
from contextlib import aclosing

from controlplane.backup.format import Key, Reading, Summary
from controlplane.backup.into_etcd import look, refusals, write
from controlplane.backup.restoration import Restoration, make_restoration, new_epoch
from controlplane.backup.take import take
from controlplane.services.cluster import show_cluster
from controlplane.services.views import RestoreView
from controlplane.services.vms import delete_vm
from controlplane.store.etcd_pool import EtcdStore
from shared.ids import IdSource
from tests.sim.bench import ADMIN, Bench
from tests.sim.etcd_link import EtcdLink
from tests.sim.ledger import DeleteAsked, RecordsLost
from tests.sim.process import Process


class Disaster:
    """What an operator does to a bench's cluster, with the product's own code."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._numbers = itertools.count(1)

    async def back_up(self) -> bytes:
        context = self._bench.cluster.context()
        cluster = context.state.cluster()
        assert cluster is not None
        now = context.clock.now()
        making = take(context.store, context.history, cluster, context.version, now)
        async with aclosing(making) as pieces:
            return b"".join([piece async for piece in pieces])

    async def lose_etcd(self) -> None:
        """Every replica dies, and every member's disk with it; agents and guests go on."""
        cluster = self._bench.cluster
        for replica in cluster.replicas.values():
            replica.crash()
        await cluster.etcd.lose_data()
        cluster.observe(RecordsLost())

    async def restore(self, backup: bytes, *, also_awaited: tuple[str, ...] = ()) -> Restoration:
        """Restore into the empty etcd; replicas are not started yet."""
        cluster = self._bench.cluster
        process = Process("replica-1", f"restore.{next(self._numbers)}")
        links = [EtcdLink(cluster.network, process, each) for each in cluster.etcd.members]
        store = EtcdStore(links, cluster.part())
        now = cluster.clock.now()
        summary, items = _read(backup)
        faults = refusals(
            summary.header, await look(store), cluster.founding.cluster, now, replace=False
        )
        assert not list(faults)
        restoration = make_restoration(
            summary.header,
            items,
            new_epoch([summary.header.epoch], now),
            now,
            IdSource(cluster.founding.cluster.cell, cluster.clock, cluster.part()),
            also_awaited,
        )
        await process.spawn(write(store, restoration, process.incarnation), "restore")
        await store.close()
        return restoration

    def start_replicas(self) -> None:
        for replica in self._bench.cluster.replicas.values():
            replica.start()

    async def strike(self, backup: bytes) -> Restoration:
        """Lose etcd, restore at once, and start everything again."""
        await self.lose_etcd()
        restoration = await self.restore(backup)
        self.start_replicas()
        return restoration

    async def until_recovered(self, limit_s: float = 200) -> None:
        await self._bench.until(lambda: self.told() is not None and not self.recovering(), limit_s)

    def told(self) -> bool | None:
        """Return whether the cluster recovers, as the leader has it; None while nobody leads."""
        leading = self._bench.cluster.leading()
        cluster = None if leading is None else leading.state.cluster()
        if cluster is None or cluster.restored is None:
            return None
        return cluster.restored.recovering

    def recovering(self) -> bool:
        return self.told() is not False

    async def status(self) -> RestoreView:
        shown = await show_cluster(self._bench.cluster.context(), ADMIN)
        assert shown.restore is not None
        return shown.restore

    async def delete(self, name: str) -> None:
        """Delete a VM and wait until nothing of it is left."""
        context = self._bench.cluster.context()
        vm_id = context.state.vm_id_by_name("default", name)
        assert vm_id is not None
        self._bench.cluster.observe(DeleteAsked(vm_id))
        await self._bench.ended(await delete_vm(context, ADMIN, name))


def _read(backup: bytes) -> tuple[Summary, list[tuple[str, bytes]]]:
    reading = Reading()
    frames = list(reading.feed(backup))
    items = [(frame.key.decode(), frame.value) for frame in frames if isinstance(frame, Key)]
    return reading.finished(), items
