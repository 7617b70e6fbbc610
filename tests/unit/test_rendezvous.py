"""Rendezvous hashing: even, stable, and moving no more than it must."""

from __future__ import annotations

from collections import Counter

from shared.rendezvous import in_order

THINGS = [f"node-{n}" for n in range(3000)]
PLACES = ("r1:8444", "r2:8444", "r3:8444")


def test_things_are_spread_evenly() -> None:
    firsts = Counter(in_order(thing, PLACES)[0] for thing in THINGS)
    assert set(firsts) == set(PLACES)
    assert max(firsts.values()) < 1.1 * len(THINGS) / len(PLACES)


def test_the_order_of_places_does_not_matter() -> None:
    for thing in THINGS[:100]:
        assert in_order(thing, PLACES) == in_order(thing, reversed(PLACES))
        assert sorted(in_order(thing, PLACES)) == sorted(PLACES)


def test_only_what_went_to_a_place_moves_when_it_is_gone() -> None:
    moved: Counter[str] = Counter()
    for thing in THINGS:
        first, second, _ = in_order(thing, PLACES)
        left = in_order(thing, PLACES[1:])[0]
        if first == PLACES[0]:
            assert left == second
            moved[left] += 1
        else:
            assert left == first
    assert max(moved.values()) < 1.2 * min(moved.values())


def test_it_is_the_same_in_every_process() -> None:
    assert in_order("node-1", PLACES) == ["r1:8444", "r3:8444", "r2:8444"]
