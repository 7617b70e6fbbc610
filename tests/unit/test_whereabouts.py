"""Where a VM is, by what nodes tell: total over any two domains, and running guests win."""

from __future__ import annotations

from itertools import product

import pytest

from controlplane.commands.whereabouts import Found, Nowhere, Seen, Undecided, whereabouts
from shared.model import ObservedPower
from shared.moves import EndState
from shared.protocol import Sighting

E = EndState
PAUSED = (E.HELD, E.AWAY, E.READY)
AT_REST = (E.DOWN, E.NEVER_RAN)
MOVING = (E.MOVING, E.INCOMING, E.UNKNOWN, E.ABSENT)


def seen(node: str, generation: int, end: EndState, *, departing: bool = False) -> Seen:
    sighting = Sighting(
        vm_id="vm-1",
        generation=generation,
        end=end,
        power=ObservedPower.UNKNOWN,
        departing=departing,
    )
    return Seen(node_id=node, node_name=node, boot_id="boot-1", sighting=sighting)


def place(*found: Seen, recorded: int = 5) -> tuple[str, ...] | str:
    """Return the node, and "rests" or "doubtful" with it; or one word for no answer."""
    where = whereabouts(found, recorded)
    if isinstance(where, Found):
        marks = [*(["rests"] if where.at_rest else []), *([] if where.sure else ["doubtful"])]
        return (where.seen.node_id, *marks)
    return "undecided" if isinstance(where, Undecided) else "nowhere"


def test_one_that_runs_or_is_paused_is_where_the_vm_is() -> None:
    for end in (E.RUNNING, *PAUSED):
        assert place(seen("a", 5, end)) == ("a",)
        assert place(seen("a", 9, end)) == ("a",)


def test_a_guest_that_runs_wins_over_a_record_that_knows_a_later_generation() -> None:
    assert place(seen("a", 3, E.RUNNING), recorded=5) == ("a",)


def test_what_stands_still_does_not() -> None:
    assert place(seen("a", 3, E.HELD), recorded=5) == "undecided"
    assert place(seen("a", 3, E.DOWN), recorded=5) == "nowhere"


def test_one_at_rest_is_found_at_rest() -> None:
    for end in AT_REST:
        assert place(seen("a", 5, end)) == ("a", "rests")
    assert place() == "nowhere"


def test_of_domains_at_rest_the_newest_counts_wherever_it_is() -> None:
    old, new = seen("a", 5, E.DOWN), seen("b", 6, E.NEVER_RAN)
    assert place(old, new) == place(new, old) == ("b", "rests")


def test_what_had_begun_to_leave_is_not_started_or_resumed_by_itself() -> None:
    assert place(seen("a", 5, E.DOWN, departing=True)) == ("a", "rests", "doubtful")
    assert place(seen("a", 5, E.HELD, departing=True)) == "undecided"
    assert place(seen("a", 5, E.RUNNING, departing=True)) == ("a",)


@pytest.mark.parametrize("end", MOVING)
def test_nothing_is_concluded_of_what_is_on_its_way(end: EndState) -> None:
    assert place(seen("a", 5, end)) == "undecided"
    for other in EndState:
        assert place(seen("a", 5, end), seen("b", 6, other)) == "undecided"


def expected(first: EndState, second: EndState) -> tuple[str, ...] | str:
    """Return the answer for generation 5 on ``a`` and 6 on ``b``, said another way."""
    if {first, second} & set(MOVING):
        return "undecided"
    if first is E.RUNNING:
        return ("a",) if second in AT_REST else "undecided"
    if second is E.RUNNING:
        return ("b",) if first is E.AWAY or first in AT_REST else "undecided"
    if second in AT_REST:
        return "undecided" if first in PAUSED else ("b", "rests")
    return ("b",) if first in AT_REST else "undecided"


@pytest.mark.parametrize(("first", "second"), list(product(EndState, EndState)))
def test_every_pair_of_domains_has_its_answer(first: EndState, second: EndState) -> None:
    pair = (seen("a", 5, first), seen("b", 6, second))
    assert place(*pair) == place(*reversed(pair)) == expected(first, second)


def test_whatever_else_is_found_is_told_of() -> None:
    runs, rests, shell = seen("a", 6, E.RUNNING), seen("b", 5, E.DOWN), seen("c", 4, E.AWAY)
    where = whereabouts((shell, runs, rests), 5)
    assert isinstance(where, Found)
    assert where.seen is runs
    assert set(where.others) == {rests, shell}


def test_why_it_cannot_be_told_names_the_nodes() -> None:
    twice = whereabouts((seen("a", 5, E.RUNNING), seen("b", 6, E.RUNNING)), 5)
    assert isinstance(twice, Undecided)
    assert "a (generation 5) and b (generation 6)" in twice.why
    assert isinstance(whereabouts((), 0), Nowhere)
