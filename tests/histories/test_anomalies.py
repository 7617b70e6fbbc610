"""The judge finds what was planted, and nothing in the same history as it should have been.

Each story is told by a cell that keeps its promises; then one or two answers are changed into what
a cell would have said that had broken one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace

from tests.histories.answers import MOVED_ON, NAME_TAKEN, NOT_FOUND
from tests.histories.judge import NO_ORDER, judge
from tests.histories.record import Attempt, Freshness, Kind, Outcome, Page, Seen
from tests.histories.toy_cell import ToyCell, Wish

A, B = "a", "b"
OLDER_THAN_ASKED = "older than what was asked for"
KEY_AGAIN = "a key was done again"
ANOMALIES: list[Anomaly] = []


class Anomaly(Struct, frozen=True):
    """``kinds``: what the judge says of it, among other things perhaps."""

    name: str
    kinds: frozenset[str]
    tell: Callable[[ToyCell], Callable[[list[Attempt]], None]]


def anomaly(
    *kinds: str,
) -> Callable[[Callable[[ToyCell], Callable[[list[Attempt]], None]]], None]:
    def planted(tell: Callable[[ToyCell], Callable[[list[Attempt]], None]]) -> None:
        ANOMALIES.append(Anomaly(tell.__name__, frozenset(kinds), tell))

    return planted


def create(cell: ToyCell, value: str, name: str = A, **more: Any) -> Attempt:
    return cell.do(Wish(client=1, kind=Kind.CREATE, name=name, value=value, **more))


def change(cell: ToyCell, value: str, name: str = A, client: int = 1, **more: Any) -> Attempt:
    return cell.do(Wish(client=client, kind=Kind.CHANGE, name=name, value=value, **more))


def delete(cell: ToyCell, name: str = A, **more: Any) -> Attempt:
    return cell.do(Wish(client=1, kind=Kind.DELETE, name=name, **more))


def get(
    cell: ToyCell, name: str = A, freshness: Freshness = Freshness.LATEST, **more: Any
) -> Attempt:
    more.setdefault("client", 2)
    return cell.do(Wish(kind=Kind.GET, name=name, freshness=freshness, **more))


def edit(attempts: list[Attempt], position: int, **changes: Any) -> None:
    attempts[position] = replace(attempts[position], **changes)


def shows(attempts: list[Attempt], position: int, other: int, **changes: Any) -> None:
    """Let an answer show what another one showed, at its own revision."""
    seen = attempts[other].seen
    assert seen is not None
    edit(attempts, position, outcome=Outcome.OK, code="", seen=replace(seen, **changes))


@anomaly(NO_ORDER)
def two_changes_for_one_version_succeed(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell)
    etag = cell.etag(A)
    change(cell, "v1", if_match=etag)
    change(cell, "v2", client=2, if_match=etag)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 3, 2, value="v2", etag='"1.4"')
        edit(attempts, 3, revision="1.4.0")

    return plant


@anomaly(NO_ORDER)
def a_change_succeeds_on_a_version_that_was_overwritten(
    cell: ToyCell,
) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    change(cell, "v1")
    etag = cell.etag(A)
    change(cell, "v2")
    get(cell)
    cell.do(Wish(client=2, kind=Kind.CONFIRM, name=A, if_match=etag))

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 4, 1)
        edit(attempts, 4, revision=attempts[1].revision)

    return plant


@anomaly(NO_ORDER)
def a_read_misses_what_was_acknowledged(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell)
    change(cell, "v1")
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 3, 1)

    return plant


@anomaly(NO_ORDER)
def a_read_shows_what_nobody_wrote(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell, freshness=Freshness.ANY)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 1, 1, value="v7")

    return plant


@anomaly(NO_ORDER, "one version with two ETags")
def a_change_of_unknown_outcome_is_made_twice(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    change(cell, "v1", lost=True)
    get(cell)
    change(cell, "v2", client=3)
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 4, 2, etag='"1.5"')
        edit(attempts, 4, revision="1.5.0")

    return plant


@anomaly(NO_ORDER, "one key became two things", KEY_AGAIN)
def a_key_is_done_twice(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    first = create(cell, "v0", key="k")
    delete(cell)
    cell.again(1, first)
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 2, replayed=False, operation_id="op-9", target="vm-9", revision="1.4.0")
        again = Seen(name=A, id="vm-9", born="v0", value="v0", etag='"1.4"')
        edit(attempts, 3, outcome=Outcome.OK, code="", seen=again, revision="1.4.0")

    return plant


@anomaly("a key that was done was tried again", NO_ORDER)
def a_key_that_was_done_finds_its_own_name_taken(
    cell: ToyCell,
) -> Callable[[list[Attempt]], None]:
    first = create(cell, "v0", key="k")
    delete(cell)
    get(cell)
    cell.again(1, first)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 3, outcome=Outcome.DENIED, code=NAME_TAKEN, replayed=False)
        edit(attempts, 3, operation_id="", target="")

    return plant


@anomaly(NO_ORDER, "two states at one revision")
def what_was_deleted_comes_back(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell)
    delete(cell)
    get(cell)
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 4, 1)

    return plant


@anomaly(NO_ORDER, "still there at its deletion's revision")
def a_deletion_is_acknowledged_and_not_made(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell)
    delete(cell)
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 3, 1)

    return plant


@anomaly(NO_ORDER, OLDER_THAN_ASKED)
def a_session_sees_less_than_before(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell, freshness=Freshness.SESSION)
    change(cell, "v1", client=3)
    get(cell, freshness=Freshness.SESSION)
    get(cell, freshness=Freshness.SESSION)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 4, 1)
        edit(attempts, 4, revision=attempts[1].revision)

    return plant


@anomaly(NO_ORDER)
def one_name_is_taken_twice(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0", late=150)
    create(cell, "v1")

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 1, outcome=Outcome.OK, code="", operation_id="op-2", target="vm-2")

    return plant


@anomaly("an older state than at an earlier revision")
def a_list_is_of_two_moments(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "a0", A)
    create(cell, "b0", B)
    change(cell, "a1", A)
    get(cell, A)
    change(cell, "b1", B)
    cell.do(Wish(client=3, kind=Kind.LIST))

    def plant(attempts: list[Attempt]) -> None:
        (page,) = attempts[5].pages
        old = Seen(name=A, id="vm-1", born="a0", value="a0", etag='"1.2"')
        edit(attempts, 5, pages=(replace(page, seen=(old, page.seen[1])),))

    return plant


@anomaly("pages of several moments")
def pages_of_one_walk_are_of_two_moments(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "a0", A)
    create(cell, "b0", B)
    cell.do(Wish(client=3, kind=Kind.LIST))
    whole = cell.attempts[-1]
    first, second = whole.pages[0].seen
    parts = (
        replace(whole.pages[0], seen=(first,)),
        Page(replica="r2", revision=whole.pages[0].revision, seen=(second,)),
    )
    cell.attempts[-1] = replace(whole, pages=parts)

    def plant(attempts: list[Attempt]) -> None:
        one, other = attempts[2].pages
        edit(attempts, 2, pages=(one, replace(other, revision="1.4.0")))

    return plant


@anomaly("a list shows a VM twice, or one that it should not")
def a_walk_shows_one_thing_twice(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "a0", A)
    create(cell, "b0", B)
    cell.do(Wish(client=3, kind=Kind.LIST))

    def plant(attempts: list[Attempt]) -> None:
        (page,) = attempts[2].pages
        edit(attempts, 2, pages=(replace(page, seen=(page.seen[0], *page.seen)),))

    return plant


@anomaly(NO_ORDER)
def a_list_misses_what_is_there(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "a0", A)
    cell.do(Wish(client=3, kind=Kind.LIST, freshness=Freshness.LATEST))

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 1, pages=(replace(attempts[1].pages[0], seen=()),))

    return plant


@anomaly(NO_ORDER)
def an_acknowledged_change_is_lost_with_its_leader(
    cell: ToyCell,
) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    change(cell, "v1")
    change(cell, "v2", client=2, lost=True, in_vain=True)
    get(cell)
    get(cell, client=4)

    def plant(attempts: list[Attempt]) -> None:
        # The new leader's revision is another's: only the values tell.
        lost = Seen(name=A, id="vm-1", born="v0", value="v0", etag='"1.2"')
        edit(attempts, 3, seen=lost)
        edit(attempts, 4, seen=lost)

    return plant


@anomaly(NO_ORDER)
def a_change_that_was_refused_is_made(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    change(cell, "v1")
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 1, outcome=Outcome.NOT_DONE, status=503, code="leadership_lost")

    return plant


@anomaly(NO_ORDER)
def a_condition_is_denied_though_it_holds(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell)
    change(cell, "v1", if_match=cell.etag(A), freshness=Freshness.LATEST)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 2, outcome=Outcome.DENIED, code=MOVED_ON, seen=None)

    return plant


@anomaly(NO_ORDER)
def a_condition_is_denied_before_it_fails(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    """Two changes are for one version; the loser is told before the winner's change is made."""
    create(cell, "v0")
    get(cell)
    etag = cell.etag(A)
    change(cell, "v1", if_match=etag, early=10, late=300)
    change(cell, "v2", client=2, if_match=etag, freshness=Freshness.LATEST)
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        shows(attempts, 4, 1)

    return plant


