"""Faults of migrations: relays that break, and what goes wrong in the moment of the switch."""

from __future__ import annotations

import asyncio

from agent.simulated_fabric import SimulatedRelay
from tests.sim.faults.scene import Scene

# How long a migration is waited for.
RELAY_LIMIT_S = 10.0
RELAY_LOOK_S = 0.1
# How many of the relays that break do so in the few milliseconds in which libvirt runs two guests.
CRITICAL_SHARE = 0.5
SWITCH_LIMIT_S = 5.0
# Twice as long as a saga waits for a source that it has to clean up.
ISOLATED_S = 80.0
CRASH_SHARE = 0.5


async def break_relay(scene: Scene) -> None:
    """End a migration's relay; now and then right after the destination has resumed."""
    relay = await _relay(scene)
    if relay is None:
        return
    if scene.rng.random() < CRITICAL_SHARE:
        await _until_switched(scene, relay)
    scene.note(f"break the relay to {relay.destination}")
    relay.end()


async def fail_libvirtd_at_switch(scene: Scene) -> None:
    """End a libvirtd between the destination's resume and the source's end."""
    relay = await _relay(scene)
    if relay is None:
        return
    await _until_switched(scene, relay)
    await scene.last(0.0, 0.2)
    node = scene.cluster.nodes[scene.rng.choice([relay.destination, *scene.cluster.nodes])]
    libvirtd = node.libvirtd
    libvirtd.go_away()
    await scene.last(0.2, 20.0)
    if node.libvirtd is libvirtd and node.powered:
        libvirtd.come_back()


async def isolate_source_at_switch(scene: Scene) -> None:
    """Nobody hears the source once its guest has moved; its relay may break, and the guest may
    crash on its new node long before the old one can be asked again.
    """
    relay = await _relay(scene)
    if relay is None or relay.travel is None:
        return
    await _until_switched(scene, relay)
    source, replicas = relay.source_node, tuple(scene.cluster.replicas)
    links = [*((source, each) for each in replicas), *((each, source) for each in replicas)]
    scene.note(f"isolate {source}")
    await scene.cut(links, _trouble(scene, relay, relay.travel.domain_name))


async def _trouble(scene: Scene, relay: SimulatedRelay, domain_name: str) -> None:
    if scene.rng.random() < CRITICAL_SHARE:
        relay.end()
    await scene.last(0.0, ISOLATED_S / 2)
    state = scene.cluster.nodes[relay.destination].state
    domain = state.domains.get(domain_name)
    if domain is not None and domain.is_active() and scene.rng.random() < CRASH_SHARE:
        state.guest_crashes(domain_name)
    await scene.last(1.0, ISOLATED_S / 2)


async def _relay(scene: Scene) -> SimulatedRelay | None:
    """Return a relay through which a guest is being moved, if there is one soon."""
    for _ in range(round(RELAY_LIMIT_S / RELAY_LOOK_S)):
        relays = [
            relay
            for relay in scene.cluster.fabric.relays.values()
            if relay.travel is not None and not relay.travel.done.done()
        ]
        if relays:
            return scene.rng.choice(relays)
        await asyncio.sleep(RELAY_LOOK_S)
    return None


async def _until_switched(scene: Scene, relay: SimulatedRelay) -> None:
    travel = relay.travel
    if travel is not None:
        await scene.until(lambda: travel.switched or travel.done.done(), SWITCH_LIMIT_S)
