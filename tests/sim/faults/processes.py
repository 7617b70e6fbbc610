"""Faults of replicas' and agents' processes: they die, or stand still, and start anew."""

from __future__ import annotations

import asyncio

from tests.sim.faults.scene import Scene
from tests.sim.node import SimNode
from tests.sim.process import Process
from tests.sim.replica import SimReplica

# How many effects a process that dies "somewhere" still has; or how many steps, each from one await
# to the next.
DIE_IN_MAX = 25
STEPS_MAX = 300
# How long such a process may live before it is killed anyway.
DIE_IN_LIMIT_S = 5.0
# Longer than the leader's lease, a replica's registration and a session's silence limit; the
# longest also outlast keep-alive.
PAUSE_S = (12.0, 90.0)


async def crash_replica(scene: Scene) -> None:
    replica = scene.replica()
    replica.crash()
    await scene.last(0.2, 15.0)
    start_replica(replica)


async def crash_replica_somewhere(scene: Scene) -> None:
    """Die at any await, or before or after one of its next effects."""
    replica = scene.replica()
    if replica.process is not None:
        await _die_soon(scene, replica.process)
    replica.crash()
    await scene.last(0.2, 10.0)
    start_replica(replica)


async def pause_replica(scene: Scene) -> None:
    await _pause(scene, scene.replica().process)


async def crash_agent(scene: Scene) -> None:
    node = scene.node()
    node.crash_agent()
    await scene.last(0.1, 15.0)
    start_agent(node)


async def crash_agent_somewhere(scene: Scene) -> None:
    """Die at any await, or before or after one of its next effects."""
    node = scene.node()
    if node.process is not None:
        await _die_soon(scene, node.process)
    node.crash_agent()
    await scene.last(0.1, 10.0)
    start_agent(node)


async def pause_agent(scene: Scene) -> None:
    await _pause(scene, scene.node().process)


def start_replica(replica: SimReplica) -> None:
    if replica.process is None:
        replica.start()


def start_agent(node: SimNode) -> None:
    if node.powered and node.process is None:
        node.start_agent()


async def _pause(scene: Scene, process: Process | None) -> None:
    """Stop a process for longer than any lease, and let it go on as if nothing had been."""
    if process is None or process.stopped is not None:
        return
    scene.note(f"pause {process.incarnation}")
    process.pause()
    scene.cluster.network.paused(process)
    await scene.last(*PAUSE_S)
    scene.note(f"resume {process.incarnation}")
    process.resume()


async def _die_soon(scene: Scene, process: Process) -> None:
    if scene.rng.random() < 0.5:
        death = process.alive_until(scene.rng.randint(1, DIE_IN_MAX))
    else:
        death = process.alive_for(scene.rng.randint(1, STEPS_MAX))
    try:
        async with asyncio.timeout(DIE_IN_LIMIT_S):
            await death
    except TimeoutError:
        return
