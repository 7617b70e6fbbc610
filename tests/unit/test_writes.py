"""A write is refused on the newest memory only, and is never done twice for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from controlplane.commands.draft import Command
from controlplane.commands.newest import ProveNewest
from controlplane.commands.terms import Decided, OnTerms
from controlplane.commands.vm_patch import ChangeVm
from controlplane.commands.vms import CreateVm, DeleteVm
from controlplane.services.context import Submit
from controlplane.services.writes import tied
from shared.errors import NoLeader, NovacronError, OutcomeUnknown
from shared.model import DEFAULT_TENANT
from tests.unit.api_world import SYSTEM, World, new_vm
from tests.unit.core_world import spec

VM = "/api/v1/vms/web-1"
LABELS = {"labels": {"count": "1"}}
MERGE = {"content-type": "application/merge-patch+json"}


class Follower(World):
    """A replica whose memory is the newest from the first command on that it submits.

    ``behind`` is done by others before that; ``asked`` are the commands.
    """

    def __init__(self, behind: Callable[[World], object]) -> None:
        self.commands: list[Command[Any]] = []
        self._behind: Callable[[World], object] | None = behind
        super().__init__()

    async def submit(self, command: Command[Any]) -> Any:
        self.commands.append(command.command if isinstance(command, OnTerms) else command)
        if self._behind is not None:
            behind, self._behind = self._behind, None
            behind(self)
        return self.apply(command)

    def kinds(self) -> list[type[Any]]:
        return [type(each) for each in self.commands]


def make_vm(world: World) -> None:
    world.apply(CreateVm(name="web-1", tenant=DEFAULT_TENANT, labels={}, spec=spec(), by=SYSTEM))


def nothing(world: World) -> None:
    pass


def failing(error: NovacronError) -> Submit:
    async def submit(command: Command[Any]) -> Any:
        raise error

    return cast(Submit, submit)


async def test_what_this_replica_has_not_seen_yet_is_found() -> None:
    world = Follower(make_vm)
    async with world.client() as client:
        answer = await client.patch(VM, json=LABELS, headers=MERGE)
    assert answer.status_code == 200
    assert answer.json()["labels"] == {"count": "1"}
    assert world.kinds() == [ProveNewest, ChangeVm]


async def test_what_it_may_be_matched_with_is_found_too() -> None:
    world = Follower(make_vm)
    async with world.client() as client:
        answer = await client.delete(VM, headers={"If-Match": "*"})
    assert answer.status_code == 202
    assert world.kinds() == [ProveNewest, DeleteVm]


async def test_a_node_that_has_just_joined_has_what_a_vm_needs() -> None:
    world = Follower(lambda world: world.join("n2"))
    world.join("n1", pools=())
    body = new_vm(disks=[{"name": "root", "size_gib": 1}])
    async with world.client() as client:
        answer = await client.post("/api/v1/vms", json=body)
    assert answer.status_code == 202, answer.text
    assert world.kinds() == [ProveNewest, CreateVm]


async def test_a_name_that_another_vm_has_by_now_is_looked_up_again() -> None:
    def replace_vm(world: World) -> None:
        old = world.state.vm_id_by_name(DEFAULT_TENANT, "web-1")
        assert old is not None
        world.apply(DeleteVm(vm_id=old, by=SYSTEM))
        assert world.state.vms == {}
        make_vm(world)

    world = Follower(replace_vm)
    make_vm(world)
    async with world.client() as client:
        answer = await client.patch(VM, json=LABELS, headers=MERGE)
    assert answer.status_code == 200, answer.text
    assert world.kinds() == [ChangeVm, ProveNewest, ChangeVm]


async def test_what_is_not_there_is_said_so_after_one_look() -> None:
    world = Follower(nothing)
    async with world.client() as client:
        answer = await client.patch(VM, json=LABELS, headers=MERGE)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert world.kinds() == [ProveNewest]


@pytest.mark.parametrize("error", [NoLeader("nobody leads"), OutcomeUnknown("no answer")])
async def test_while_nobody_knows_better_the_client_is_to_try_again(error: NovacronError) -> None:
    world = World()
    world.context = tied(world.context, failing(error))
    async with world.client() as client:
        answer = await client.patch(VM, json=LABELS, headers=MERGE)
    assert answer.status_code == 503
    assert answer.json()["retryable"]
    assert answer.json()["code"] != "outcome_unknown"


async def test_a_change_that_was_made_is_not_made_again() -> None:
    world = Follower(nothing)
    make_vm(world)
    commit = world.submit

    async def deleted_at_once(command: Command[Any]) -> Any:
        done = await commit(command)
        assert isinstance(done, Decided)
        world.apply(DeleteVm(vm_id=done.result, by=SYSTEM))
        return done

    world.context = tied(world.context, cast(Submit, deleted_at_once))
    async with world.client() as client:
        answer = await client.patch(VM, json=LABELS, headers=MERGE)
    assert (answer.status_code, answer.json()["code"]) == (404, "deleted_since")
    assert world.kinds() == [ChangeVm]
