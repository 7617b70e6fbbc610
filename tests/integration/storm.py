"""Many changes at once with a fault in the middle, and the judgement once all has settled.

What a client was told binds: what was accepted ends, exactly once, as it was asked for; what was
refused has changed nothing; only where no answer came, or one that says so, either may be true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum

from controlplane.services.views import OperationView, VmView
from shared.errors import OutcomeUnknown
from shared.model import OperationState
from tests.integration.etcd_past import check_history
from tests.integration.replica_api import Lost, Refused
from tests.integration.world import World

STANDING = tuple(f"standing-{number}" for number in range(4))
DOOMED = tuple(f"doomed-{number}" for number in range(8))
NEW = tuple(f"new-{number}" for number in range(8))
# The fault comes when so many of the storm's changes were accepted.
ACCEPTED_BEFORE_FAULT = 5


class Told(Enum):
    """What the client was told of a change."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOTHING = "nothing"


class Storm:
    """Creates and deletes VMs; ``standing`` ones are left alone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._vms: dict[str, VmView] = {}
        self._told: dict[str, Told] = {}
        self._accepted: list[OperationView] = []

    async def prepare(self) -> None:
        """Bring up the VMs that are there before the storm."""
        api = self._world.api
        names = (*STANDING, *DOOMED)
        operations = await asyncio.gather(*(api.create(name) for name in names))
        await asyncio.gather(*map(api.done, operations))
        self._vms = {vm.name: vm for vm in await api.vms()}
        assert set(self._vms) == set(names)

    async def rage(self, fault: Callable[[], None]) -> None:
        """Ask for all changes at once; ``fault`` happens while they are under way."""
        api = self._world.api
        changes: dict[str, Awaitable[OperationView]] = {}
        for doomed, new in zip(DOOMED, NEW, strict=True):
            changes[doomed] = api.delete(doomed)
            changes[new] = api.create(new)
        await asyncio.gather(*(self._ask(name, change, fault) for name, change in changes.items()))
        assert len(self._accepted) >= ACCEPTED_BEFORE_FAULT, self._told

    async def judge(self) -> None:
        """Wait until everything has settled and check it against what clients were told."""
        api = self._world.api
        for operation in await asyncio.gather(*map(api.ended, self._accepted)):
            assert operation.state is OperationState.SUCCEEDED, operation
        await self._world.agrees()
        there = {vm.name: vm for vm in await api.vms()}
        assert set(STANDING) <= set(there)
        for name in (*DOOMED, *NEW):
            told = self._told[name]
            if told is not Told.NOTHING:
                changed = told is Told.ACCEPTED
                assert (name in there) is (changed if name in NEW else not changed), (name, told)
        self._check_guests(there)
        await self._check_operations()

    async def _ask(
        self, name: str, change: Awaitable[OperationView], fault: Callable[[], None]
    ) -> None:
        try:
            self._accepted.append(await change)
        except Lost:
            self._told[name] = Told.NOTHING
        except Refused as refused:
            self._told[name] = _told_by(refused)
        else:
            self._told[name] = Told.ACCEPTED
            if len(self._accepted) == ACCEPTED_BEFORE_FAULT:
                fault()

    def _check_guests(self, there: dict[str, VmView]) -> None:
        """No guest ever ended but those whose VM was deleted, and none ran twice."""
        for vm in there.values():
            assert self._world.starts_and_ends(vm.id) == (1, 0), vm.name
        for name, vm in self._vms.items():
            if name not in there:
                assert self._world.starts_and_ends(vm.id) == (1, 1), name

    async def _check_operations(self) -> None:
        store = self._world.store()
        try:
            ends = await check_history(store)
        finally:
            await store.close()
        assert set(ends.values()) == {1}
        assert {operation.id for operation in self._accepted} <= set(ends)


def _told_by(refused: Refused) -> Told:
    """Return what a problem says; in a storm it must be one that asks to try again."""
    assert (refused.status, refused.problem.retryable) == (503, True), refused
    return Told.NOTHING if refused.problem.code == OutcomeUnknown.code else Told.REFUSED
