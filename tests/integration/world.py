"""One etcd, one cell, one replica and its API, with as many simulated nodes as a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from agent.app import Agent
from agent.hypervisor import volume_name
from controlplane.services.views import VmView
from controlplane.store.etcd_pool import EtcdStore, connect
from shared.model import NodeState, VmPhase
from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import Api, until
from tests.integration.replica_process import Cell, ReplicaProcess, Settings
from tests.integration.simulated_agent import WitnessNode, simulated_agent

# Far longer than a test waits for anything: whoever took over within a test did not wait for it.
LONG_LEASE: Settings = {"election": {"lease_ttl_s": 120}}
# As short as etcd grants leases.
SHORT_LEASE: Settings = {
    "election": {"lease_ttl_s": 2, "renew_period_s": 0.3, "suspend_after_s": 1.0}
}


class World:
    def __init__(self, etcd: EtcdCluster, cell: Cell, replica: ReplicaProcess, api: Api) -> None:
        self.etcd = etcd
        self.cell = cell
        self.replica = replica
        self.api = api
        self.nodes: list[WitnessNode] = []

    def store(self) -> EtcdStore:
        """Return a client of etcd; whoever asks for it closes it."""
        return connect(self.etcd.endpoints, None)

    @asynccontextmanager
    async def agent(
        self,
        node: WitnessNode,
        replicas: Sequence[str] = (),
        *,
        telemetry: bool = True,
    ) -> AsyncIterator[Agent]:
        """Run an agent of ``node``, from when the node is ready until the context is left."""
        if node not in self.nodes:
            self.nodes.append(node)
        addresses = replicas or (self.replica.agents_address,)
        tls = self.cell.node_tls(node.name)
        state_dir = self.cell.directory / "agents" / node.name
        async with simulated_agent(node, tls, addresses, state_dir, telemetry=telemetry) as agent:
            await self.node_is(node, NodeState.READY)
            yield agent

    async def node_is(self, node: WitnessNode, state: NodeState) -> None:
        """Return once the control plane says so."""

        async def look() -> bool:
            return (await self.api.node(node.name)).state is state

        await until(look, f"node {node.name} {state.value}")

    async def vm_is(self, name: str, phase: VmPhase) -> VmView:
        """Return the VM once it is in a phase."""

        async def look() -> VmView | None:
            vm = await self.api.vm(name)
            return vm if vm.status.phase is phase else None

        return await until(look, f"{name} {phase.value}")

    async def agrees(self) -> None:
        """Return once every VM runs, and the nodes hold exactly what the records say."""

        async def look() -> bool:
            vms = await self.api.vms()
            wanted = {vm.id: vm.status.generation for vm in vms}
            running = {name: g for node in self.nodes for name, g in node.generations().items()}
            defined = {name for node in self.nodes for name in node.domains}
            volumes = {name for node in self.nodes for name in node.volumes()}
            return (
                all(vm.status.phase is VmPhase.RUNNING for vm in vms)
                and running == wanted
                and defined == set(wanted)
                and volumes == {volume_name(vm.id, d.name) for vm in vms for d in vm.spec.disks}
            )

        await until(look, "records and nodes that agree")

    def starts_and_ends(self, vm_id: str) -> tuple[int, int]:
        """Return how often the VM's guest was started and how often it ended, on all nodes."""
        return (
            sum(node.starts[vm_id] for node in self.nodes),
            sum(node.ends[vm_id] for node in self.nodes),
        )


@asynccontextmanager
async def new_world(
    settings: Settings | None = None, *, etcd_options: tuple[str, ...] = ()
) -> AsyncIterator[World]:
    """Start everything; all of it is gone when the context is left."""
    async with AsyncExitStack() as stack:
        etcd = await stack.enter_async_context(EtcdCluster(options=etcd_options))
        cell = stack.enter_context(Cell(etcd.endpoints))
        replica = stack.enter_context(ReplicaProcess(cell, settings=settings))
        api = await stack.enter_async_context(Api(replica.api_url, cell, cell.token))
        yield World(etcd, cell, replica, api)
