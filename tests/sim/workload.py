"""What users and guests do: operations through the services, as the API calls them, and surprises.

A client tries again where the API says so, on whatever replica leads, and keeps apart what was
accepted, what was refused and what nobody can know. It tells the judge before it asks for a
deletion, and when an operation was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from controlplane.commands.migrations import MOVABLE_PHASES
from controlplane.services.context import Context, Permission, Principal, Scope
from controlplane.services.drains import drain_node
from controlplane.services.migrations import migrate_vm
from controlplane.services.nodes import set_cordon
from controlplane.services.operations import cancel_operation, get_operation
from controlplane.services.requests import CordonOrder, DrainOrder, MigrateOrder, NewVm
from controlplane.services.views import OperationView
from controlplane.services.vms import act_on_vm, create_vm, delete_vm
from shared.errors import NotFound, NovacronError, OutcomeUnknown, Unavailable
from shared.model import BootSpec, DiskSpec, MigrationSpec, Power, VmSpec
from shared.states import OPERATION_ENDS, VmAction, vm_phase
from tests.sim.cluster import SimCluster
from tests.sim.ledger import Acknowledged, DeleteAsked, Ledger
from tests.sim.node import SHARED_POOL

# How long a client goes on trying, and how long it follows what was accepted.
PATIENCE_S = 30.0
FOLLOW_S = 40.0
CLIENTS = 4
# More VMs than this would not fit on the nodes, and creates would wait for ever.
VMS_MAX = 8

ANYWHERE = MigrateOrder()
T = TypeVar("T")
Work = Callable[[Context, Principal], Awaitable[OperationView]]

_ACTIONS: tuple[VmAction, ...] = (
    VmAction.START,
    VmAction.START,
    VmAction.STOP,
    VmAction.SHUTDOWN,
    VmAction.REBOOT,
    VmAction.RESET,
    VmAction.PAUSE,
    VmAction.RESUME,
    VmAction.RESUME,
)


class Client:
    """One user with the admin role; ``outcomes`` counts how its calls ended."""

    def __init__(self, cluster: SimCluster, ledger: Ledger, rng: random.Random) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._rng = rng
        self._principal = Principal("user", frozenset(Permission), Scope())
        self.outcomes: Counter[str] = Counter()

    async def create(self, name: str, spec: VmSpec) -> None:
        new = NewVm(name=name, spec=spec)
        await self._ask("create", lambda context, who: create_vm(context, who, new))

    async def act(self, vm_id: str, action: VmAction) -> None:
        deadline_s = self._rng.choice((0.0, 2.0, 10.0))
        await self._ask(
            action.value, lambda context, who: act_on_vm(context, who, vm_id, action, deadline_s)
        )

    async def migrate(self, vm_id: str) -> None:
        await self._ask("migrate", lambda context, who: migrate_vm(context, who, vm_id, ANYWHERE))

    async def drain(self, node_name: str) -> None:
        await self._ask(
            "drain", lambda context, who: drain_node(context, who, node_name, DrainOrder())
        )

    async def cancel(self, operation_id: str) -> None:
        await self._ask("cancel", lambda context, who: cancel_operation(context, who, operation_id))

    async def uncordon(self, node_name: str) -> None:
        """Open a node again; one that is open, or is being drained, says so."""

        async def uncordon(context: Context, who: Principal) -> None:
            await set_cordon(context, who, node_name, CordonOrder(), cordoned=False)

        with contextlib.suppress(NovacronError):
            await self._patiently(uncordon)

    async def delete(self, vm_id: str) -> None:
        self._cluster.observe(DeleteAsked(vm_id))
        await self._ask("delete", lambda context, who: delete_vm(context, who, vm_id))

    async def _ask(self, verb: str, work: Work) -> None:
        try:
            operation = await self._patiently(work)
        except NovacronError as error:
            self.outcomes[f"{verb} {error.code}"] += 1
            self._cluster.trace.note(f"client: {verb}: {error.code}")
            return
        self._cluster.observe(Acknowledged(operation.id, operation.target))
        self.outcomes[f"{verb} {await self._follow(operation)}"] += 1

    async def _patiently(self, work: Callable[[Context, Principal], Awaitable[T]]) -> T:
        """Try until there is an answer that says more than "later". Raises what then remains."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + PATIENCE_S
        while True:
            try:
                return await self._once(work)
            except Unavailable:
                if loop.time() >= end_s:
                    raise
            await asyncio.sleep(self._rng.uniform(0.05, 1.0))

    async def _follow(self, operation: OperationView) -> str:
        """Wait for the end as ``?wait`` does; whoever cannot tell any more is not asked again."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + FOLLOW_S
        while loop.time() < end_s:
            try:
                seen = await self._once(
                    lambda context, who: get_operation(context, who, operation.id, 10.0)
                )
            except (Unavailable, OutcomeUnknown, NotFound):
                await asyncio.sleep(1.0)
                continue
            if seen.state in OPERATION_ENDS:
                return seen.state.value
        return "open"

    async def _once(self, work: Callable[[Context, Principal], Awaitable[T]]) -> T:
        """Call a replica; one that dies meanwhile leaves the outcome unknown."""
        chosen = self._rng.choice(list(self._cluster.replicas.values()))
        process, control_plane = chosen.process, chosen.control_plane
        if process is None or control_plane is None:
            raise Unavailable(f"{chosen.name} does not accept connections")

        async def serve() -> T:
            return await work(control_plane.context(), self._principal)

        call = process.spawn(serve(), f"{chosen.name}-request")
        await asyncio.wait({call})
        if call.cancelled():
            raise OutcomeUnknown("the connection broke before the answer")
        return call.result()


class Workload:
    """``operations`` operations of several clients, spread over ``duration_s``."""

    def __init__(
        self,
        cluster: SimCluster,
        ledger: Ledger,
        rng: random.Random,
        *,
        operations: int,
        duration_s: float,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._rng = rng
        self._operations = operations
        self._duration_s = duration_s
        self._made = 0
        self.client = Client(cluster, ledger, random.Random(rng.getrandbits(64)))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._use(self._operations // CLIENTS))

    async def delete_what_does_not_fit(self) -> None:
        """As a user would in the end: VMs that wait for room are given up."""
        for vm in list(self._ledger.vms.values()):
            waits = any(c.type == "Placed" and not c.status for c in vm.status.conditions)
            if waits and not vm.deleting:
                await self.client.delete(vm.id)

    async def _use(self, operations: int) -> None:
        pause_s = 2 * self._duration_s / operations
        for _ in range(operations):
            await asyncio.sleep(self._rng.uniform(0, pause_s))
            await self._one()

    async def _one(self) -> None:
        vms = sorted(self._ledger.vms)
        draw = self._rng.random()
        if not vms or (draw < 0.4 and len(vms) < VMS_MAX):
            self._made += 1
            await self.client.create(f"vm-{self._made}", self._spec())
        elif draw < 0.5:
            await self.client.delete(self._rng.choice(vms))
        elif draw < 0.58:
            self._surprise()
        elif draw < 0.78:
            await self.client.migrate(self._rng.choice(vms))
        elif draw < 0.84:
            await self.drain_one()
        elif draw < 0.88:
            await self._cancel()
        else:
            await self.client.act(self._rng.choice(vms), self._rng.choice(_ACTIONS))

    async def migrate_one(self) -> None:
        """Move a VM that runs, if there is one."""
        running = [vm.id for vm in self._ledger.vms.values() if vm_phase(vm) in MOVABLE_PHASES]
        if running:
            await self.client.migrate(self._rng.choice(sorted(running)))

    async def drain_one(self) -> None:
        """Drain a node, and open it again some time later, however the drain went."""
        node_name = self._rng.choice(list(self._cluster.nodes))
        await self.client.drain(node_name)
        await self.client.uncordon(node_name)

    async def _cancel(self) -> None:
        sagas = [op.id for op in self._ledger.operations.values() if op.saga is not None]
        if sagas:
            await self.client.cancel(self._rng.choice(sorted(sagas)))

    def _spec(self) -> VmSpec:
        pools = self._rng.choice(((), ("default",), (SHARED_POOL,), ("default", SHARED_POOL)))
        disks = tuple(DiskSpec(name=f"d{i}", size_gib=1, pool=p) for i, p in enumerate(pools))
        strict = self._rng.random() < 0.3
        ends = self._rng.choice(("", "", "", "nova.exit=poweroff@20", "nova.exit=reboot@5"))
        return VmSpec(
            vcpus=self._rng.choice((1, 2)),
            memory_mib=self._rng.choice((512, 1024, 2048)),
            boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline=ends),
            disks=disks,
            migration=MigrationSpec(strict=strict),
            power=self._rng.choice((Power.RUNNING,) * 8 + (Power.PAUSED,)),
        )

    def _surprise(self) -> None:
        """A guest ends by itself, somewhere."""
        running = [
            (node, name)
            for node in self._cluster.nodes.values()
            for name, domain in sorted(node.state.domains.items())
            if domain.is_active()
        ]
        if not running:
            return
        node, name = self._rng.choice(running)
        crashes = self._rng.random() < 0.5
        self._cluster.trace.note(f"guest {name} {'crashes' if crashes else 'powers off'}")
        (node.state.guest_crashes if crashes else node.state.guest_powers_off)(name)
