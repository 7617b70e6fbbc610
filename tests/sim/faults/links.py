"""Faults of the network: cut in one direction or both, slow, connections that break.

Streams are TCP, so nothing in them is reordered, lost or doubled as long as they last. What is lost
is on its way when one breaks; what is said twice was taken by a peer whose answer, or whose end,
did not come back.
"""

from __future__ import annotations

from tests.sim.faults.scene import Scene

# Across a continent; and through a link that is overloaded.
SLOW_LINKS_S = ((0.05, 0.3), (0.5, 4.0))


async def cut_node(scene: Scene) -> None:
    links = scene.links(scene.node().name, scene.replica().name)
    await scene.cut(links, scene.last_briefly_or_long())


async def cut_member(scene: Scene) -> None:
    links = scene.links(scene.replica().name, scene.member().host)
    await scene.cut(links, scene.last_briefly_or_long())


async def cut_nodes(scene: Scene) -> None:
    """Two nodes do not hear each other: what is moved between them stands still."""
    one, other = scene.rng.sample(list(scene.cluster.nodes), 2)
    await scene.cut(scene.links(one, other), scene.last_briefly_or_long())


async def isolate_replica(scene: Scene) -> None:
    """A replica and all others do not hear each other, or one side does not hear the other."""
    replica = scene.replica().name
    others = [
        *(name for name in scene.cluster.replicas if name != replica),
        *scene.cluster.nodes,
        *(member.host for member in scene.cluster.etcd.members),
    ]
    there = [(replica, other) for other in others]
    back = [(other, replica) for other in others]
    links = scene.rng.choice((there, back, [*there, *back]))
    scene.note(f"isolate {replica}")
    await scene.cut(links, scene.last_briefly_or_long())


async def slow_links(scene: Scene) -> None:
    """Everything to and from a host takes its time."""
    cluster = scene.cluster
    hosts = [*cluster.replicas, *cluster.nodes, *(member.host for member in cluster.etcd.members)]
    slow, bounds = scene.rng.choice(hosts), scene.rng.choice(SLOW_LINKS_S)
    links = [link for host in hosts if host != slow for link in ((slow, host), (host, slow))]
    scene.note(f"slow {slow}")
    for link in links:
        cluster.network.slow(*link, *bounds)
    await scene.last(1.0, 40.0)
    for link in links:
        cluster.network.speed_up(*link)


async def break_streams(scene: Scene) -> None:
    """Reset a node's connections to a replica; what is on its way is lost."""
    scene.cluster.network.break_streams(scene.node().name, scene.replica().name)


async def half_open_streams(scene: Scene) -> None:
    """Reset a node's end of its connections; the replica takes what is on its way, and waits on."""
    scene.cluster.network.half_open(scene.node().name, scene.replica().name)
