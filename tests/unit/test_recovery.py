"""In which order nodes are asked after a restore; nothing falls between two of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from msgspec.structs import replace

from controlplane.commands.draft import Command
from controlplane.commands.recovery import DeclareGone
from controlplane.commands.restored import is_recovering
from controlplane.reconcilers.placement import PlaceVms
from controlplane.reconcilers.recovery import AGAIN_S, SELDOM_S, WAIT_MIN_S, Recover
from shared.codec import pack
from shared.errors import NodeUnreachable, StateConflict
from shared.model import NodeState, ObservedPower, VmPhase, condition
from shared.moves import EndState
from shared.protocol import Query, QueryKind, Sighting, Survey
from shared.states import vm_phase
from tests.sim.virtual_loop import run_virtual
from tests.unit.core_world import USER
from tests.unit.restored_world import EPOCH, POWERS, RestoredWorld

R = TypeVar("R")
RUNNING, MOVING, DOWN = EndState.RUNNING, EndState.MOVING, EndState.DOWN


class Nodes:
    """What the hub passes on: each node's domains, as the test has put them there."""

    def __init__(self, world: RestoredWorld) -> None:
        self.world = world
        self.away: set[str] = set()
        self.domains: dict[str, dict[str, tuple[int, EndState]]] = {}
        self.asked: list[str] = []
        self.before_answer: Callable[[str], None] = lambda node_id: None

    def greeted(self, node_id: str) -> bool:
        return node_id in self.world.state.nodes and node_id not in self.away

    def connected(self) -> tuple[str, ...]:
        return tuple(node_id for node_id in sorted(self.world.state.nodes) if self.greeted(node_id))

    async def ask(self, node_id: str, query: Query) -> bytes:
        assert query.kind is QueryKind.SURVEY
        await asyncio.sleep(0.01)
        if not self.greeted(node_id):
            raise NodeUnreachable("gone meanwhile")
        self.before_answer(node_id)
        self.asked.append(self.world.node(node_id).name)
        domains = tuple(
            Sighting(
                vm_id=vm_id,
                generation=generation,
                end=end,
                power=POWERS.get(end, ObservedPower.UNKNOWN),
            )
            for vm_id, (generation, end) in self.domains.get(node_id, {}).items()
        )
        boot_id = self.world.node(node_id).boot_id
        return pack(Survey(boot_id=boot_id, epoch=EPOCH, domains=domains))


class Site:
    """``web-1`` ran on n1 as generation 1 when it was backed up."""

    def __init__(self) -> None:
        self.world = RestoredWorld()
        self.vm_id = self.world.running()
        self.world.restore()
        self.nodes = Nodes(self.world)
        self.put("n1", self.vm_id, 1, RUNNING)
        applier, hub = cast(Any, self), cast(Any, self.nodes)
        self.recover = Recover(applier, self.world.state, hub)

    async def submit(self, command: Command[R]) -> R:
        return self.world.apply(command)

    def node_id(self, name: str) -> str:
        return self.world.node_id if name == "n1" else self.world.two

    def put(self, node: str, vm_id: str, generation: int, end: EndState) -> None:
        self.nodes.domains.setdefault(self.node_id(node), {})[vm_id] = (generation, end)

    def drop(self, node: str, vm_id: str) -> None:
        del self.nodes.domains[self.node_id(node)][vm_id]

    async def look(self, passes: int = 1) -> None:
        for _ in range(passes):
            await self.recover.reconcile()
            await asyncio.sleep(1)

    async def recovered(self) -> None:
        await self.look(int(WAIT_MIN_S) + 3)
        assert not self.recovering

    @property
    def recovering(self) -> bool:
        return is_recovering(self.world.state.cluster())

    def place(self) -> tuple[str | None, VmPhase]:
        vm = self.world.vm(self.vm_id)
        return vm.status.node, vm_phase(vm)


def play(story: Coroutine[Any, Any, None]) -> None:
    run_virtual(story)


def test_a_cluster_that_was_never_restored_asks_nobody() -> None:
    async def story() -> None:
        world = RestoredWorld()
        nodes = Nodes(world)
        await Recover(cast(Any, None), world.state, cast(Any, nodes)).reconcile()
        assert nodes.asked == []

    play(story())


def test_every_node_is_asked_twice_and_then_all_is_settled() -> None:
    async def story() -> None:
        site = Site()
        await site.look(int(WAIT_MIN_S))
        assert site.nodes.asked == ["n1", "n2"]
        assert site.recovering
        await site.look(2)
        assert site.nodes.asked == ["n1", "n2", "n1", "n2"]
        assert not site.recovering
        assert site.place() == (site.world.node_id, VmPhase.RUNNING)
        assert all(node.record.recovery.told == EPOCH for node in site.world.state.nodes.values())

    play(story())


def test_a_node_that_is_away_is_waited_for_however_long() -> None:
    async def story() -> None:
        site = Site()
        site.nodes.away.add(site.world.two)
        await site.look(500)
        assert site.recovering
        assert site.place() == (site.world.node_id, VmPhase.UNKNOWN)
        site.nodes.away.clear()
        await site.look(2)
        assert not site.recovering

    play(story())


