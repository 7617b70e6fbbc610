"""After a restore of etcd: asks all nodes what they have, and has the records say so.

A guest on its way from one node to another could be missed by both, if each were asked once. So
every node is asked until nothing leaves it: from then on nothing can, since none takes an order of
before the restore. Only then all are asked anew, and those answers hold together. A node that comes
later, and VMs that could not be decided on, are looked at in the same way, as often as it takes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Mapping

from controlplane.commands.draft import Author
from controlplane.commands.recovery import EndRecovery, NoteTold, SettleVm
from controlplane.commands.restored import is_recovering, must_tell
from controlplane.commands.whereabouts import Seen
from controlplane.sessions.hub import Hub
from controlplane.state import ClusterState
from controlplane.store.applier import Applier
from shared.codec import unpack
from shared.errors import NovacronError, StateConflict
from shared.model import Cluster
from shared.moves import EndState
from shared.protocol import Query, QueryKind, Survey

log = logging.getLogger(__name__)

# An agent that is up has greeted by then (its back-off ends at 5 s, its greeting at 15 s): also one
# whose node joined after the backup, so that nobody knows to wait for it.
WAIT_MIN_S = 20.0
# A node that came late is looked at this often until nothing leaves it; VMs that could not be
# decided on, and what no record is of, wait for a person.
AGAIN_S = 5.0
SELDOM_S = 30.0
# A survey of 500 domains takes a node a second.
ASKED_AT_ONCE_MAX = 50
SETTLED_AT_ONCE_MAX = 100

Surveys = Mapping[str, Survey]


class Recover:
    """Made for one term; what nodes have said counts for that term only."""

    name = "recovery"
    period_s = 1.0

    def __init__(self, applier: Applier, state: ClusterState, hub: Hub) -> None:
        self._applier = applier
        self._state = state
        self._hub = hub
        self._by = Author("leader")
        self._numbers = itertools.count(1)
        self._began_s: float | None = None
        self._next_s = 0.0
        self._seldom_s = 0.0
        # Nodes that nothing leaves any more, and what all have told since that is so of all.
        self._quiet: set[str] = set()
        self._surveys: dict[str, Survey] = {}
        self._said: dict[str, str] = {}

    async def reconcile(self) -> None:
        cluster = self._state.cluster()
        if cluster is None or cluster.restored is None:
            return
        if self._began_s is None:
            self._began_s = asyncio.get_running_loop().time()
        if is_recovering(cluster):
            await self._recover(cluster)
        else:
            await self._catch_up(cluster)

    async def _recover(self, cluster: Cluster) -> None:
        awaited = [
            node_id
            for node_id, stored in self._state.nodes.items()
            if not stored.record.recovery.gone
        ]
        first = await self._ask(cluster, [each for each in awaited if each not in self._quiet])
        self._quiet.update(node_id for node_id, survey in first.items() if not _leaving(survey))
        if wait := self._why_wait(awaited, first):
            self._surveys.clear()
            self._say("recovery", wait)
            return
        missing = [each for each in awaited if each not in self._surveys]
        self._surveys.update(await self._ask(cluster, missing))
        if any(each not in self._surveys for each in awaited):
            return
        heard = {node_id: self._surveys[node_id] for node_id in awaited}
        try:
            await self._settle(self._state.unproven_vm_ids(), heard)
            await self._note_told(heard)
            await self._applier.submit(EndRecovery(by=self._by))
        except StateConflict:
            self._surveys.clear()  # a node has booted, or joined, since it was asked
            raise
        log.info("recovered: what %d nodes have is recorded", len(heard))

    def _why_wait(self, awaited: list[str], first: Surveys) -> str:
        """Return what has to come before all nodes can be asked for good; empty when they can."""
        leaving = sorted(vm_id for survey in first.values() for vm_id in _leaving(survey))
        if leaving:
            return f"{', '.join(leaving)} leave their nodes just now"
        unheard = sorted(self._name(each) for each in awaited if each not in self._quiet)
        if unheard:
            return f"{', '.join(unheard)} must tell first what runs there"
        assert self._began_s is not None, "it has begun"
        waited_s = asyncio.get_running_loop().time() - self._began_s
        return "" if waited_s >= WAIT_MIN_S else "nodes that nobody knows of may yet be heard"

    async def _catch_up(self, cluster: Cluster) -> None:
        """Look at nodes that came after all, and at VMs that were not decided on."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_s:
            return
        self._next_s = now_s + AGAIN_S
        untold = [
            node_id
            for node_id in self._hub.connected()
            if (stored := self._state.nodes.get(node_id)) is not None
            and must_tell(cluster, stored.record)
        ]
        held = self._state.unproven_vm_ids()
        beside = [
            node_id
            for node_id, stored in self._state.nodes.items()
            if stored.record.recovery.unrecorded
        ]
        if not untold and (now_s < self._seldom_s or not (held or beside)):
            return
        self._seldom_s = now_s + SELDOM_S
        if not untold and not held:
            await self._note_told(await self._ask(cluster, beside))
            return
        before = await self._ask(cluster, self._hub.connected())
        moving = {vm_id for survey in before.values() for vm_id in _leaving(survey)}
        surveys = await self._ask(cluster, before)
        late = {each: surveys[each] for each in untold if each in surveys}
        late = {each: told for each, told in late.items() if not _leaving(before[each])}
        await self._settle([vm_id for vm_id in held if vm_id not in moving], surveys)
        others = {seen.vm_id for told in late.values() for seen in told.domains}
        await self._settle(sorted(others - set(held)), late)
        await self._note_told(
            {**{each: surveys[each] for each in beside if each in surveys}, **late}
        )

    async def _settle(self, vm_ids: list[str], surveys: Surveys) -> None:
        """Have the records of VMs say what nodes have told. Raises StateConflict."""
        seen: dict[str, list[Seen]] = {vm_id: [] for vm_id in vm_ids}
        for node_id, survey in surveys.items():
            for sighting in survey.domains:
                if sighting.vm_id in seen:
                    found = Seen(
                        node_id=node_id,
                        node_name=self._name(node_id),
                        boot_id=survey.boot_id,
                        sighting=sighting,
                    )
                    seen[sighting.vm_id].append(found)
        heard = frozenset(surveys)
        for start in range(0, len(vm_ids), SETTLED_AT_ONCE_MAX):
            chunk = vm_ids[start : start + SETTLED_AT_ONCE_MAX]
            commands = [
                SettleVm(vm_id=vm_id, seen=tuple(seen[vm_id]), heard=heard, by=self._by)
                for vm_id in chunk
            ]
            outcomes = await asyncio.gather(
                *(self._applier.submit(command) for command in commands), return_exceptions=True
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            for vm_id in chunk:
                self._warn(vm_id)

    async def _note_told(self, surveys: Surveys) -> None:
        for node_id, survey in surveys.items():
            unknown = {each.vm_id for each in survey.domains} - self._state.vms.keys()
            told = NoteTold(node_id=node_id, unrecorded=tuple(sorted(unknown)), by=self._by)
            await self._applier.submit(told)

    async def _ask(self, cluster: Cluster, node_ids: Iterable[str]) -> dict[str, Survey]:
        """Return what those of the nodes tell that can be asked now."""
        slots = asyncio.Semaphore(ASKED_AT_ONCE_MAX)

        async def ask(node_id: str) -> Survey | NovacronError:
            query = Query(
                id=f"survey-{next(self._numbers)}",
                kind=QueryKind.SURVEY,
                vm_id="",
                domain_name="",
            )
            try:
                async with slots:
                    return unpack(await self._hub.ask(node_id, query), Survey)
            except NovacronError as error:
                return error

        asked = [node_id for node_id in node_ids if self._hub.greeted(node_id)]
        answers = await asyncio.gather(*(ask(node_id) for node_id in asked))
        told: dict[str, Survey] = {}
        for node_id, answer in zip(asked, answers, strict=True):
            if isinstance(answer, NovacronError):
                self._say(node_id, f"{self._name(node_id)} does not tell what it has: {answer}")
            elif answer.epoch == cluster.epoch:
                told[node_id] = answer
        return told

    def _warn(self, vm_id: str) -> None:
        """Tell, once, of a VM that could not be decided on."""
        stored = self._state.vms.get(vm_id)
        unproven = None if stored is None else stored.record.status.unproven
        if stored is not None and unproven is not None:
            self._say(vm_id, f"{stored.record.name} is left alone: {unproven.why}")

    def _say(self, about: str, what: str) -> None:
        if self._said.get(about) != what:
            self._said[about] = what
            log.warning("%s", what)

    def _name(self, node_id: str) -> str:
        stored = self._state.nodes.get(node_id)
        return node_id if stored is None else stored.record.name


def _leaving(survey: Survey) -> list[str]:
    """Return the VMs that are being moved away from a node."""
    return [each.vm_id for each in survey.domains if each.end is EndState.MOVING]
