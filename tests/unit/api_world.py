"""A replica's API over a cluster in memory: real services, commands and history, no etcd.

``submit`` decides a command on a draft and applies it, as the leader's applier does.
"""

from __future__ import annotations

import functools
import random
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

import httpx2
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from controlplane.api.app import build_app
from controlplane.commands.attempts import BindVm, ObserveVm, PermitStart
from controlplane.commands.cluster import MakeCluster
from controlplane.commands.draft import Author, Command, Draft
from controlplane.commands.nodes import JoinNode, SetNodeState
from controlplane.issuer import Issuer, Trust
from controlplane.pki import make_authority, new_key
from controlplane.scheduler.request import SchedulerSettings
from controlplane.services.context import Context, Leadership
from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.applier import take_writes
from controlplane.store.history import History
from controlplane.store.port import KeyValue, Listing, MemberStatus, Room, Store
from controlplane.store.space import Repaired
from controlplane.telemetry.exporter import Metrics
from controlplane.telemetry.progress import ProgressBoard
from controlplane.telemetry.windows import Windows
from controlplane.tokens import Token, digest
from shared.clock import SystemClock
from shared.codec import pack
from shared.errors import NodeUnreachable
from shared.ids import IdSource
from shared.model import (
    ApiKey,
    Cluster,
    CpuFacts,
    Inventory,
    NodeState,
    ObservedPower,
    PoolFacts,
    Replica,
    VersionFacts,
)
from shared.offload import inline
from shared.protocol import Query, VmReport
from tests.unit.lone_replica import own_reads

Result = TypeVar("Result")

CELL = "abc123"
BORN = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
SYSTEM = Author("system")
SECRET = "s" * 52
SPEC: dict[str, Any] = {
    "vcpus": 1,
    "memory_mib": 64,
    "boot": {"kernel": "tiny-kernel", "initrd": "tiny-initrd"},
}


class SteppedClock:
    """A clock that a test moves; each look takes a millisecond, so that ids have an order."""

    def __init__(self) -> None:
        self.at = BORN

    def now(self) -> datetime:
        self.at += timedelta(milliseconds=1)
        return self.at

    def boottime_s(self) -> float:
        return (self.at - BORN).total_seconds()


