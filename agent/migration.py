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

from agent.fence import Departure, Fence
from agent.hypervisor import (
    DomainDefinition,
    Hypervisor,
    MigrationEnd,
    Outgoing,
    volume_name,
)
from agent.inventory import NodeFacts
from agent.journey import Journey, Travel, follow
from agent.relay import Relays, RelayTarget
from shared.errors import HypervisorUnavailable, NovacronError, StateConflict
from shared.model import Power, Problem
from shared.moves import EndState, MigrationStage
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

# What may be ended on a destination: nothing of it has ever run there.
_NEVER_RAN = frozenset({EndState.INCOMING, EndState.READY})
# The same state of a domain means another thing on the node that it comes to.
_ON_DESTINATION: dict[EndState, EndState] = {
    EndState.MOVING: EndState.INCOMING,
    EndState.AWAY: EndState.INCOMING,
    EndState.HELD: EndState.READY,
}


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
        self._node = node
        self._wake = wake
        self._progress = progress
        self._journeys: dict[str, Journey] = {}
        self._targets: dict[str, tuple[int, MigrationTarget]] = {}
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

    async def settle(self, vm_id: str) -> None:
        """Take note that a VM has no open migration here (any more)."""
        self._targets.pop(vm_id, None)
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
                reflex = asyncio.ensure_future(self._hold(departure))
                self._reflexes[reflex] = None
                reflex.add_done_callback(self._reflexes.pop)

    def close(self) -> None:
        """Stop following; what is under way goes on."""
        for task in (*self._reflexes, *(journey.task for journey in self._journeys.values())):
            task.cancel()

    async def _hold(self, departure: Departure) -> None:
        with contextlib.suppress(NovacronError):  # looked at again under the VM's lock
            held = await self._hypervisor.hold(departure.domain_name, departure.source_generation)
            if held:
                log.error(
                    "%s ran again although it may have moved: held until that is known",
                    departure.domain_name,
                )

    # The source.

    async def _transfer(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        departure = self._fence.facts(desired.vm_id).departure
        if departure is None or departure.generation < order.generation:
            if order.target is None:
                return await self._look(desired, order)
            await self._begin(desired, order, order.target)
        elif desired.vm_id not in self._journeys:
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
            paused=desired.spec.migration.strict or desired.spec.power is Power.PAUSED,
        )

        async def travel() -> None:
            uri = await self._relays.open(
                _relay_name(desired, order),
                RelayTarget(target.relay, target.node_name),
                target.token,
            )
            await self._hypervisor.migrate(
                desired.domain_name,
                order.source_generation,
                replace(outgoing, uri=uri),
            )

        self._set_out(desired, order, travel)

    async def _follow_again(self, desired: Desired, order: MigrationOrder) -> None:
        """Take up a transfer that an earlier agent has begun, if it still goes on."""
        end = await self._hypervisor.migration_end(desired.domain_name)
        if end is not None and end.state is EndState.MOVING:
            self._set_out(desired, order, None)

    def _set_out(self, desired: Desired, order: MigrationOrder, travel: Travel | None) -> None:
        journey = Journey(order.generation)
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
        end = await self._hypervisor.migration_end(desired.domain_name)
        if end is not None and end.state is EndState.MOVING:
            await self._hypervisor.abort_migration(desired.domain_name, order.source_generation)
        return await self._look(desired, order)

    async def _resume(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        """The other end is proven empty: whatever paused the guest here, it goes on."""
        await self._relays.close(_relay_name(desired, order))
        end = await self._hypervisor.migration_end(desired.domain_name)
        paused = end is not None and end.state in (EndState.HELD, EndState.AWAY)
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
        name, journey = desired.domain_name, self._journeys.get(desired.vm_id)
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
        await self._delete_copies(desired, order)
        if order.purge:
            await self._hypervisor.delete_console_log(name)
        if order.operation:
            await self._relays.close(_relay_name(desired, order))
        await self.settle(desired.vm_id)
        report = await self._look(desired, order, settled=True)
        return report if journey is None else replace(report, figures=journey.figures)

    async def _is_under_way(self, desired: Desired, order: MigrationOrder) -> bool:
        if desired.vm_id not in self._journeys:
            await self._follow_again(desired, order)
        journey = self._journeys.get(desired.vm_id)
        return journey is not None and not journey.task.done()

    async def _delete_copies(self, desired: Desired, order: MigrationOrder) -> None:
        for disk in desired.spec.disks:
            if disk.name in order.copied:
                volume = volume_name(desired.vm_id, disk.name)
                await self._hypervisor.delete_volume(disk.pool, volume)

    # The destination.

    async def _prepare(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        """Make room: volumes of the exact size, a relay for this one migration, no old domain."""
        if order.boot_id != self._node.boot_id:
            fault = StateConflict("this node has booted since it was chosen")
            return await self._look(desired, order, fault=fault)
        if self._is_ready(desired, order):
            # Only once: data may be coming into these volumes by now.
            return await self._look(desired, order, settled=True)
        # From now on nothing may start this generation here: it comes running.
        await self._fence.use_generation(desired.vm_id, order.generation)
        try:
            await self._clear_place(desired, order)
            # A log of an earlier stay would seem to be of now.
            await self._hypervisor.delete_console_log(desired.domain_name)
            for disk in desired.spec.disks:
                if disk.name in order.copied:
                    volume = volume_name(desired.vm_id, disk.name)
                    await self._hypervisor.delete_volume(disk.pool, volume)
                    await self._hypervisor.ensure_volume(disk.pool, volume, disk.size_gib)
            await self._admit(desired, order)
        except HypervisorUnavailable:
            raise
        except NovacronError as error:
            log.warning("%s cannot come here: %s", desired.name, error)
            return await self._look(desired, order, fault=error)
        return await self._look(desired, order, settled=True)

    async def _clear_place(self, desired: Desired, order: MigrationOrder) -> None:
        domain = await self._hypervisor.domain(desired.domain_name)
        if domain is None:
            return
        if domain.vm_id != desired.vm_id or domain.generation >= order.generation:
            raise StateConflict(f"another domain has the name {desired.domain_name!r} here")
        await self._hypervisor.undefine(desired.domain_name, domain.generation, keep_log=True)

    def _is_ready(self, desired: Desired, order: MigrationOrder) -> bool:
        known = self._targets.get(desired.vm_id)
        return known is not None and known[0] == order.generation

    async def _admit(self, desired: Desired, order: MigrationOrder) -> None:
        if self._is_ready(desired, order):
            return
        layout = await self._hypervisor.layout(definition_of(desired, order.generation))
        facts = await self._hypervisor.facts()
        token = await self._relays.admit(_relay_name(desired, order), order.peer)
        target = MigrationTarget(
            node_name=self._node.name,
            address=self._node.address,
            relay=self._node.relay_address,
            token=token,
            tls=facts.migration_tls,
            layout=layout,
        )
        self._targets[desired.vm_id] = (order.generation, target)

    async def _receive(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        """Keep the relay open; an agent that was started anew admits the source once more."""
        if order.boot_id == self._node.boot_id:
            with contextlib.suppress(StateConflict):  # the relay is in use already
                await self._admit(desired, order)
        return await self._look(desired, order)

    async def _clean(self, desired: Desired, order: MigrationOrder) -> MigrationReport:
        """Leave nothing, and let nothing come any more; but never end what has run here."""
        await self._relays.revoke(_relay_name(desired, order))
        self._targets.pop(desired.vm_id, None)
        await self._fence.use_generation(desired.vm_id, order.generation)
        end = await self._end(desired, order)
        if end.state in _NEVER_RAN:
            self._fence.check(desired.term, desired.vm_id, desired.revision)
            await self._hypervisor.stop(desired.domain_name, order.generation)
            await self._hypervisor.undefine(desired.domain_name, order.generation)
        end = await self._end(desired, order)
        if end.state is not EndState.ABSENT:
            return await self._look(desired, order)
        await self._delete_copies(desired, order)
        await self._hypervisor.delete_console_log(desired.domain_name)
        return await self._look(desired, order, settled=True)

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
        known = self._targets.get(desired.vm_id)
        end = await self._end(desired, order)
        if end.returned and order.role is MigrationRole.SOURCE:
            await self._hypervisor.hold(desired.domain_name, order.source_generation)
            end = await self._end(desired, order)
        return MigrationReport(
            generation=order.generation,
            role=order.role,
            stage=order.stage,
            end=end.state,
            over=self._is_over(desired, order, end),
            settled=settled,
            target=known[1] if known is not None and known[0] == order.generation else None,
            fault=_said(journey) if fault is None else problem_of(fault),
            figures=None if journey is None else journey.figures,
        )

    async def _end(self, desired: Desired, order: MigrationOrder) -> MigrationEnd:
        """Return this end, as far as the domain is the order's; another generation is no end."""
        ours = order.source_generation if order.role is MigrationRole.SOURCE else order.generation
        end = await self._hypervisor.migration_end(desired.domain_name)
        if end is None or end.generation != ours:
            return MigrationEnd(generation=ours, state=EndState.ABSENT)
        if order.role is MigrationRole.DESTINATION:
            return replace(end, state=_ON_DESTINATION.get(end.state, end.state))
        return end

    def _is_over(self, desired: Desired, order: MigrationOrder, end: MigrationEnd) -> bool:
        departure = self._fence.facts(desired.vm_id).departure
        begun = departure is not None and departure.generation >= order.generation
        journey = self._journeys.get(desired.vm_id)
        under_way = journey is not None and not journey.task.done()
        return begun and not under_way and end.state is not EndState.MOVING


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


def definition_of(desired: Desired, generation: int) -> DomainDefinition:
    return DomainDefinition(
        vm_id=desired.vm_id,
        name=desired.domain_name,
        uuid=desired.domain_uuid,
        title=desired.name,
        tenant=desired.tenant,
        generation=generation,
        spec=desired.spec,
    )


def _said(journey: Journey | None) -> Problem | None:
    return None if journey is None else journey.fault


def _relay_name(desired: Desired, order: MigrationOrder) -> str:
    return f"{desired.vm_id}.{order.generation}"
