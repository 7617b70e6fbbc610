"""Faults of etcd: its members, their disks and watches, its leases and its quota."""

from __future__ import annotations

from tests.sim.faults.scene import Scene

# A disk that is tired, and one behind which a device has been lost for a while.
SLOW_DISKS_S = ((0.05, 0.4), (0.4, 3.0))


async def crash_member(scene: Scene) -> None:
    index = scene.member_index()
    scene.cluster.etcd.crash(index)
    await scene.last(0.2, 15.0)
    scene.cluster.etcd.restart(index)


async def pause_member(scene: Scene) -> None:
    index = scene.member_index()
    scene.cluster.etcd.pause(index)
    await scene.last(0.2, 15.0)
    scene.cluster.etcd.resume(index)


async def slow_member(scene: Scene) -> None:
    """Let a member's disk be slow: its own answers wait, and all writes while it is the leader."""
    member = scene.member()
    member.slow_disk_s = scene.rng.choice(SLOW_DISKS_S)
    await scene.last(1.0, 40.0)
    member.slow_disk_s = None


async def lose_answers(scene: Scene) -> None:
    """Lose the answers to transactions that were committed."""
    scene.cluster.etcd.lose_answers(scene.rng.randint(1, 4))


async def lose_requests(scene: Scene) -> None:
    """Lose requests before they are carried out; their senders cannot tell that from the other."""
    scene.cluster.etcd.lose_requests(scene.rng.randint(1, 6))


async def stale_reads(scene: Scene) -> None:
    """Let a member answer reads with what was, as etcd 3.4 may after a pause (issue 20418)."""
    member = scene.member()
    member.fall_behind()
    await scene.last(1.0, 40.0)
    member.catch_up()


async def silence_watches(scene: Scene) -> None:
    """Let a member's watches say nothing more, and nothing of that either."""
    member = scene.member()
    member.watches_speak.clear()
    await scene.last(1.0, 40.0)
    member.watches_speak.set()


async def lose_watch_events(scene: Scene) -> None:
    """Let every member's watches leave revisions out (etcd issues 17529, 18089)."""
    for member in scene.cluster.etcd.members:
        member.events_lost = scene.rng.choice((0.2, 1.0))
    await scene.last(0.2, 20.0)
    for member in scene.cluster.etcd.members:
        member.events_lost = 0.0


async def expire_leases(scene: Scene) -> None:
    """End all leases at once (etcd issue 15247); some renewals do not tell."""
    scene.cluster.etcd.expire_leases(scene.rng.choice((0, 0, 1, 2)))


async def fill_store(scene: Scene) -> None:
    """Use up etcd's quota until an operator has made room."""
    scene.cluster.etcd.run_full()
    await scene.last(2.0, 40.0)
    scene.cluster.etcd.make_room()