class OneMember:
    """As much of a store as the API asks of it; of its keys only the cluster's record."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    async def scan(self, prefix: str) -> AsyncGenerator[Listing]:
        record = pack(self._state.cluster())
        yield Listing(self._state.revision, (KeyValue(keys.CLUSTER, record, 1, 1),), 1)

    async def members(self) -> tuple[MemberStatus, ...]:
        return (
            MemberStatus(
                endpoint="127.0.0.1:2379",
                reachable=True,
                version="3.4.23",
                is_leader=True,
                db_size_bytes=4096,
                alarms=("NOSPACE",),
            ),
        )


@functools.cache
def an_issuer() -> Issuer:
    """Return an issuer of the cell, with CAs made for these tests."""
    clock = SystemClock()
    ca, agents, qemu = (
        make_authority(title, new_key(), clock.now()) for title in ("cell", "agents", "QEMUs")
    )
    trust = Trust(*(each.certificate_pem() for each in (ca, agents, qemu)))
    return Issuer(CELL, agents, qemu, trust, timedelta(days=7), clock)


class HandSpace:
    """Room in the store, as a test says."""

    def __init__(self) -> None:
        self.room = Room.ENOUGH
        self.detail = "1% of the store's quota is in use"
        self.repairs = 0

    async def repair(self) -> Repaired:
        self.repairs += 1
        self.room = Room.ENOUGH
        return Repaired(before_bytes=8192, after_bytes=4096, skipped=())


class World:
    """One replica that leads, with an admin's token."""

    def __init__(self) -> None:
        self.clock = SteppedClock()
        self.ids = IdSource(CELL, self.clock, random.Random(1))
        self.state = ClusterState()
        self.history = History(None, inline)
        self.windows = Windows()
        self.progress = ProgressBoard(self.clock)
        self.replicas: tuple[Replica, ...] = (REPLICA,)
        self.agents: dict[str, str] = {}
        self.leadership = Leadership("r1", "https://127.0.0.1:8443", "1.7", BORN)
        self.space = HandSpace()
        self.console = b"guest says hello\n"
        self.asked: list[tuple[str, Query]] = []
        self.token = str(Token(self.ids.new("key"), SECRET))
        self.apply(
            MakeCluster(
                cluster=Cluster(id=self.ids.new("cluster"), cell=CELL, epoch=1, created_at=BORN),
                admin_key=self.key(self.token.split("_")[1]),
                by=SYSTEM,
            )
        )
        self.metrics = Metrics(
            CollectorRegistry(), replica="r1", version="0.1.0", windows=self.windows
        )
        self.context = Context(
            state=self.state,
            submit=self.submit,
            ask=self.ask,
            history=self.history,
            figures=own_reads(self.windows),
            progress=self.progress,
            store=cast(Store, OneMember(self.state)),
            space=self.space,
            clock=self.clock,
            scheduler=SchedulerSettings(),
            leadership=lambda: self.leadership,
            replicas=lambda: self.replicas,
            agents=lambda: self.agents,
            offload=inline,
            version="0.1.0",
            new_id=self.ids.new,
            issuer=an_issuer(),
        )

    def app(self) -> Starlette:
        return build_app(self.context, self.metrics)

    def client(self, *, token: str | None = "") -> httpx2.AsyncClient:
        """Return a client that authenticates as the admin, with a token, or not at all (None)."""
        headers = {} if token is None else {"Authorization": f"Bearer {token or self.token}"}
        transport = httpx2.ASGITransport(app=self.app())
        return httpx2.AsyncClient(transport=transport, base_url="https://api", headers=headers)

    def key(self, key_id: str, **changes: Any) -> ApiKey:
        fields: dict[str, Any] = {
            "id": key_id,
            "sha256": digest(SECRET),
            "principal": "admin",
            "role": "admin",
            "created_at": BORN,
        }
        return ApiKey(**{**fields, **changes})

    def apply(self, command: Command[Result]) -> Result:
        draft = Draft(self.state, self.ids, self.clock.now())
        decided = command.decide(draft)
        sealed = draft.sealed(self.state.last_seq)
        if sealed:
            revision = self.state.revision + 1
            take_writes(self.state, sealed.changes, sealed.history, sealed.trimmed, revision)
        return decided

    async def submit(self, command: Command[Result]) -> Result:
        return self.apply(command)

    async def ask(self, node_id: str, query: Query) -> bytes:
        if self.state.nodes[node_id].record.state is not NodeState.READY:
            raise NodeUnreachable(f"node {node_id} is not heard")
        self.asked.append((node_id, query))
        return self.console

    def join(self, name: str, **changes: Any) -> str:
        node_id = self.apply(
            JoinNode(
                name=name,
                address="10.0.0.1",
                boot_id=f"boot-{name}",
                labels={"zone": "a"},
                inventory=inventory(**changes),
                foreign_domains=(),
                by=SYSTEM,
            )
        )
        self.apply(SetNodeState(node_id=node_id, state=NodeState.READY, by=SYSTEM))
        return node_id

    def run(self, vm_id: str, node_id: str) -> None:
        """Bring a VM that waits for a node to run there."""
        self.apply(BindVm(vm_id=vm_id, node_id=node_id, by=SYSTEM, check=lambda *_: None))
        generation = self.apply(PermitStart(vm_id=vm_id, by=SYSTEM, check=lambda *_: None))
        report = VmReport(
            vm_id=vm_id, generation=generation, power=ObservedPower.RUNNING, permit_used=True
        )
        self.apply(ObserveVm(node_id=node_id, report=report, by=SYSTEM))

    async def trim_history(self) -> None:
        """Move all history from memory to SQLite, as the trimmer does."""
        await self.history.append(list(self.state.history.values()))
        for seq in list(self.state.history):
            self.state.remove_history(seq)


REPLICA = Replica(
    name="r1",
    incarnation="i1",
    url="https://127.0.0.1:8443",
    agent_address="127.0.0.1:8444",
    version="0.1.0",
    started_at=BORN,
)


def inventory(**changes: Any) -> Inventory:
    fields: dict[str, Any] = {
        "cpus": 4,
        "memory_mib": 4096,
        "cpu": CpuFacts(model="qemu64"),
        "pools": (PoolFacts(name="default", capacity_gib=100, free_gib=90),),
        "networks": ("lan",),
        "artefacts": ("tiny-initrd", "tiny-kernel"),
        "versions": VersionFacts(agent="0.1.0", libvirt="9.0.0", qemu="7.2", kernel="6.1"),
    }
    return Inventory(**{**fields, **changes})


def new_vm(name: str = "web-1", **spec: Any) -> dict[str, Any]:
    return {"name": name, "labels": {"tier": "gold"}, "spec": {**SPEC, **spec}}
