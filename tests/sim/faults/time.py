"""Faults of machines' clocks: they run too fast or too slowly, and their date jumps."""

from __future__ import annotations

from tests.sim.faults.scene import Scene

RATES = (0.9, 1.1)
# An hour is more than most times that the product measures by dates. A whole day would have keys
# of requests forgotten: whoever leads keeps them for a day, by its own date.
JUMPS_S = (-3600.0, -300.0, 300.0, 3600.0)


async def drift_clock(scene: Scene) -> None:
    """Let a machine's clock run at another rate; its timers too."""
    host, rate = _machine(scene), scene.rng.uniform(*RATES)
    scene.note(f"the clock of {host} runs at {rate:.3f}")
    scene.cluster.set_rate(host, rate)
    await scene.last(10.0, 120.0)
    scene.cluster.set_rate(host, 1.0)


async def jump_date(scene: Scene) -> None:
    """Let a machine's date be wrong for a while."""
    host, jump_s = _machine(scene), scene.rng.choice(JUMPS_S)
    clock = scene.cluster.host_clock(host)
    scene.note(f"the date of {host} is off by {jump_s:g} s")
    clock.date_off_s = jump_s
    await scene.last(1.0, 60.0)
    clock.date_off_s = 0.0


def _machine(scene: Scene) -> str:
    """Return a replica's or a node's host; a replica's as often as all nodes' together."""
    return scene.rng.choice((scene.replica().name, scene.node().name))
