"""Chooses the node for a VM, and says why.

``plan`` asks every filter of every node and keeps all answers; ``place`` chooses the same node and
keeps none. Both are total, deterministic (equal scores go by name) and pure. The choice is a
proposal: whoever commits it checks that the records it rests on are still the same.
"""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from controlplane.scheduler.filters import FILTERS, Context, Reason, ReasonCode, context_of
from controlplane.scheduler.request import PlacementRequest
from controlplane.scheduler.scores import SCORES, Score
from controlplane.scheduler.snapshot import NodeView, Snapshot

# Sums of floats differ in their last digits by the order of their terms; a digit that means nothing
# must not decide, so scores are compared to nine.
SCORE_DIGITS = 9


class ScoreTerm(Struct, frozen=True):
    """One score of one node: ``value`` from 0 to 1, its weight, and what it measures."""

    name: str
    value: float
    weight: float
    meaning: str


class Candidate(Struct, frozen=True, kw_only=True):
    """One node's answer: either it fits and has a score, or it has every reason against it."""

    node: str
    node_name: str
    fits: bool
    score: float = 0.0
    scores: tuple[ScoreTerm, ...] = ()
    reasons: tuple[Reason, ...] = ()


class Plan(Struct, frozen=True, kw_only=True):
    """The chosen node (None: fits nowhere) and every node's answer, best first.

    ``refusals`` counts each reason once per node that gave it.
    """

    node: str | None
    node_name: str | None
    candidates: tuple[Candidate, ...]
    refusals: dict[ReasonCode, int]

    def summary(self) -> str:
        """Return one sentence for people."""
        if self.node is not None:
            fitting = sum(candidate.fits for candidate in self.candidates)
            return f"node {self.node_name} is the best of {fitting} that fit"
        if not self.candidates:
            return "there is no node"
        counts = ", ".join(f"{code.value} on {n}" for code, n in self.refusals.items())
        return f"none of {len(self.candidates)} nodes fits: {counts}"


class Placement(Struct, frozen=True):
    """What the fast path knows: the node, and how many nodes refused, each by its first reason."""

    node: str | None
    refusals: dict[ReasonCode, int]


def plan(snapshot: Snapshot, request: PlacementRequest) -> Plan:
    """Return the node for ``request`` and every node's answer."""
    context = context_of(snapshot, request)
    candidates = [_candidate(request, node, context) for node in snapshot.nodes.values()]
    candidates.sort(key=lambda c: (not c.fits, -c.score, c.node_name))
    refusals = Counter(reason.code for c in candidates for reason in c.reasons)
    best = candidates[0] if candidates and candidates[0].fits else None
    return Plan(
        node=None if best is None else best.node,
        node_name=None if best is None else best.node_name,
        candidates=tuple(candidates),
        refusals=_ordered(refusals),
    )


def place(snapshot: Snapshot, request: PlacementRequest) -> Placement:
    """Return the node that ``plan`` would choose, without its explanations."""
    context = context_of(snapshot, request)
    checks = [entry.check for entry in FILTERS if entry.concerns(request)]
    scores = _concerned(request)
    refusals: Counter[ReasonCode] = Counter()
    best: tuple[float, str] | None = None
    chosen: str | None = None
    for node in snapshot.nodes.values():
        for check in checks:
            reason = check(request, node, context)
            if reason is not None:
                refusals[reason.code] += 1
                break
        else:
            rank = (-_score(request, node, context, scores), node.name)
            if best is None or rank < best:
                best, chosen = rank, node.id
    return Placement(chosen, _ordered(refusals))


def explain(snapshot: Snapshot, request: PlacementRequest, node_id: str) -> Candidate:
    """Return one node's answer; raises KeyError when there is no such node."""
    return _candidate(request, snapshot.nodes[node_id], context_of(snapshot, request))


def _candidate(request: PlacementRequest, node: NodeView, context: Context) -> Candidate:
    answers = (entry.check(request, node, context) for entry in FILTERS)
    reasons = tuple(reason for reason in answers if reason is not None)
    if reasons:
        return Candidate(node=node.id, node_name=node.name, fits=False, reasons=reasons)
    scores = _concerned(request)
    return Candidate(
        node=node.id,
        node_name=node.name,
        fits=True,
        score=_score(request, node, context, scores),
        scores=tuple(
            ScoreTerm(s.name, s.measure(request, node, context), s.weight, s.meaning)
            for s in scores
        ),
    )


def _concerned(request: PlacementRequest) -> list[Score]:
    return [score for score in SCORES if score.concerns(request)]


def _score(
    request: PlacementRequest, node: NodeView, context: Context, scores: list[Score]
) -> float:
    total = weights = 0.0
    for score in scores:
        total += score.weight * score.measure(request, node, context)
        weights += score.weight
    return round(total / weights, SCORE_DIGITS)


def _ordered(refusals: Counter[ReasonCode]) -> dict[ReasonCode, int]:
    """Return the counts, most frequent first, equal ones in the enum's order."""
    order = list(ReasonCode)
    return dict(sorted(refusals.items(), key=lambda item: (-item[1], order.index(item[0]))))
