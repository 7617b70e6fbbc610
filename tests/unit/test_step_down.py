"""The leader gives its term up when it is asked to: told under that term, and over right after."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.commands.cluster import StepDown
from controlplane.election import SteppedDown
from controlplane.services.context import Leadership
from shared.errors import LeadershipLost, NoLeader, StateConflict
from shared.model import AuditRecord, Event, HistoryEntry
from tests.unit.api_world import World
from tests.unit.core_world import USER
from tests.unit.test_leader import LIMIT_S, Replica, replica, virtual

PATH = "/api/v1/cluster/actions/step-down"


def told(history: dict[int, HistoryEntry]) -> tuple[list[Event], list[str]]:
    """Return the events of leaders that stepped down, and what was asked for, by action."""
    events = [each for each in history.values() if isinstance(each, Event)]
    audits = [each.action for each in history.values() if isinstance(each, AuditRecord)]
    return [each for each in events if each.kind == "cluster.leader_stepped_down"], audits


async def step_down(it: Replica, term: str) -> str:
    return await it.leader.submit(StepDown(term=term, leader="r1", by=USER), LIMIT_S)


def test_it_is_committed_under_the_term_that_ends_after_it() -> None:
    async def main() -> None:
        async with replica() as it:
            leading = await it.win()
            term = it.leader.term
            assert term is not None
            cluster = it.state.cluster()
            assert cluster is not None
            assert await step_down(it, str(term)) == cluster.id
            assert not leading.done(), "the answer goes out first"
            with pytest.raises(SteppedDown):
                await leading
            assert it.leader.term is None
            (event,), audits = told(it.state.history)
            assert event.data == {"replica": "r1", "term": str(term)}
            assert (event.by, audits) == (USER.principal, ["cluster.step_down"])
            with pytest.raises(NoLeader):
                await it.create("late")

    virtual(main())


def test_what_is_under_way_is_committed_and_what_waits_is_refused_for_certain() -> None:
    async def main() -> None:
        async with replica() as it:
            leading = await it.win()
            asked = asyncio.ensure_future(step_down(it, str(it.leader.term)))
            beside = asyncio.ensure_future(it.create("beside"))
            await asyncio.gather(asked, beside)
            with pytest.raises(SteppedDown):
                await leading
            with pytest.raises((NoLeader, LeadershipLost)):
                await it.create("late")
            assert it.names() == {"beside"}

    virtual(main())


def test_who_leads_by_then_stays_when_another_was_meant() -> None:
    async def main() -> None:
        async with replica() as it:
            leading = await it.win()
            for _ in range(2):
                with pytest.raises(StateConflict):
                    await step_down(it, "3.1")
            # One that is refused shares its group with one that is not.
            asked = asyncio.ensure_future(step_down(it, "3.1"))
            await it.create("web")
            await asyncio.gather(asked, return_exceptions=True)
            await asyncio.sleep(10)
            assert not leading.done()
            assert told(it.state.history) == ([], ["vm.create"])
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)

    virtual(main())


async def test_the_route_answers_with_the_cluster_as_it_was() -> None:
    world = World()
    async with world.client() as client:
        answer = await client.post(PATH)
        assert answer.status_code == 200
        assert answer.json()["leader"]["term"] == "1.7"
        assert answer.json()["revision"] == answer.headers["x-novacron-revision"]
    (event,), audits = told(world.state.history)
    assert event.data == {"replica": "r1", "term": "1.7"}
    assert audits == ["cluster.step_down"]


async def test_while_nobody_leads_nobody_can_step_down() -> None:
    world = World()
    world.leadership = Leadership()
    async with world.client() as client:
        answer = await client.post(PATH)
    assert (answer.status_code, answer.json()["code"]) == (503, "no_leader")
    assert told(world.state.history) == ([], [])


@pytest.mark.parametrize(
    ("query", "body"), [("?force=true", None), ("", {"to": "r2"}), ("", [1]), ("?", "{")]
)
async def test_a_request_that_asks_for_more_ends_no_term(query: str, body: Any) -> None:
    world = World()
    async with world.client() as client:
        before = world.state.revision
        sent = {"content": body} if isinstance(body, str) else {"json": body}
        answer = await client.post(
            f"/api/v1/cluster/actions/step-down{query}", **({} if body is None else sent)
        )
        assert answer.status_code in (400, 422)
        assert world.state.revision == before
