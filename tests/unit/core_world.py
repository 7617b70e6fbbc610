"""The core's records and commands in memory, as the unit tests need them: no store, no network."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from controlplane.commands.attempts import BindVm, ObserveVm, PermitStart
from controlplane.commands.draft import Author, Command, Draft
from controlplane.commands.nodes import JoinNode, SetNodeState
from controlplane.commands.vms import ActOnVm, CreateVm
from controlplane.state import ClusterState
from controlplane.store.applier import take_writes
from shared.errors import NovacronError
from shared.ids import IdSource
from shared.model import (
    BootSpec,
    CpuFacts,
    Event,
    FinishedOperation,
    Inventory,
    Node,
    NodeState,
    ObservedPower,
    Operation,
    PoolFacts,
    Term,
    VersionFacts,
    Vm,
    VmSpec,
)
from shared.protocol import Desired, Intent, VmReport
from shared.states import VmAction

R = TypeVar("R")

CELL = "abc123"
BORN = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
USER = Author("user-1", "req-1")
LEADER = Author("leader")
INVENTORY = Inventory(
    cpus=8,
    memory_mib=16384,
    cpu=CpuFacts(model="qemu64"),
    pools=(PoolFacts(name="default", capacity_gib=100.0, free_gib=80.0),),
    networks=("lan",),
    artefacts=("tiny-kernel", "tiny-initrd"),
    versions=VersionFacts(agent="0.1.0", libvirt="9.0.0", qemu="7.2.0", kernel="6.1"),
)


class HandClock:
    """A clock that a test moves; each look takes a millisecond, so that ids have an order."""

    def __init__(self) -> None:
        self.at = BORN

    def now(self) -> datetime:
        self.at += timedelta(milliseconds=1)
        return self.at

    def boottime_s(self) -> float:
        return (self.at - BORN).total_seconds()


class CoreWorld:
    """State, ids and clock, and commands applied as the applier does; one node, ``n1``."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.ids = IdSource(CELL, self.clock, random.Random(1))
        self.state = ClusterState()
        self.node_id = self.join("n1")

    def apply(self, command: Command[R]) -> R:
        draft = Draft(self.state, self.ids, self.clock.now())
        result = command.decide(draft)
        sealed = draft.sealed(self.state.last_seq)
        revision = self.state.revision + 1
        take_writes(self.state, sealed.changes, sealed.history, sealed.trimmed, revision)
        return result

    def refused(self, command: Command[Any]) -> NovacronError:
        """Apply a command that must be refused, and must not have written anything."""
        before = (self.state.revision, self.state.last_seq)
        try:
            self.apply(command)
        except NovacronError as error:
            assert (self.state.revision, self.state.last_seq) == before
            return error
        raise AssertionError(f"{command} was not refused")

    def join(self, name: str, boot_id: str = "boot-1", serial: str = "") -> str:
        node_id = self.apply(
            JoinNode(
                name=name,
                address="192.0.2.1",
                boot_id=boot_id,
                labels={},
                inventory=INVENTORY,
                foreign_domains=(),
                serial=serial,
                by=Author(f"agent:{name}"),
            )
        )
        self.apply(SetNodeState(node_id=node_id, state=NodeState.READY, by=LEADER))
        return node_id

    def node(self, node_id: str | None = None) -> Node:
        return self.state.nodes[node_id or self.node_id].record

    def create(self, name: str = "web-1", **changes: Any) -> tuple[str, str]:
        """Return the ids of a new VM and of its operation."""
        operation_id = self.apply(
            CreateVm(name=name, tenant="default", labels={}, spec=spec(**changes), by=USER)
        )
        vm_id = self.state.vm_id_by_name("default", name)
        assert vm_id is not None
        return vm_id, operation_id

    def bind(self, vm_id: str) -> None:
        self.apply(BindVm(vm_id=vm_id, node_id=self.node_id, by=LEADER, check=no_check))

    def permit(self, vm_id: str) -> int:
        return self.apply(PermitStart(vm_id=vm_id, by=LEADER, check=no_check))

    def report(self, vm_id: str, power: ObservedPower, **fields: Any) -> None:
        """Take a report on the present generation, or on another one that is given."""
        used = power not in (ObservedPower.UNKNOWN, ObservedPower.ABSENT)
        given = {"generation": self.vm(vm_id).status.generation, "permit_used": used} | fields
        report = VmReport(vm_id=vm_id, power=power, **given)
        self.apply(ObserveVm(node_id=self.node_id, report=report, by=Author("agent:n1")))

    def running(self, name: str = "web-1", **changes: Any) -> str:
        """Return the id of a VM that runs on ``n1`` in generation 1."""
        vm_id, _ = self.create(name, **changes)
        self.bind(vm_id)
        self.permit(vm_id)
        self.report(vm_id, ObservedPower.RUNNING)
        return vm_id

    def act(self, vm_id: str, action: VmAction) -> str:
        return self.apply(ActOnVm(vm_id=vm_id, action=action, by=USER))

    def vm(self, vm_id: str) -> Vm:
        return self.state.vms[vm_id].record

    def open_operations(self, vm_id: str) -> list[str]:
        """Return the kinds of the operations that are under way."""
        ids = sorted(self.state.operation_ids_on(vm_id))
        return [self.state.operations[each].record.kind for each in ids]

    def ended(self, operation_id: str) -> Operation:
        """Return an operation that came to its end, once."""
        found = [
            entry.operation
            for entry in self.state.history.values()
            if isinstance(entry, FinishedOperation) and entry.operation.id == operation_id
        ]
        assert len(found) == 1, f"{operation_id} ended {len(found)} times"
        assert operation_id not in self.state.operations
        return found[0]

    def events(self) -> list[str]:
        return [entry.kind for entry in self.state.history.values() if isinstance(entry, Event)]

    def age(self, **span: float) -> None:
        self.clock.at += timedelta(**span)


def no_check(draft: Draft, vm: Vm, node_id: str) -> None:
    """Find room everywhere."""


def spec(**changes: Any) -> VmSpec:
    fields: dict[str, Any] = {
        "vcpus": 1,
        "memory_mib": 64,
        "boot": BootSpec(kernel="tiny-kernel"),
    }
    return VmSpec(**{**fields, **changes})


def desired(**changes: Any) -> Desired:
    """Return a desired state of ``vm-1``: run generation 1 by permit, in the boot ``boot-1``."""
    fields: dict[str, Any] = {
        "term": Term(1, 1),
        "vm_id": "vm-1",
        "revision": 10,
        "generation": 1,
        "permitted": True,
        "boot_id": "boot-1",
        "intent": Intent.RUN,
        "name": "web-1",
        "tenant": "default",
        "domain_name": "vm-1",
        "domain_uuid": "00000000-0000-0000-0000-000000000001",
        "spec": spec(),
    }
    return Desired(**{**fields, **changes})