@anomaly(NO_ORDER)
def a_name_is_refused_that_nobody_has(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    delete(cell)
    create(cell, "v1")

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 2, outcome=Outcome.DENIED, code=NAME_TAKEN, target="", operation_id="")

    return plant


@anomaly(NO_ORDER)
def what_is_there_is_not_found(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    change(cell, "v1", freshness=Freshness.LATEST)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 1, outcome=Outcome.DENIED, code=NOT_FOUND, seen=None)

    return plant


@anomaly(NO_ORDER)
def a_change_that_was_made_is_not_found(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    change(cell, "v1")
    cell.do(Wish(client=3, kind=Kind.LIST))
    delete(cell)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 1, outcome=Outcome.DENIED, code=NOT_FOUND, seen=None)

    return plant


@anomaly("acknowledged with a revision before its commit")
def an_acknowledgement_is_before_its_commit(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    get(cell)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 0, revision="1.1.0")

    return plant


@anomaly("committed before a revision that was seen before it was asked for")
def commits_are_against_the_clock(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "a0", A)
    create(cell, "b0", B)
    get(cell, B)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 0, revision="1.3.0")

    return plant


@anomaly("one id, two VMs")
def an_id_is_used_again(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0")
    delete(cell)
    create(cell, "v1")

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 2, target=attempts[0].target)

    return plant


