"""The previous release in this process: its own code, its own types, the same world."""

from __future__ import annotations

import asyncio
import random

import pytest

from agent.hypervisor import DomainInfo
from controlplane.app import ControlPlane
from controlplane.services.context import Permission, Principal, Scope
from controlplane.services.drains import drain_node
from controlplane.services.operations import get_operation
from controlplane.services.requests import DrainOrder, NewVm
from controlplane.services.vms import create_vm
from controlplane.store.etcd_rpc import Compare, PutOp, Target, Txn
from shared.errors import NotFound, NovacronError
from shared.model import BootSpec, ObservedPower, OperationState, VmSpec
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.invariants import Judge
from tests.sim.previous import Translated, load, to_present, to_previous
from tests.sim.previous_processes import serve_use_case
from tests.sim.process import adopt_by_context
from tests.sim.simulation import simulate
from tests.sim.upgrade import EVERY
from tests.sim.virtual_loop import run_virtual

ADMIN = Principal("admin", frozenset(Permission), Scope())
DOMAIN = DomainInfo(name="a", uuid="u", vm_id="v", generation=1, power=ObservedPower.RUNNING)


def test_both_releases_are_there() -> None:
    assert load("controlplane.app").ControlPlane is not ControlPlane
    assert load("shared.version").VERSION == "0.1.0"
    assert load("controlplane.election").NovacronError is NovacronError


def test_values_keep_their_meaning_between_releases() -> None:
    old = to_previous(DOMAIN)
    assert type(old) is load("agent.hypervisor").DomainInfo
    assert old.power is load("shared.model").ObservedPower.RUNNING
    assert to_present(old) == DOMAIN
    txn = Txn((Compare("k", Target.VERSION, 1),), (PutOp("k", b"v"),))
    assert to_present(to_previous(txn)) == txn
    assert to_present(to_previous({"a": [DOMAIN]})) == {"a": [DOMAIN]}


def test_what_the_other_release_does_not_know_is_dropped() -> None:
    spec = VmSpec(vcpus=1, memory_mib=64, boot=BootSpec(kernel="k"))
    assert not hasattr(to_previous(spec).migration, "strict")
    assert to_present(to_previous(spec)) == spec


async def test_a_port_takes_and_gives_the_callers_own_types() -> None:
    class Port:
        endpoint = "here"

        async def domain(self, info: DomainInfo) -> DomainInfo:
            assert type(info) is DomainInfo
            return info

    port = Translated(Port())
    assert port.endpoint == "here"
    assert type(await port.domain(to_previous(DOMAIN))) is load("agent.hypervisor").DomainInfo


def test_a_cluster_of_the_previous_release_runs_a_vm() -> None:
    judge = Judge()

    async def main() -> None:
        cluster = SimCluster(
            ClusterSettings(nodes=1), random.Random(1), observe=judge.take, schema_level=1
        )
        replica, node = cluster.replicas["replica-1"], cluster.nodes["node-1"]
        replica.is_previous = node.is_previous = True
        await cluster.start()
        await asyncio.sleep(5)
        context = replica.previous.context()
        spec = VmSpec(vcpus=1, memory_mib=512, boot=BootSpec(kernel="tiny-kernel"))
        made = await serve_use_case(create_vm, context, ADMIN, NewVm(name="web-1", spec=spec))
        ended = await serve_use_case(get_operation, context, ADMIN, made.id, 60.0)
        assert ended.state == OperationState.SUCCEEDED
        assert list(node.found().running.values()) == [1]
        with pytest.raises(NotFound):
            await serve_use_case(drain_node, context, ADMIN, "node-1", DrainOrder())
        await cluster.stop()

    run_virtual(main(), adopt_by_context)


def test_a_seed_is_upgraded_in_its_middle() -> None:
    told: list[str] = []
    outcome = simulate(EVERY - 1, tell=told.append)
    assert not outcome.violated
    replaced = [line for line in told if "gets the present release" in line]
    finalized = [line for line in told if "state/cluster" in line]
    assert len(replaced) >= 7
    assert len(finalized) == 2, "it is founded, and its level is raised once"
