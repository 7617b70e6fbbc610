"""Surprises in the middle of a migration, made on purpose: the seeds would find them rarely."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.commands.migrations import MIGRATE
from shared.model import OperationState
from tests.sim.cluster import SimCluster
from tests.sim.etcd import Commit
from tests.sim.network import KEEPALIVE_S
from tests.sim.saga_world import SagaWorld, at_step, meanwhile, play
from tests.sim.simulation import SETTLE_LOOK_S

LOOK_S = 0.001


def test_a_destination_that_boots_before_the_guest_sets_out_ends_the_move() -> None:
    async def boots(world: SagaWorld) -> None:
        home, away = world.cluster.nodes[world.home], world.cluster.nodes[world.away]
        home.crash_agent()
        await asyncio.sleep(SETTLE_LOOK_S)
        away.lose_power()
        away.boot()
        # Until the leader has forgotten what the earlier boot had made ready.
        await asyncio.sleep(2 * KEEPALIVE_S)
        home.start_agent()

    outcome = play(MIGRATE, at_step(MIGRATE, "prepare", meanwhile(boots)))

    outcome.check_undone(OperationState.FAILED)
    assert outcome.ended.error is not None
    assert outcome.ended.error.code == "destination_not_ready"


def test_no_token_comes_into_etcd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over every commit of a whole migration: what opens a relay is stored nowhere."""
    values: list[bytes] = []
    tokens: list[str] = []

    committed = SimCluster._committed

    def keep(cluster: SimCluster, commit: Commit) -> None:
        values.extend(event.kv.value for event in commit.events)
        committed(cluster, commit)

    async def look(world: SagaWorld) -> None:
        tokens.extend(relay.token for relay in world.cluster.fabric.relays.values())

    monkeypatch.setattr(SimCluster, "_committed", keep)
    outcome = play(MIGRATE, at_step(MIGRATE, "transfer", meanwhile(look)))

    assert outcome.ended.state is OperationState.SUCCEEDED
    assert tokens == ["token-1"]
    assert any(outcome.ended.id.encode() in value for value in values)
    assert not any(b"token" in value for value in values)


def test_an_agent_that_starts_alone_holds_a_guest_that_has_come_back() -> None:
    """Judged by the invariant that such a guest is held soon, also when no leader is in reach."""

    async def comes_back(world: SagaWorld) -> None:
        home, network = world.cluster.nodes[world.home], world.cluster.network
        relay = None
        while relay is None or relay.travel is None or not relay.travel.switched:
            await asyncio.sleep(LOOK_S)
            relay = next(iter(world.cluster.fabric.relays.values()), None)
        home.crash_agent()
        for replica in world.cluster.replicas:
            network.cut(world.home, replica)
        relay.end()
        home.start_agent()
        await asyncio.sleep(20)
        network.heal_all()

    outcome = play(MIGRATE, at_step(MIGRATE, "transfer", meanwhile(comes_back)))

    assert outcome.ended.state is OperationState.SUCCEEDED
    assert outcome.places["web"] == ("node-2", "running")
