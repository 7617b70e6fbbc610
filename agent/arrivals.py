"""A destination's part in migrations: make ready, let the source in, leave nothing if it fails.

Works under the VM's lock. Never starts a guest, and never ends one that has run here.
"""

from __future__ import annotations

import contextlib

from agent.fence import Fence
from agent.hypervisor import Hypervisor
from agent.inventory import NodeFacts
from agent.orders import copied_volumes, definition_of, delete_copies, end_of, relay_name
from agent.relay import Relays
from shared.errors import DomainNotFound, StateConflict
from shared.moves import EndState
from shared.protocol import Desired, MigrationOrder, MigrationTarget

# What may be ended: nothing of it has ever run here.
_NEVER_RAN = frozenset({EndState.INCOMING, EndState.NEVER_RAN, EndState.READY})


class Arrivals:
    """Knows whom it has admitted, until it is told to forget; an agent's restart forgets too."""

    def __init__(
        self, hypervisor: Hypervisor, fence: Fence, relays: Relays, node: NodeFacts
    ) -> None:
        self._hypervisor = hypervisor
        self._fence = fence
        self._relays = relays
        self._node = node
        self._targets: dict[str, tuple[int, MigrationTarget]] = {}

    def target(self, desired: Desired, order: MigrationOrder) -> MigrationTarget | None:
        """Return what is made ready for an order; None when nothing is."""
        known = self._targets.get(desired.vm_id)
        return known[1] if known is not None and known[0] == order.generation else None

    async def forget(self, vm_id: str) -> None:
        """Take note that nobody comes for a VM any more."""
        known = self._targets.pop(vm_id, None)
        if known is not None:
            await self._relays.withdraw(relay_name(vm_id, known[0]))

    async def prepare(self, desired: Desired, order: MigrationOrder) -> None:
        """Make room: volumes of the exact size, a relay for this one migration, no old domain.

        Raises NovacronError: why it cannot be done.
        """
        if order.boot_id != self._node.boot_id:
            raise StateConflict("this node has booted since it was chosen")
        if self.target(desired, order) is not None:
            return  # Only once: data may be coming into these volumes by now.
        begun = self._has_begun(desired, order)
        if not begun:
            await self._check_volumes(desired, order)
        # From now on nothing may start this generation here: it comes running.
        await self._fence.expect_arrival(desired.vm_id, order.generation)
        await self._clear_place(desired, order)
        # A log of an earlier stay would seem to be of now.
        await self._hypervisor.delete_console_log(desired.domain_name)
        for pool, volume, size_gib in copied_volumes(desired, order):
            if begun:  # by an earlier agent, which may have made it with less than its size
                await self._hypervisor.delete_volume(pool, volume)
            await self._hypervisor.ensure_volume(pool, volume, size_gib)
        await self._admit(desired, order)

    async def receive(self, desired: Desired, order: MigrationOrder) -> None:
        """Keep the relay open; an agent that was started anew admits the source once more."""
        if order.boot_id == self._node.boot_id:
            with contextlib.suppress(StateConflict):  # the relay is in use already
                await self._admit(desired, order)

    async def clean(self, desired: Desired, order: MigrationOrder) -> bool:
        """Let nothing come any more, and leave nothing, unless it has run here; True when so.

        Raises StateConflict for a newer generation.
        """
        await self._relays.revoke(relay_name(desired.vm_id, order.generation))
        await self.forget(desired.vm_id)
        await self._fence.use_generation(desired.vm_id, order.generation)
        domain = await self._hypervisor.domain(desired.domain_name)
        if domain is not None and domain.generation > order.generation:
            raise StateConflict("a newer generation of it is here, and these are its disks")
        if not await self._end_what_comes(desired, order):
            return False
        if self._has_begun(desired, order):
            await delete_copies(self._hypervisor, desired, order)
        await self._hypervisor.delete_console_log(desired.domain_name)
        return True

    def _has_begun(self, desired: Desired, order: MigrationOrder) -> bool:
        """Whether anything was made here for this very order, by whichever agent."""
        return self._fence.facts(desired.vm_id).arrival == order.generation

    async def _end_what_comes(self, desired: Desired, order: MigrationOrder) -> bool:
        """End and forget a domain that has not run; True when there is none (any more)."""
        name, generation = desired.domain_name, order.generation
        end = await end_of(self._hypervisor, desired, order)
        if end.state is EndState.INCOMING:
            self._fence.check(desired.term, desired.vm_id, desired.revision)
            with contextlib.suppress(DomainNotFound):  # its libvirtd was faster
                await self._hypervisor.stop(name, generation)
            # If it went on in that very moment, it is one that has run, and is left defined.
            end = await end_of(self._hypervisor, desired, order)
        if end.state in _NEVER_RAN:
            self._fence.check(desired.term, desired.vm_id, desired.revision)
            await self._hypervisor.stop(name, generation)
            await self._hypervisor.undefine(name, generation)
            end = await end_of(self._hypervisor, desired, order)
        return end.state is EndState.ABSENT

    async def _check_volumes(self, desired: Desired, order: MigrationOrder) -> None:
        """Raise StateConflict for a volume that is here before anything was made for the order.

        It may be the guest's own disk, in a pool that nobody has said to be shared.
        """
        for pool, volume, _ in copied_volumes(desired, order):
            if volume in await self._hypervisor.volumes(pool):
                raise StateConflict(f"pool {pool!r} has a volume {volume!r} here already")

    async def _clear_place(self, desired: Desired, order: MigrationOrder) -> None:
        domain = await self._hypervisor.domain(desired.domain_name)
        if domain is None:
            return
        if domain.vm_id != desired.vm_id or domain.generation >= order.generation:
            raise StateConflict(f"another domain has the name {desired.domain_name!r} here")
        await self._hypervisor.undefine(desired.domain_name, domain.generation, keep_log=True)

    async def _admit(self, desired: Desired, order: MigrationOrder) -> None:
        if self.target(desired, order) is not None:
            return
        layout = await self._hypervisor.layout(definition_of(desired, order.generation))
        facts = await self._hypervisor.facts()
        token = await self._relays.admit(relay_name(desired.vm_id, order.generation), order.peer)
        target = MigrationTarget(
            node_name=self._node.name,
            address=self._node.address,
            relay=self._node.relay_address,
            token=token,
            tls=facts.migration_tls,
            layout=layout,
        )
        self._targets[desired.vm_id] = (order.generation, target)