def test_an_operator_ends_the_waiting_for_a_node_that_is_gone() -> None:
    async def story() -> None:
        site = Site()
        away = site.world.two
        site.nodes.away.add(away)
        await site.look(int(WAIT_MIN_S) + 5)
        site.world.put(replace(site.world.node(away), state=NodeState.SILENT))
        site.world.apply(DeclareGone(node_id=away, by=USER))
        await site.look(2)
        assert not site.recovering
        assert site.place() == (site.world.node_id, VmPhase.RUNNING)

    play(story())


def test_a_guest_that_arrives_between_two_answers_is_not_missed() -> None:
    """Its new node answers before it has come, its old one when it has gone."""

    async def story() -> None:
        site = Site()
        site.put("n1", site.vm_id, 1, MOVING)
        arrivals = {"n1": 0}

        def arrive(node_id: str) -> None:
            if node_id == site.world.node_id and site.nodes.asked.count("n1") == WAIT_MIN_S + 5:
                site.drop("n1", site.vm_id)
                site.put("n2", site.vm_id, 2, RUNNING)
                arrivals["n1"] += 1

        site.nodes.before_answer = arrive
        await site.look(int(WAIT_MIN_S) + 10)
        assert arrivals == {"n1": 1}
        assert site.place() == (site.world.two, VmPhase.RUNNING)
        assert not site.recovering

    play(story())


def test_a_node_that_nobody_knew_of_is_waited_for_once_it_has_greeted() -> None:
    async def story() -> None:
        site = Site()
        await site.look(int(WAIT_MIN_S) - 2)
        third = site.world.join("n3")
        site.nodes.domains[third] = {site.vm_id: (6, RUNNING)}
        site.drop("n1", site.vm_id)
        await site.look(5)
        assert not site.recovering
        assert site.place() == (third, VmPhase.RUNNING)

    play(story())


def test_answers_of_before_a_node_joined_or_booted_are_asked_for_anew() -> None:
    async def story() -> None:
        site = Site()
        await site.look(int(WAIT_MIN_S))

        def boot(node_id: str) -> None:
            """n2 answers, then n1 boots: what it has told before is of another boot."""
            if node_id == site.world.two and site.nodes.asked[-1] == "n1":
                site.nodes.before_answer = lambda node_id: None
                node = site.world.node(site.world.node_id)
                site.world.put(replace(node, boot_id="boot-2"))
                site.put("n1", site.vm_id, 1, DOWN)

        site.nodes.before_answer = boot
        try:
            await site.look(1)
            raise AssertionError("the answers do not hold together")
        except StateConflict:
            assert site.recovering
        await site.look(1)
        assert not site.recovering
        assert site.place() == (site.world.node_id, VmPhase.STARTING)

    play(story())


def test_new_vms_are_told_why_they_wait() -> None:
    async def story() -> None:
        site = Site()
        new, _ = site.world.create("web-2")
        place = PlaceVms(cast(Any, site), site.world.state, cast(Any, None), cast(Any, None))
        await place.reconcile()
        placed = condition(site.world.vm(new), "Placed")
        assert placed is not None
        assert "restored from a backup" in placed.message

    play(story())


def test_two_that_run_are_looked_at_until_one_has_ended() -> None:
    async def story() -> None:
        site = Site()
        site.put("n2", site.vm_id, 2, RUNNING)
        await site.recovered()
        assert site.place() == (site.world.node_id, VmPhase.UNKNOWN)
        site.drop("n1", site.vm_id)
        await site.look(int(SELDOM_S + AGAIN_S))
        assert site.place() == (site.world.two, VmPhase.RUNNING)

    play(story())


def test_a_node_that_comes_later_is_asked_and_the_rest_with_it() -> None:
    async def story() -> None:
        site = Site()
        await site.recovered()
        third = site.world.join("n3")
        site.nodes.domains[third] = {"vm-of-later": (3, RUNNING), site.vm_id: (9, DOWN)}
        await site.look(int(AGAIN_S) + 1)
        recovery = site.world.node(third).recovery
        assert (recovery.told, recovery.unrecorded) == (EPOCH, ("vm-of-later",))
        assert site.place() == (site.world.node_id, VmPhase.RUNNING)
        site.nodes.domains[third] = {}
        await site.look(int(SELDOM_S + AGAIN_S))
        assert site.world.node(third).recovery.unrecorded == ()

    play(story())


def test_a_node_that_comes_later_is_not_believed_while_something_leaves_it() -> None:
    async def story() -> None:
        site = Site()
        await site.recovered()
        third = site.world.join("n3")
        site.nodes.domains[third] = {"vm-of-later": (3, MOVING)}
        await site.look(60)
        assert site.world.node(third).recovery.told == 0
        site.nodes.domains[third] = {}
        await site.look(int(AGAIN_S) + 1)
        assert site.world.node(third).recovery.told == EPOCH

    play(story())
