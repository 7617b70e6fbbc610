"""Where a VM is, from what all nodes have told of its domains: a pure decision, and total.

Running guests win over records, and over whatever else is found. What cannot be decided without a
guess is left alone until the nodes tell something else: two that run, or one that stands still
beside another. A domain at rest proves that the VM was there, not that it is nowhere else: that
all nodes have told does.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from shared.moves import EndState
from shared.protocol import Sighting


class Seen(Struct, frozen=True, kw_only=True):
    """A domain as a node has told of it, in one boot of that node."""

    node_id: str
    node_name: str
    boot_id: str
    sighting: Sighting

    @property
    def generation(self) -> int:
        return self.sighting.generation

    def __str__(self) -> str:
        return f"{self.node_name} (generation {self.generation})"


class Found(Struct, frozen=True, kw_only=True):
    """The VM's domain. ``others`` are left behind there; nobody touches them.

    ``sure``: nothing stands against starting one at rest again.
    """

    seen: Seen
    at_rest: bool = False
    sure: bool = True
    others: tuple[Seen, ...] = ()


class Undecided(Struct, frozen=True):
    why: str


class Nowhere(Struct, frozen=True):
    """No node has a domain of it that is not older than what the record tells of."""


Whereabouts = Found | Undecided | Nowhere

_PAUSED = frozenset({EndState.HELD, EndState.AWAY, EndState.READY})
_AT_REST = frozenset({EndState.DOWN, EndState.NEVER_RAN})


def is_at_rest(seen: Seen) -> bool:
    return seen.sighting.end in _AT_REST


def whereabouts(seen: Sequence[Seen], recorded_generation: int) -> Whereabouts:
    """Return where a VM is, whose record's attempt is of ``recorded_generation``."""
    running = [each for each in seen if each.sighting.end is EndState.RUNNING]
    paused = [each for each in seen if each.sighting.end in _PAUSED]
    at_rest = [each for each in seen if is_at_rest(each)]
    moving = [each for each in seen if each not in (*running, *paused, *at_rest)]
    if moving:
        return Undecided(f"it is on its way, as {_listed(moving)} tell")
    if len(running) > 1:
        return Undecided(f"it runs twice: on {_listed(running)}")
    if running:
        return _beside(running[0], paused, seen)
    if len(paused) > 1:
        return Undecided(f"it is paused on {_listed(paused)}, and nobody knows which one goes on")
    if paused:
        return _paused(paused[0], at_rest, recorded_generation)
    newest = max(at_rest, key=lambda each: each.generation, default=None)
    if newest is None or newest.generation < recorded_generation:
        return Nowhere()
    return Found(
        seen=newest,
        at_rest=True,
        sure=not newest.sighting.departing,
        others=_but(newest, seen),
    )


def _beside(runs: Seen, paused: list[Seen], seen: Sequence[Seen]) -> Whereabouts:
    """Return the one that runs, unless another stands still that a move did not leave behind."""
    rivals = [
        each
        for each in paused
        if each.sighting.end is not EndState.AWAY or each.generation > runs.generation
    ]
    if rivals:
        return Undecided(f"it runs on {runs}, and is paused on {_listed(rivals)}")
    return Found(seen=runs, others=_but(runs, seen))


def _paused(paused: Seen, at_rest: list[Seen], recorded_generation: int) -> Whereabouts:
    """Return the one that is paused, unless its guest may have gone on elsewhere since."""
    newer = [each for each in at_rest if each.generation > paused.generation]
    if newer:
        return Undecided(f"it is paused on {paused}, and ended on {_listed(newer)}")
    if paused.sighting.departing:
        return Undecided(f"it is paused on {paused}, which had begun to move it away")
    if paused.generation < recorded_generation:
        return Undecided(f"it is paused on {paused}, and the backup knows a newer generation")
    return Found(seen=paused, others=_but(paused, at_rest))


def _but(one: Seen, seen: Sequence[Seen]) -> tuple[Seen, ...]:
    return tuple(each for each in seen if each is not one)


def _listed(seen: Sequence[Seen]) -> str:
    return " and ".join(str(each) for each in seen)
