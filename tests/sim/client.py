"""A user: asks through the services, as the API calls them, at whatever replica it comes to.

It tries again where the API says so, and keeps apart what was accepted, what was refused and what
nobody can know. It tells the judge before it asks for a deletion, when an operation was
acknowledged, and what it was shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from controlplane.api.endpoint import CATCH_UP_S
from controlplane.commands.terms import RequestKey
from controlplane.services.cluster import finalize_upgrade
from controlplane.services.context import Context, Permission, Principal, Scope
from controlplane.services.drains import drain_node
from controlplane.services.migrations import migrate_vm
from controlplane.services.nodes import set_cordon
from controlplane.services.operations import cancel_operation, get_operation
from controlplane.services.requests import CordonOrder, DrainOrder, MigrateOrder, NewVm, VmQuery
from controlplane.services.views import OperationView, VmList
from controlplane.services.vms import act_on_vm, create_vm, delete_vm, list_vms
from controlplane.services.writes import carry_out
from controlplane.state import ClusterState
from shared.errors import NotFound, NovacronError, OutcomeUnknown, Unavailable
from shared.model import VmSpec
from shared.states import OPERATION_ENDS, VmAction
from tests.sim.cluster import SimCluster
from tests.sim.ledger import Acknowledged, DeleteAsked, Ledger, ToldGone, Viewed
from tests.sim.previous_processes import serve_use_case
from tests.sim.process import current

# How long a client goes on trying, and how long it follows what was accepted.
PATIENCE_S = 30.0
FOLLOW_S = 40.0
# How many requests carry a key; and of these, how many are sent again although they were answered.
KEYED_SHARE = 0.5
REPEATED_SHARE = 0.3
LOOK_LIMIT = 500
FINALIZE_AGAIN_S = 5.0

ANYWHERE = MigrateOrder()
T = TypeVar("T")
Result = TypeVar("Result")
Work = Callable[[Context, Principal], Awaitable[OperationView]]


class Client:
    """One user with the admin role; ``outcomes`` counts how its calls ended.

    Half of what it asks for carries an idempotency key: then it asks again when it cannot know what
    became of it, and now and then although it knows. Not so while replicas of 0.1 may lead, which
    look past keys (``has_keys``).
    """

    def __init__(self, cluster: SimCluster, ledger: Ledger, rng: random.Random) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._rng = rng
        self._principal = Principal("user", frozenset(Permission), Scope())
        self.has_keys = True
        self._keys = 0
        self._floor = 0
        self.outcomes: Counter[str] = Counter()

    async def create(self, name: str, spec: VmSpec) -> None:
        new = NewVm(name=name, spec=spec)
        await self._ask("create", use(create_vm, new))

    async def act(self, vm_id: str, action: VmAction) -> None:
        deadline_s = self._rng.choice((0.0, 2.0, 10.0))
        await self._ask(action.value, use(act_on_vm, vm_id, action, deadline_s), vm_id)

    async def migrate(self, vm_id: str) -> None:
        await self._ask("migrate", use(migrate_vm, vm_id, ANYWHERE), vm_id)

    async def drain(self, node_name: str) -> str:
        """Return how it ended."""
        return await self._ask("drain", use(drain_node, node_name, DrainOrder()))

    async def cancel(self, operation_id: str) -> None:
        await self._ask("cancel", use(cancel_operation, operation_id))

    async def uncordon(self, node_name: str) -> None:
        """Open a node again; one that is open, or is being drained, says so."""

        async def uncordon(context: Context, who: Principal) -> None:
            await served(set_cordon, context, who, node_name, CordonOrder(), cordoned=False)

        with contextlib.suppress(NovacronError):
            await self._patiently(uncordon)

    async def finalize_upgrade(self) -> None:
        """Let the cluster have what only the present release knows, however long that takes."""

        async def finalize(context: Context, who: Principal) -> None:
            await served(finalize_upgrade, context, who)

        while True:
            try:
                await self._patiently(finalize)
                return
            except NovacronError as error:
                self._cluster.trace.note(f"client: finalize: {error.code}")
            await asyncio.sleep(FINALIZE_AGAIN_S)

    async def delete(self, vm_id: str) -> None:
        self._cluster.observe(DeleteAsked(vm_id))
        await self._ask("delete", use(delete_vm, vm_id), vm_id)

    def _about(self, vm_id: str, work: Work) -> Work:
        """Tell the judge when a write of a VM hears that there is no such VM."""

        async def about(context: Context, who: Principal) -> OperationView:
            try:
                return await work(context, who)
            except NotFound:
                if vm_id and isinstance(context, Context) and not _has_missed_something():
                    self._cluster.observe(ToldGone(vm_id))
                raise

        return about

    async def look(self) -> None:
        """List the VMs at any replica, which must know at least what was seen before."""
        floor = self._floor

        async def look(context: Context, who: Principal) -> VmList:
            if _has_missed_something():
                raise Unavailable("a watch of this replica has left something out")
            if not isinstance(context, Context):
                raise Unavailable("lists of 0.1 are of no moment")
            await _caught_up(context.state, floor)
            return await list_vms(context, who, VmQuery(limit=LOOK_LIMIT))

        try:
            shown = await self._once(look)
        except (Unavailable, OutcomeUnknown):
            return
        revision = _revision(shown.revision)
        self._floor = max(floor, revision)
        vms = tuple((vm.id, _revision(vm.revision)) for vm in shown.items)
        self._cluster.observe(Viewed(revision, floor, vms))

    async def _ask(self, verb: str, work: Work, vm_id: str = "") -> str:
        """Ask, follow what was accepted, and return how it ended: a state, or what was refused.

        ``vm_id``: which VM is to be changed.
        """
        key = self._new_key() if self.has_keys and self._rng.random() < KEYED_SHARE else ""
        work = self._about(vm_id, _write(key, work))
        try:
            operation = await self._patiently(work, repeatable=bool(key))
            self._cluster.observe(Acknowledged(operation.id, operation.target, key))
            if key and self._rng.random() < REPEATED_SHARE:
                again = await self._patiently(work, repeatable=True)
                self._cluster.observe(Acknowledged(again.id, again.target, key))
            ended = await self._follow(operation)
        except NovacronError as error:
            ended = error.code
            self._cluster.trace.note(f"client: {verb}: {ended}")
        self.outcomes[f"{verb} {ended}"] += 1
        return ended

    def _new_key(self) -> str:
        self._keys += 1
        return f"key-{self._keys}"

    async def _patiently(
        self, work: Callable[[Context, Principal], Awaitable[T]], *, repeatable: bool = False
    ) -> T:
        """Try until there is an answer that says more than "later". Raises what then remains.

        ``repeatable``: to ask again does no harm when nobody knows what became of it.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + PATIENCE_S
        while True:
            try:
                return await self._once(work)
            except Unavailable:
                if loop.time() >= end_s:
                    raise
            except OutcomeUnknown:
                if not repeatable or loop.time() >= end_s:
                    raise
            await asyncio.sleep(self._rng.uniform(0.05, 1.0))

    async def _follow(self, operation: OperationView) -> str:
        """Wait for the end as ``?wait`` does; whoever cannot tell any more is not asked again."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + FOLLOW_S
        while loop.time() < end_s:
            try:
                seen = await self._once(use(get_operation, operation.id, 10.0))
            except (Unavailable, OutcomeUnknown, NotFound):
                await asyncio.sleep(1.0)
                continue
            if seen.state in OPERATION_ENDS:
                return seen.state.value
        return "open"

    async def _once(self, work: Callable[[Context, Principal], Awaitable[T]]) -> T:
        """Call a replica; one that dies meanwhile leaves the outcome unknown."""
        chosen = self._rng.choice(list(self._cluster.replicas.values()))
        process, control_plane = chosen.process, chosen.control_plane or chosen.previous
        if process is None or control_plane is None:
            raise Unavailable(f"{chosen.name} does not accept connections")

        async def serve() -> T:
            return await work(control_plane.context(), self._principal)

        call = process.spawn(serve(), f"{chosen.name}-request")
        await asyncio.wait({call})
        if call.cancelled():
            raise OutcomeUnknown("the connection broke before the answer")
        return call.result()


async def served(
    use_case: Callable[..., Awaitable[Result]], context: Any, *arguments: Any, **named: Any
) -> Result:
    """Call a use case of the release that the replica is of."""
    if isinstance(context, Context):
        return await use_case(context, *arguments, **named)
    result: Result = await serve_use_case(use_case, context, *arguments, **named)
    return result


def use(use_case: Callable[..., Awaitable[OperationView]], *arguments: Any) -> Work:
    return lambda context, who: served(use_case, context, who, *arguments)


def _write(key: str, work: Work) -> Work:
    """Do as the API does with a write, which may carry an idempotency key."""
    terms = RequestKey(id=key, principal="user", fingerprint=key) if key else None

    async def write(context: Context, who: Principal) -> OperationView:
        if not isinstance(context, Context):
            return await work(context, who)
        result, _ = await carry_out(
            context, who, terms, lambda: None, lambda tied_to: work(tied_to, who)
        )
        assert isinstance(result, OperationView), "every write here is accepted as one"
        return result

    return write


def _has_missed_something() -> bool:
    """Whether this replica cannot know better before it compares its memory with etcd's list."""
    process = current()
    return process is not None and process.missed_events


async def _caught_up(state: ClusterState, floor: int) -> None:
    """Do as the API does with X-Novacron-Min-Revision."""
    try:
        async with asyncio.timeout(CATCH_UP_S):
            while state.revision < floor:
                await state.changes.wait()
    except TimeoutError:
        raise Unavailable("this replica has not seen the revision asked for yet") from None


def _revision(text: str) -> int:
    """Return etcd's revision from a VM's or a list's, whose other parts never change here."""
    return int(text.split(".")[1])
