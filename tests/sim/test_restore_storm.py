"""Restores after everything that can have happened since the backup, seed by seed.

Users create, delete, move, stop and drain; nodes fall; etcd is lost at any moment of that and a
backup of earlier restored at any moment after. Judged at every step, and by what becomes of guests.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from shared.model import Vm, VmPhase
from shared.states import vm_phase
from tests.sim.bench import Bench
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.disaster import Disaster
from tests.sim.invariants import Violation, everything_settles
from tests.sim.ledger import SimEvent
from tests.sim.node import SimNode
from tests.sim.process import adopt_by_context
from tests.sim.virtual_loop import run_virtual
from tests.sim.workload import Workload

SEEDS_ALWAYS, SEEDS_LONG = 15, 200
# What stands at last that no record is of, or that nobody can decide on, is a person's.
STRAYS = ("stray domain", "stray volume")


class Storm(Bench):
    """A cluster under one seed, its violations, and the guests that nothing but a fault may end."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.violations: list[str] = []
        self.excused: set[str] = set()
        shape = ClusterSettings(
            nodes=3, replicas=self.rng.choice((1, 3)), node_cpus=4, node_memory_mib=8192
        )
        self.cluster = SimCluster(shape, random.Random(seed), observe=self._judge)
        self.disaster = Disaster(self)

    def _judge(self, event: SimEvent) -> None:
        try:
            self.judge.take(event)
        except Violation as violation:
            self.violations.append(str(violation))

    def guests(self) -> dict[str, dict[str, int]]:
        """Return where each VM's guest is, by node and generation."""
        found: dict[str, dict[str, int]] = {}
        for node in self.cluster.nodes.values():
            for vm_id, generation in node.found().running.items():
                found.setdefault(vm_id, {})[node.name] = generation
        return found

    async def use(self, operations: int, duration_s: float) -> None:
        workload = Workload(
            self.cluster,
            self.judge.ledger,
            self.cluster.part(),
            operations=operations,
            duration_s=duration_s,
        )
        await workload.run()

    async def pause(self, up_to_s: float) -> None:
        await asyncio.sleep(self.rng.uniform(0, up_to_s))

    async def backed_up(self) -> bytes:
        while True:
            try:
                return await self.disaster.back_up()
            except Exception:
                await asyncio.sleep(1)

    def strike_a_node(self) -> None:
        """Let something happen to a node that ends no guest, or all of its guests."""
        node: SimNode = self.rng.choice(list(self.cluster.nodes.values()))
        draw = self.rng.random()
        if draw < 0.4:
            node.crash_agent()
        elif draw < 0.7:
            node.libvirtd.go_away()
        elif node.powered:
            self.excused |= set(node.found().defined)
            node.lose_power()

    def heal(self) -> None:
        for node in self.cluster.nodes.values():
            node.libvirtd.come_back()
            if not node.powered:
                node.boot()
            elif node.process is None:
                node.start_agent()

    async def heal_some(self) -> None:
        """Nodes and replicas come and go while the cluster recovers."""
        for _ in range(self.rng.randrange(4)):
            await self.pause(15)
            if self.rng.random() < 0.3:
                self.restart_a_replica()
            elif self.rng.random() < 0.5:
                self.strike_a_node()
            else:
                self.heal()

    def restart_a_replica(self) -> None:
        replica = self.rng.choice(list(self.cluster.replicas.values()))
        replica.crash()
        replica.start()


async def story(it: Storm) -> None:
    await it.cluster.start()
    await it.cluster.until_ready()
    users = asyncio.create_task(it.use(30, 120))
    await asyncio.sleep(5)
    await it.pause(50)
    backup = await it.backed_up()
    await it.pause(60)
    if it.rng.random() < 0.5:
        it.strike_a_node()
        await it.pause(20)
    await it.disaster.lose_etcd()
    users.cancel()
    await asyncio.gather(users, return_exceptions=True)
    await it.pause(60)
    await it.disaster.restore(backup)
    # Until now agents may have gone on with what they had been told.
    before = it.guests()
    it.disaster.start_replicas()
    await it.heal_some()
    it.heal()
    await it.disaster.until_recovered(400)
    await asyncio.sleep(60)
    check(it, before)
    await it.use(12, 60)
    await it.until(lambda: not unsettled(it), 900, look_s=5)


def check(it: Storm, before: dict[str, dict[str, int]]) -> None:
    """Complain about guests that the disaster has cost."""
    vms, now, wanted = it.judge.ledger.vms, it.guests(), it.judge.ledger.ends_wanted_earlier
    for vm_id, where in before.items():
        vm = vms.get(vm_id)
        deleted = vm is not None and vm.deleting
        # Somebody had asked for its end, and an agent that had not heard of the restore yet did it.
        asked = any((vm_id, generation) in wanted for generation in where.values())
        if deleted or asked or vm_id in it.excused:
            continue
        if vm_id not in now and not ended_by_itself(it, vm_id):
            it.violations.append(f"{vm_id} ran before and runs no more: {vm}")
        if vm is None and now.get(vm_id) is None and not ended_by_itself(it, vm_id):
            it.violations.append(f"{vm_id}, of which no record is, was lost")
    for vm_id, vm in vms.items():
        if vm.status.unproven is not None and vm_phase(vm) is not VmPhase.UNKNOWN:
            it.violations.append(f"{vm_id} is unproven and {vm_phase(vm)}")


def ended_by_itself(it: Storm, vm_id: str) -> bool:
    """Whether a guest was told to power off by its own command line, or was to be stopped."""
    vm = it.judge.ledger.vms.get(vm_id)
    for node in it.cluster.nodes.values():
        domain = node.state.domains.get(vm_id)
        if domain is not None and domain.spec is not None and domain.spec.boot.cmdline:
            return True
    return vm is not None and bool(vm.spec.boot.cmdline)


def unsettled(it: Storm) -> list[str]:
    found = [node.found() for node in it.cluster.nodes.values()]
    left = [*STRAYS, *(vm.name + " " for vm in it.judge.ledger.vms.values() if is_beyond_help(vm))]
    return [
        complaint
        for complaint in everything_settles(it.judge.ledger, found)
        if not any(each in complaint for each in left)
    ]


def is_beyond_help(vm: Vm) -> bool:
    """Whether only a person can help: it was deleted after the backup, or nobody can decide."""
    fault = vm.status.fault
    return vm.status.unproven is not None or (fault is not None and fault.code == "disk_missing")


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed < SEEDS_ALWAYS else pytest.mark.long)
        for seed in range(SEEDS_LONG)
    ],
)
def test_no_guest_is_lost_or_doubled_by_a_restore(seed: int) -> None:
    async def main() -> None:
        it = Storm(seed)
        loop = asyncio.get_running_loop()

        def failed(_: Any, context: dict[str, Any]) -> None:
            it.violations.append(f"{context['message']}: {context.get('exception')!r}")

        loop.set_exception_handler(failed)
        try:
            await story(it)
        except TimeoutError:
            it.violations.append(f"never at rest: {unsettled(it)}, {await status_of(it)}")
        finally:
            for node in it.cluster.nodes.values():
                node.crash_agent()
            for replica in it.cluster.replicas.values():
                replica.crash()
            await it.cluster.stop()
        assert it.violations == []

    run_virtual(main(), adopt_by_context)


async def status_of(it: Storm) -> object:
    return None if it.cluster.leading() is None else await it.disaster.status()
