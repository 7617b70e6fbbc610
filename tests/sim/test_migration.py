"""Migrations in the simulated cluster: the plain case, and each hard one made on purpose."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shared.model import (
    DiskSpec,
    MigrationSpec,
    ObservedPower,
    OperationState,
    VmPhase,
)
from shared.moves import EndState
from shared.states import vm_phase
from tests.sim.bench import Bench, run

SPECS: dict[str, dict[str, Any]] = {
    "no disk": {},
    "a disk that is copied": {"disks": (DiskSpec(name="root", size_gib=1),)},
    "a shared disk": {"disks": (DiskSpec(name="root", size_gib=1, pool="shared"),)},
    "strict": {"migration": MigrationSpec(strict=True)},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_vm_moves_and_nothing_is_left(spec: dict[str, Any]) -> None:
    async def story(bench: Bench) -> None:
        await bench.start(**spec)
        before = await bench.where()
        ended = await bench.ended(await bench.migrate())
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert [step.state.value for step in ended.steps] == ["done"] * 7
        assert await bench.where() != before
        await bench.settled()

    run(story)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1])
def test_a_new_leader_that_has_heard_nobody_yet_fails_no_migration(after_s: float) -> None:
    async def story(bench: Bench) -> None:
        await bench.start()
        before = await bench.where()
        operation = await bench.migrate()
        await asyncio.sleep(after_s)
        (replica,) = bench.cluster.replicas.values()
        replica.crash()
        replica.start()
        await bench.cluster.until_ready()
        ended = await bench.ended(operation)
        assert ended.state is OperationState.SUCCEEDED, ended.error
        assert await bench.where() != before
        await bench.settled()

    run(story)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_guest_that_dies_before_it_goes_on_goes_on_where_it_was(spec: dict[str, Any]) -> None:
    """Its domain over there is one that stays; what has never run has changed nothing."""

    async def story(bench: Bench) -> None:
        await bench.start(**spec)
        before = await bench.where()
        nodes = bench.cluster.nodes.values()
        (destination,) = (node.state for node in nodes if node.name != before)
        operation = await bench.migrate()
        await bench.until(
            lambda: any(domain.stays for domain in destination.domains.values()), look_s=0.001
        )
        (arrival,) = destination.domains.values()
        assert arrival.incoming
        arrival.end(ObservedPower.CRASHED)
        assert arrival.end_state() is EndState.NEVER_RAN
        ended = await bench.ended(operation)
        assert ended.state is OperationState.FAILED
        assert await bench.where() == before
        await bench.settled()
        (vm,) = bench.judge.ledger.vms.values()
        assert (vm_phase(vm), vm.status.crashes) == (VmPhase.RUNNING, 0)
        assert destination.domains == {}

    run(story)
