"""Faults of a node: its power, its libvirtd, its disk, and the disks of replicas."""

from __future__ import annotations

from tests.sim.faults.scene import Scene

SLOW_DISKS_S = ((0.02, 0.2), (0.2, 3.0))


async def lose_power(scene: Scene) -> None:
    node = scene.node()
    if not node.powered:
        return
    node.lose_power()
    await scene.last(1.0, 40.0)
    node.boot()


async def lose_libvirtd(scene: Scene) -> None:
    node = scene.node()
    libvirtd = node.libvirtd
    libvirtd.go_away()
    await scene.last(0.2, 20.0)
    if node.libvirtd is libvirtd and node.powered:
        libvirtd.come_back()


async def hang_libvirtd(scene: Scene) -> None:
    """Let libvirtd stand still, so long that its agent may give it up, and then go on."""
    libvirtd = scene.node().libvirtd
    libvirtd.hang()
    await scene.last_briefly_or_long()
    libvirtd.go_on()


async def lie_of_failure(scene: Scene) -> None:
    """Let libvirt say that the next acts have failed, which it has carried out."""
    scene.node().libvirtd.acts_said_to_fail = scene.rng.randint(1, 3)


async def lie_of_success(scene: Scene) -> None:
    """Let libvirt say that guests have done what they were told next, before they do it."""
    scene.node().libvirtd.acts_said_to_be_done = scene.rng.randint(1, 3)


async def lose_events(scene: Scene) -> None:
    """Let libvirt tell nobody what becomes of its guests."""
    libvirtd = scene.node().libvirtd
    libvirtd.lose_events()
    await scene.last(2.0, 60.0)
    libvirtd.tell_events()


async def slow_agent_disk(scene: Scene) -> None:
    """Let each write to an agent's log take its time; a crash may come while it waits."""
    node = scene.node()
    node.slow_log_s = scene.rng.choice(SLOW_DISKS_S)
    await scene.last(1.0, 40.0)
    node.slow_log_s = None


async def slow_replica_disk(scene: Scene) -> None:
    """Let a replica's copy of history take its time."""
    replica = scene.replica()
    replica.slow_disk_s = scene.rng.choice(SLOW_DISKS_S)
    await scene.last(1.0, 40.0)
    replica.slow_disk_s = None
