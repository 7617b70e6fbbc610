"""This node's part in migrations: what each stage of an order asks of a source or a destination.

Works under the VM's lock, from what libvirt and the fence say; only a transfer goes on beside it. A
migration is begun once, whatever crashes. This module never decides where a guest is: it reports
what its end is, and holds a guest that libvirt resumed by itself until the other end is proven
empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from agent.arrivals import Arrivals
from agent.fence import Departure, Fence
from agent.hypervisor import Hypervisor, MigrationEnd, Outgoing
from agent.inventory import NodeFacts
from agent.journey import Journey, Travel, follow
from agent.orders import arrives_paused, definition_of, delete_copies, end_of, relay_name
from agent.relay import Relays, RelayTarget
from shared.errors import (
    DomainNotFound,
    HypervisorError,
    HypervisorUnavailable,
    NovacronError,
    StateConflict,
)
from shared.model import Problem
from shared.moves import EndState, MigrationFigures, MigrationStage
from shared.problems import problem_of
from shared.protocol import (
    Desired,
    Intent,
    MigrationOrder,
    MigrationProgress,
    MigrationReport,
    MigrationRole,
    MigrationTarget,
)

log = logging.getLogger(__name__)


class Migrations:
    """``wake(vm_id)`` has a VM looked at again; ``progress`` takes figures on their way."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        fence: Fence,
        relays: Relays,
        node: NodeFacts,
        wake: Callable[[str], None],
        progress: Callable[[MigrationProgress], None],
    ) -> None:
        self._hypervisor = hypervisor
        self._fence = fence
        self._relays = relays
        self._arrivals = Arrivals(hypervisor, fence, relays, node)
        self._wake = wake
        self._progress = progress
        self._journeys: dict[str, Journey] = {}
        self._reflexes: dict[asyncio.Task[None], None] = {}

    async def work(self, desired: Desired) -> MigrationReport:
        """Do what the order's stage asks for as far as it goes now, and return how far that is.

        Raises HypervisorUnavailable, StaleTerm, StaleRevision, GenerationMismatch: look again.
        """
        order = desired.migration
        assert order is not None, "there is an order"
        self._fence.check(desired.term, desired.vm_id, desired.revision)
        work = _WORK.get((order.role, order.stage), Migrations._look)
        return await work(self, desired, order)

    async def refused(self, desired: Desired, error: HypervisorError) -> MigrationReport:
        """Return how far it is, with what the hypervisor has against going further."""
        assert desired.migration is not None, "there is an order"
        return await self._look(desired, desired.migration, fault=error)

    def is_under_way(self, vm_id: str) -> bool:
        """Whether a transfer away from here is being followed."""
        journey = self._journeys.get(vm_id)
        return journey is not None and journey.under_way

    async def settle(self, vm_id: str) -> None:
        """Take note that a VM has no open migration here (any more)."""
        await self._arrivals.forget(vm_id)
        journey = self._journeys.pop(vm_id, None)
        if journey is not None:
            journey.task.cancel()
        await self._fence.end_departure(vm_id)

    def domain_changed(self, name: str) -> None:
        """Hold a guest at once that has come back while its migration was open; all of them when
        events were lost.
        """
        for departure in self._fence.departures().values():
            if name in ("", departure.domain_name):
                reflex = asyncio.ensure_future(self._reflex(departure))
                self._reflexes[reflex] = None
                reflex.add_done_callback(self._reflexes.pop)

    def close(self) -> None:
        """Stop following; what is under way goes on."""
        for task in (*self._reflexes, *(journey.task for journey in self._journeys.values())):
            task.cancel()

    async def _reflex(self, departure: Departure) -> None:
        with contextlib.suppress(NovacronError):  # looked at again under the VM's lock
            await self._hold(departure)

    async def _hold(self, departure: Departure) -> None:
        held = await self._hypervisor.hold(departure.domain_name, departure.source_generation)
        if held:
            log.error(
                "%s ran again although it may have moved: held until that is known",
                departure.domain_name,
            )

    # The source.

    async def _transfer(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        if self._departure(desired, order) is None:
            if order.target is None:
                return await self._look(desired, order)
            await self._begin(desired, order, order.target)
        else:
            await self._follow_again(desired, order)
        return await self._look(desired, order)

    async def _begin(
        self, desired: Desired, order: MigrationOrder, target: MigrationTarget
    ) -> None:
        """Begin the one transfer of this claim; that it is begun is durable before it is."""
        await self._depart(desired, order)
        self._fence.check(desired.term, desired.vm_id, desired.revision)
        outgoing = Outgoing(
            definition=definition_of(desired, order.generation),
            uri="",
            address=target.address,
            node_name=target.node_name,
            layout=target.layout,
            copied=order.copied,
            tls=target.tls,
            paused=arrives_paused(desired),
        )

        journey = Journey()

        async def travel() -> None:
            uri = await self._relays.open(
                relay_name(desired.vm_id, order.generation),
                RelayTarget(target.relay, target.node_name),
                target.token,
            )
            if journey.unwanted:
                raise StateConflict("the migration was cancelled before it began")
            await self._hypervisor.migrate(
                desired.domain_name,
                order.source_generation,
                replace(outgoing, uri=uri),
            )

        self._set_out(journey, desired, order, travel)

    async def _follow_again(self, desired: Desired, order: MigrationOrder) -> None:
        """Take up a transfer that goes on though nobody follows it: of an earlier agent, or one
        that libvirtd, held up, has gone on with.
        """
        known = self._journeys.get(desired.vm_id)
        if known is not None and known.under_way:
            return
        end = await self._end(desired, order)
        if end.state is EndState.MOVING:
            journey = Journey()
            journey.fault = _said(known)
            self._set_out(journey, desired, order, None)

    def _set_out(
        self,
        journey: Journey,
        desired: Desired,
        order: MigrationOrder,
        travel: Travel | None,
    ) -> None:
        self._journeys[desired.vm_id] = journey
        work = follow(journey, self._hypervisor, desired, order, travel, self._progress)
        journey.task = asyncio.ensure_future(work)
        journey.task.add_done_callback(lambda _: self._wake(desired.vm_id))

    async def _depart(self, desired: Desired, order: MigrationOrder) -> None:
        departure = Departure(
            generation=order.generation,
            source_generation=order.source_generation,
            domain_name=desired.domain_name,
        )
        await self._fence.depart(desired.vm_id, departure)

    async def _abort(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        await self._depart(desired, order)
        await self._end_journey(desired, order)
        return await self._look(desired, order)

    async def _end_journey(self, desired: Desired, order: MigrationOrder) -> None:
        """Have a transfer end, now or as soon as libvirt has begun it."""
        await self._follow_again(desired, order)
        journey = self._journeys.get(desired.vm_id)
        if journey is not None and journey.under_way:
            journey.unwanted = True
            with contextlib.suppress(DomainNotFound):
                await self._hypervisor.abort_migration(desired.domain_name, order.source_generation)

    async def _resume(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        """The other end is proven empty: whatever paused the guest here, it goes on."""
        await self._relays.close(relay_name(desired.vm_id, order.generation))
        end = await self._end(desired, order)
        if end.state is EndState.MOVING:
            # Begun late: without its relay it comes to nothing, and it has to be over first.
            await self._end_journey(desired, order)
            return await self._look(desired, order)
        paused = end.state in (EndState.HELD, EndState.AWAY)
        if paused and desired.intent is Intent.RUN:
            self._fence.check(desired.term, desired.vm_id, desired.revision)
            await self._hypervisor.resume(desired.domain_name, order.source_generation)
        await self._fence.end_departure(desired.vm_id)
        return await self._look(desired, order, settled=True)

    async def _leave(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        """The other node owns the VM: leave nothing here but the console log of its time here.

        While libvirt is about to do so by itself it is left alone: a domain that is ended in the
        middle of a migration may take the other end with it.
        """
        name = desired.domain_name
        if order.operation and await self._is_under_way(desired, order):
            return await self._look(desired, order)
        domain = await self._hypervisor.domain(name)
        if domain is not None:
            if domain.vm_id != desired.vm_id or domain.generation > order.source_generation:
                fault = StateConflict(f"a newer domain has the name {name!r} here")
                return await self._look(desired, order, fault=fault)
            self._fence.check(desired.term, desired.vm_id, desired.revision)
            await self._hypervisor.stop(name, domain.generation)
            await self._hypervisor.undefine(name, domain.generation, keep_log=True)
        await delete_copies(self._hypervisor, desired, order)
        if order.purge:
            await self._hypervisor.delete_console_log(name)
        if order.operation:
            await self._relays.close(relay_name(desired.vm_id, order.generation))
        report = await self._look(desired, order, settled=True)
        await self.settle(desired.vm_id)
        return report

    async def _is_under_way(self, desired: Desired, order: MigrationOrder) -> bool:
        await self._follow_again(desired, order)
        return self.is_under_way(desired.vm_id)

    # The destination.

    async def _prepare(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        try:
            await self._arrivals.prepare(desired, order)
        except HypervisorUnavailable:
            raise
        except NovacronError as error:
            log.warning("%s cannot come here: %s", desired.name, error)
            return await self._look(desired, order, fault=error)
        return await self._look(desired, order, settled=True)

    async def _receive(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        await self._arrivals.receive(desired, order)
        return await self._look(desired, order)

    async def _clean(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        try:
            settled = await self._arrivals.clean(desired, order)
        except StateConflict as conflict:
            return await self._look(desired, order, fault=conflict)
        return await self._look(desired, order, settled=settled)

    # Both.

    async def _look(
        self,
        desired: Desired,
        order: MigrationOrder,
        *,
        settled: bool = False,
        fault: NovacronError | None = None,
    ) -> MigrationReport:
        journey = self._journeys.get(desired.vm_id)
        end = await self._end(desired, order)
        # In the stage RESUME it is to run; and what has not set out cannot have moved.
        departure = self._departure(desired, order)
        if end.returned and departure is not None and order.stage is not MigrationStage.RESUME:
            await self._hold(departure)
            end = await self._end(desired, order)
        return MigrationReport(
            generation=order.generation,
            role=order.role,
            stage=order.stage,
            end=end.state,
            over=self._is_over(desired, order, end),
            settled=settled,
            target=self._arrivals.target(desired, order),
            fault=_said(journey) if fault is None else problem_of(fault),
            figures=await self._figures(desired),
        )

    async def _figures(self, desired: Desired) -> MigrationFigures | None:
        """Return what the transfer took; libvirt's word about it may come a little later."""
        journey = self._journeys.get(desired.vm_id)
        if journey is None or journey.under_way:
            return None
        return await self._hypervisor.figures(desired.domain_name)

    async def _end(self, desired: Desired, order: MigrationOrder) -> MigrationEnd:
        return await end_of(self._hypervisor, desired, order)

    def _is_over(self, desired: Desired, order: MigrationOrder, end: MigrationEnd) -> bool:
        begun = self._departure(desired, order) is not None
        under_way = self.is_under_way(desired.vm_id)
        return begun and not under_way and end.state is not EndState.MOVING

    def _departure(self, desired: Desired, order: MigrationOrder) -> Departure | None:
        """Return that the order's transfer was begun here; None while it was not."""
        departure = self._fence.facts(desired.vm_id).departure
        begun = departure is not None and departure.generation >= order.generation
        return departure if begun else None


_Role, _Stage = MigrationRole, MigrationStage
_Work = Callable[[Migrations, Desired, MigrationOrder], Awaitable[MigrationReport]]
# What is not here only looks.
_WORK: dict[tuple[MigrationRole, MigrationStage], _Work] = {
    (_Role.SOURCE, _Stage.TRANSFER): Migrations._transfer,
    (_Role.SOURCE, _Stage.ABORT): Migrations._abort,
    (_Role.SOURCE, _Stage.RESUME): Migrations._resume,
    (_Role.SOURCE, _Stage.FINALIZE): Migrations._leave,
    (_Role.DESTINATION, _Stage.PREPARE): Migrations._prepare,
    (_Role.DESTINATION, _Stage.TRANSFER): Migrations._receive,
    (_Role.DESTINATION, _Stage.CLEAN): Migrations._clean,
}


def _said(journey: Journey | None) -> Problem | None:
    return None if journey is None else journey.fault
