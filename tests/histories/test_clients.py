"""What a client asks again, in which words, and what it writes down of the answers."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.histories.clients import Board, Client, Plan
from tests.histories.https import Answer, NeverSent, NoAnswer, Wire
from tests.histories.record import (
    Attempt,
    Freshness,
    Head,
    HistoryLog,
    Kind,
    Outcome,
    read_history,
)

NAME = "h-1"
VM = {"name": NAME, "id": "vm-1", "labels": {"born": "b", "value": "v"}, "revision": "1.5"}
REVISION = {"x-novacron-revision": "1.7.9"}


class Asked:
    """One request as it would go over the wire."""

    def __init__(self, replica: str, method: str, target: str, headers: Mapping[str, str]) -> None:
        self.replica, self.method, self.target = replica, method, target
        self.headers = dict(headers)
        self.body: Any = None


Reply = Callable[[], Answer]


class Scripted(Wire):
    """Gives one reply after the other, the last one again and again."""

    def __init__(self, *replies: Reply) -> None:
        super().__init__({"r1": "", "r2": ""}, ssl.create_default_context(), "")
        self._replies = list(replies)
        self.asked: list[Asked] = []

    def ask(
        self,
        replica: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: object,
        limit_s: float,
    ) -> Answer:
        asked = Asked(replica, method, target, headers)
        asked.body = body
        self.asked.append(asked)
        return (self._replies.pop(0) if len(self._replies) > 1 else self._replies[0])()


class World:
    def __init__(self, directory: Path, *replies: Reply) -> None:
        self.wire = Scripted(*replies)
        self.board = Board("run", (NAME,))
        self._path = directory / "log"
        head = Head(seed=1, clients=1, names=(NAME,), replicas=("r1", "r2"))
        self._log = HistoryLog(self._path, head)
        self.client = Client(0, self.board, self.wire, self._log, random.Random(1))

    def attempts(self) -> list[Attempt]:
        self._log.close()
        return list(read_history(self._path).attempts)


def says(status: int, body: object = None, **headers: str) -> Reply:
    return lambda: Answer(status, REVISION | headers, body)


def problem(status: int, code: str) -> Reply:
    return says(status, {"code": code})


def breaks(error: Exception) -> Reply:
    def reply() -> Answer:
        raise error

    return reply


CHANGE = Plan(kind=Kind.CHANGE, name=NAME, value="v1", key="k1")


def test_what_was_not_done_is_asked_for_in_other_words(tmp_path: Path) -> None:
    world = World(tmp_path, problem(503, "no_leader"), says(200, VM, etag='"1.5"'))
    assert world.client.do(CHANGE) is Outcome.OK
    first, second = world.attempts()
    assert (first.outcome, first.code, first.value) == (Outcome.NOT_DONE, "no_leader", "v1")
    assert first.operation == second.operation
    assert second.value not in ("", "v1")
    assert second.key not in ("", "k1")
    assert [each.body for each in world.wire.asked] == [
        {"labels": {"value": "v1"}},
        {"labels": {"value": second.value}},
    ]


@pytest.mark.parametrize("reply", [breaks(NoAnswer("late")), problem(503, "outcome_unknown")])
def test_what_may_be_done_is_asked_for_again_under_its_key_alone(
    tmp_path: Path, reply: Reply
) -> None:
    replies = [reply, problem(503, "no_leader")] * 4 + [says(200, VM, etag='"1.5"')]
    world = World(tmp_path, *replies)
    world.client.do(CHANGE)
    attempts = world.attempts()
    assert attempts[0].outcome is Outcome.UNKNOWN
    assert {(each.value, each.key) for each in attempts} == {("v1", "k1")}


def test_what_may_be_done_is_never_asked_for_again_without_a_key(tmp_path: Path) -> None:
    world = World(tmp_path, breaks(NoAnswer("late")))
    assert world.client.do(Plan(kind=Kind.DELETE, name=NAME)) is Outcome.UNKNOWN
    assert len(world.attempts()) == 1


def test_what_never_left_is_not_done(tmp_path: Path) -> None:
    world = World(tmp_path, breaks(NeverSent("refused")), problem(404, "not_found"))
    assert world.client.do(Plan(kind=Kind.GET, name=NAME)) is Outcome.DENIED
    assert [each.outcome for each in world.attempts()] == [Outcome.NOT_DONE, Outcome.DENIED]


def test_a_session_asks_for_what_it_has_seen_and_the_latest_for_what_anybody_has(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, says(200, VM, etag='"1.5"'))
    for freshness in (Freshness.SESSION, Freshness.SESSION, Freshness.ANY):
        world.client.do(Plan(kind=Kind.GET, name=NAME, freshness=freshness))
    world.board.note("1.10.0")
    world.client.do(Plan(kind=Kind.GET, name=NAME, freshness=Freshness.LATEST))
    asked = [each.headers.get("X-Novacron-Min-Revision") for each in world.wire.asked]
    assert asked == [None, "1.7.9", None, "1.10.0"]
    # Nobody had seen anything: that one could ask for nothing.
    assert world.attempts()[0].freshness is Freshness.ANY


def test_a_walk_is_one_attempt_of_many_pages(tmp_path: Path) -> None:
    world = World(
        tmp_path,
        says(200, {"items": [VM], "next_cursor": "c", "revision": "1.6.8"}),
        says(200, {"items": [], "next_cursor": None, "revision": "1.6.8"}),
    )
    world.client.do(Plan(kind=Kind.LIST, page_limit=7))
    (walk,) = world.attempts()
    assert [page.revision for page in walk.pages] == ["1.6.8", "1.6.8"]
    (seen,) = walk.pages[0].seen
    assert (seen.born, seen.value, seen.etag) == ("b", "v", '"1.5"')
    first, second = world.wire.asked
    assert "cursor" not in first.target
    assert "cursor=c" in second.target


def test_a_walk_that_breaks_off_shows_nothing(tmp_path: Path) -> None:
    world = World(
        tmp_path,
        says(200, {"items": [VM], "next_cursor": "c", "revision": "1.6.8"}),
        problem(410, "cursor_expired"),
        says(200, {"items": [], "next_cursor": None, "revision": "1.7.9"}),
    )
    world.client.do(Plan(kind=Kind.LIST, page_limit=7))
    broken, whole = world.attempts()
    assert (broken.outcome, broken.pages) == (Outcome.NOT_DONE, ())
    assert whole.outcome is Outcome.OK


def test_a_change_of_what_is_gone_since_was_made(tmp_path: Path) -> None:
    world = World(tmp_path, problem(404, "deleted_since"))
    assert world.client.do(CHANGE) is Outcome.OK
    assert world.attempts()[0].seen is None