@anomaly("an answer that nobody documented")
def an_answer_is_none_of_the_documented(cell: ToyCell) -> Callable[[list[Attempt]], None]:
    create(cell, "v0", lost=True)

    def plant(attempts: list[Attempt]) -> None:
        edit(attempts, 0, status=500, code="internal")

    return plant


@pytest.mark.parametrize("case", ANOMALIES, ids=lambda case: case.name)
def test_a_planted_anomaly_is_found_and_nothing_without_it(case: Anomaly) -> None:
    cell = ToyCell(A, B)
    plant = case.tell(cell)
    assert judge(cell.history()) == []

    plant(cell.attempts)
    found = judge(cell.history())
    assert case.kinds <= {each.kind for each in found}, [str(each) for each in found]


def test_enough_is_planted() -> None:
    assert len(ANOMALIES) >= 10
    assert len({case.name for case in ANOMALIES}) == len(ANOMALIES)


def test_a_violation_is_told_with_few_attempts() -> None:
    """Among a hundred reads and forty changes, those that cannot be together."""
    cell = ToyCell(A)
    create(cell, "v0")
    for number in range(1, 40):
        change(cell, f"v{number}", client=1 + number % 3)
        get(cell, client=4)
        get(cell, client=5, freshness=Freshness.ANY, behind=3)
    position = 3 * 20
    shows(cell.attempts, position + 2, position - 7)
    (told,) = (each for each in judge(cell.history()) if each.kind == NO_ORDER)
    assert len(told.lines) <= 8, str(told)
