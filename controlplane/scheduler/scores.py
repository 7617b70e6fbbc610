"""Scores: each says how well one node that fits would take a request, from 0 to 1.

A score is a function ``(request, node, context) -> float``; the one tuple SCORES gives each its
weight and says in words what it measures. A node's score is the weighted mean of those that concern
the request, so it is again from 0 to 1. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from controlplane.scheduler.filters import Context
from controlplane.scheduler.request import PlacementRequest
from controlplane.scheduler.snapshot import NodeView

Measure = Callable[[PlacementRequest, NodeView, Context], float]


class Score(NamedTuple):
    """A measure, its weight, which requests it concerns, and what it measures, in words."""

    name: str
    weight: float
    measure: Measure
    concerns: Callable[[PlacementRequest], bool]
    meaning: str


def spread(request: PlacementRequest, node: NodeView, context: Context) -> float:
    """Prefer the node whose scarcer resource stays freest: VMs spread, and each keeps headroom."""
    cpu, memory = _used_after(request, node, context)
    return 1.0 - max(cpu, memory)


def evenness(request: PlacementRequest, node: NodeView, context: Context) -> float:
    """Prefer CPU and memory filled alike: what is left of one without the other serves nobody."""
    cpu, memory = _used_after(request, node, context)
    return 1.0 - abs(cpu - memory)


def groups(request: PlacementRequest, node: NodeView, context: Context) -> float:
    """Follow the soft rules: towards the VMs of one group, away from those of another."""
    terms = []
    for rule in request.affinity:
        if not rule.hard:
            terms.append(1.0 if node.members(context.group(request, rule.group)) else 0.0)
    for rule in request.anti_affinity:
        if not rule.hard:
            terms.append(1.0 / (1 + node.members(context.group(request, rule.group))))
    return sum(terms) / len(terms)


def pool_room(request: PlacementRequest, node: NodeView, context: Context) -> float:
    """Prefer room to grow in the fullest of the pools that the disks go to."""
    shares = []
    for name, size_gib in request.disks_gib.items():
        capacity_gib = node.pools[name].capacity_gib
        left_gib = context.snapshot.free_gib(node, name) - size_gib
        shares.append(left_gib / capacity_gib if capacity_gib else 0.0)
    return _clamped(min(shares))


def _used_after(request: PlacementRequest, node: NodeView, context: Context) -> tuple[float, float]:
    cpu = (node.allocated_vcpus + request.vcpus) / (node.vcpus_limit or 1)
    memory_mib = node.allocated_memory_mib + context.memory_needed_mib
    memory = memory_mib / (node.memory_limit_mib or 1)
    return _clamped(cpu), _clamped(memory)


def _clamped(share: float) -> float:
    return min(1.0, max(0.0, share))


def _always(request: PlacementRequest) -> bool:
    return True


def _has_soft_rules(request: PlacementRequest) -> bool:
    return any(not rule.hard for rule in (*request.affinity, *request.anti_affinity))


# A soft rule is a user's wish and outranks the cluster's own tidiness; disk space is the one that
# runs out slowest and whose shortage a filter catches, so it only breaks ties.
SCORES: tuple[Score, ...] = (
    Score(
        "spread",
        1.0,
        spread,
        _always,
        "share of the node's scarcer resource (CPU or memory) free after the placement",
    ),
    Score(
        "evenness",
        0.5,
        evenness,
        _always,
        "how alike the node's CPU and memory are filled after the placement",
    ),
    Score(
        "groups",
        3.0,
        groups,
        _has_soft_rules,
        "how far the soft affinity and anti-affinity rules are followed",
    ),
    Score(
        "pool_room",
        0.1,
        pool_room,
        lambda request: bool(request.disks_gib),
        "share of the fullest storage pool concerned that is free after the placement",
    ),
)
