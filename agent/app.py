"""One agent, wired: everything but the ports that differ between production and simulation."""

from __future__ import annotations

import asyncio
import random

from msgspec import Struct

from agent.append_log import AppendLog
from agent.fence import Fence
from agent.hypervisor import Hypervisor
from agent.inventory import NodeFacts
from agent.migration import Migrations
from agent.reconciler import VmReconciler
from agent.relay import Relays
from agent.session import Dial, Joined, Outgoing, Session
from agent.workqueue import WorkQueue
from shared.offload import Offload
from shared.protocol import TelemetryHello


class AgentPorts(Struct, frozen=True):
    """What an agent is given of the world; ``log`` is on its disk, ``offload`` runs its writes."""

    hypervisor: Hypervisor
    relays: Relays
    log: AppendLog
    offload: Offload
    dial: Dial
    rng: random.Random


class Agent:
    def __init__(self, node: NodeFacts, replicas: tuple[str, ...], ports: AgentPorts) -> None:
        self._node = node
        self._joined: Joined | None = None
        self._outgoing = Outgoing()
        self.fence = Fence(ports.log, ports.offload)
        queue = WorkQueue()
        self._migrations = Migrations(
            ports.hypervisor,
            self.fence,
            ports.relays,
            node,
            queue.add,
            self._outgoing.put_progress,
        )
        self.reconciler = VmReconciler(
            ports.hypervisor,
            self.fence,
            node,
            self._outgoing.put,
            self._migrations,
            queue,
            ports.rng,
        )
        self.session = Session(
            replicas,
            ports.dial,
            node,
            ports.hypervisor,
            self.reconciler,
            self.fence,
            self._outgoing,
            ports.rng,
            self._note_joined,
        )

    @property
    def node_id(self) -> str | None:
        """Return the id the control plane gave this node; None until it has joined."""
        return None if self._joined is None else self._joined.node_id

    def telemetry_hello(self) -> TelemetryHello | None:
        if self._joined is None:
            return None
        return TelemetryHello(
            node_name=self._node.name,
            node_id=self._joined.node_id,
            incarnation=self._node.incarnation,
        )

    async def run(self) -> None:
        """Reconcile and stay in session, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.reconciler.run())
                tasks.create_task(self.session.run())
        finally:
            self._migrations.close()

    def _note_joined(self, joined: Joined) -> None:
        self._joined = joined
