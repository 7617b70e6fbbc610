"""What connects simulated nodes: addresses, cut links, relays, and the migrations between them.

A migration is libvirt's and QEMU's work, so it goes on when the agent that asked for it is gone. It
ends as those of libvirt 9.0 do, also badly: a relay that breaks between the destination's resume
and libvirt's word about it makes the source go on as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from agent.hypervisor import Outgoing, Transfer
from agent.relay import RelayTarget
from agent.simulated_guest import SimulatedDomain
from shared.errors import HypervisorError, StateConflict, Unavailable
from shared.model import ObservedPower
from shared.moves import MigrationFigures
from shared.units import MIB

if TYPE_CHECKING:
    from agent.simulated_driver import SimulatedNodeState


class TravelTimes(Struct, frozen=True, kw_only=True):
    """How long the parts of a migration take; ``reply_s``: from the resume to the source's word."""

    prepare_s: float = 0.2
    transfer_s: float = 1.0
    switch_s: float = 0.1
    # Of which, at its end, the domain is one that stays and the guest does not run yet.
    stays_s: float = 0.03
    reply_s: float = 0.01
    confirm_s: float = 0.8
    # libvirt's keepalive between the two: 5 s, six times.
    silence_s: float = 30.0


class SimulatedRelay:
    """One relay by its name: a destination admits, a source opens, either side may end it."""

    def __init__(self, destination: str, source_node: str, token: str) -> None:
        self.destination = destination
        self.source_node = source_node
        self.token = token
        self.used = False
        self.ended = False
        self.travel: Travel | None = None

    def end(self) -> None:
        self.ended = True
        if self.travel is not None:
            self.travel.relay_broke()


class SimulatedFabric:
    """All nodes by their address. ``linked`` says whether bytes pass between two of them."""

    def __init__(
        self,
        times: TravelTimes | None = None,
        linked: Callable[[str, str], bool] = lambda one, other: True,
    ) -> None:
        self.times = times or TravelTimes()
        self.linked = linked
        self.nodes: dict[str, SimulatedNodeState] = {}
        self.relays: dict[str, SimulatedRelay] = {}
        self._shared_pools: dict[str, dict[str, int]] = {}
        self._tokens = 0

    def shared_pool(self, name: str) -> dict[str, int]:
        """Return the volumes of a pool that the nodes share: sizes in GiB by name."""
        return self._shared_pools.setdefault(name, {})

    def next_token(self) -> str:
        self._tokens += 1
        return f"token-{self._tokens}"

    def relay(self, uri: str, source: str) -> SimulatedRelay:
        """Return the relay behind a URI. Raises HypervisorError as libvirt does."""
        relay = self.relays.get(uri)
        if relay is None or relay.ended or relay.travel is not None:
            raise HypervisorError(f"{uri} takes no connection")
        if not self.linked(source, relay.destination):
            raise HypervisorError(f"{relay.destination} is out of reach")
        if not self.nodes[relay.destination].libvirtd_runs:
            raise HypervisorError(f"the libvirtd of {relay.destination} does not answer")
        return relay


class SimulatedRelays:
    """Implements ``agent.relay.Relays`` for one node's agents."""

    def __init__(self, fabric: SimulatedFabric, address: str) -> None:
        self._fabric = fabric
        self._address = address

    async def admit(self, name: str, source_node: str) -> str:
        known = self._fabric.relays.get(name)
        if known is not None and (known.used or known.ended):
            raise StateConflict(f"the relay {name} was used already")
        token = self._fabric.next_token()
        self._fabric.relays[name] = SimulatedRelay(self._address, source_node, token)
        return token

    async def withdraw(self, name: str) -> None:
        known = self._fabric.relays.get(name)
        if known is None or not known.used:
            await self.revoke(name)

    async def revoke(self, name: str) -> None:
        known = self._fabric.relays.get(name)
        if known is None:
            known = self._fabric.relays[name] = SimulatedRelay(self._address, "", "")
        known.end()

    async def open(self, name: str, target: RelayTarget, token: str) -> str:
        relay = self._fabric.relays.get(name)
        if relay is None or relay.ended or relay.used or relay.token != token:
            raise Unavailable(f"{target.node_name} does not take the token of {name}")
        if not self._fabric.linked(self._address, relay.destination):
            raise Unavailable(f"{target.node_name} is out of reach")
        relay.used = True
        return name

    async def close(self, name: str) -> None:
        relay = self._fabric.relays.get(name)
        if relay is not None and relay.used:
            relay.end()


class Travel:
    """One migration under way; ``done`` ends with it, by an error when libvirt says one."""

    def __init__(
        self,
        fabric: SimulatedFabric,
        source: SimulatedNodeState,
        domain: SimulatedDomain,
        relay: SimulatedRelay,
        outgoing: Outgoing,
    ) -> None:
        self._fabric = fabric
        self._source = source
        self._domain = domain
        self._relay = relay
        self._outgoing = outgoing
        self._destination = fabric.nodes[relay.destination]
        self._arrival: SimulatedDomain | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._replied = False
        self._silent_since: float | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(lambda done: done.exception())
        self.began_s = asyncio.get_running_loop().time()
        relay.travel = self
        domain.travel = self
        self._after(fabric.times.prepare_s, self._prepared)

    @property
    def domain_name(self) -> str:
        return self._domain.name

    @property
    def switched(self) -> bool:
        """Whether the guest has gone on on the destination."""
        return self._arrival is not None and not self._arrival.incoming

    def transfer(self) -> Transfer:
        """Return how far it is; nothing is known before the destination is ready."""
        spec = self._outgoing.definition.spec
        if self._arrival is None:
            return Transfer(
                bytes_done=0, bytes_total=0, bytes_remaining=0, iteration=0, bytes_per_s=0.0
            )
        times, total = self._fabric.times, spec.memory_mib * MIB
        elapsed_s = asyncio.get_running_loop().time() - self.began_s - times.prepare_s
        # What changes meanwhile is sent once more: one byte is left until the switch.
        done = min(total - 1, int(total * elapsed_s / times.transfer_s))
        return Transfer(
            bytes_done=done,
            bytes_total=total,
            bytes_remaining=total - done,
            iteration=1,
            bytes_per_s=total / times.transfer_s,
        )

    def abort(self, why: str) -> None:
        """End it, as far as it can be ended; from the switch on it cannot."""
        if not self.switched:
            self._fail(why)

    def relay_broke(self) -> None:
        if self.done.done():
            return
        if not self.switched:
            self._fail("the connection to the destination broke")
        elif not self._replied:
            # libvirt 9.0 takes it for a failure, and lets the guest go on here as well.
            self._finish("the connection to the destination broke")
            self._domain.come_back()

    def source_libvirtd_died(self) -> None:
        """The daemon's work ends with it; the guest is paused for good if it had switched."""
        if not self.done.done() and not self.switched:
            self._drop_arrival()
            if self._domain.is_active():
                self._domain.come_back(returned=False)
        self._finish("the source's libvirtd died")

    def destination_libvirtd_died(self) -> None:
        if not self.switched:
            self._drop_arrival()
        self.relay_broke()

    def guest_ended(self) -> None:
        """The domain on one of the two nodes has ended while it was moved."""
        if self.done.done() or self.switched:
            return
        self._fail("the domain ended while it was moved")

    def _prepared(self) -> None:
        if not self._reachable(self._prepared):
            return
        if not self._destination.libvirtd_runs:
            self._fail("the destination's libvirtd does not answer")
            return
        name = self._domain.name
        if name in self._destination.domains:
            self._fail(f"a domain {name!r} is there already")
            return
        missing = self._missing_volumes()
        if missing:
            self._fail(f"the destination has no volume {missing[0]!r}")
            return
        self._arrival = self._destination.receive(self._outgoing.definition)
        self._arrival.travel = self
        self._after(self._fabric.times.transfer_s, self._switch)

    def _switch(self) -> None:
        if self._reachable(self._switch):
            times = self._fabric.times
            self._domain.go_away()
            self._after(times.switch_s - times.stays_s, self._persist)

    def _persist(self) -> None:
        if not self._reachable(self._persist):
            return
        assert self._arrival is not None, "it was prepared"
        self._arrival.stays = True
        self._after(self._fabric.times.stays_s, self._resume)

    def _resume(self) -> None:
        if not self._reachable(self._resume):
            return
        assert self._arrival is not None, "it was prepared"
        self._arrival.arrive(self._domain, paused=self._outgoing.paused)
        self._after(self._fabric.times.reply_s, self._reply)

    def _reply(self) -> None:
        if self._reachable(self._reply):
            self._replied = True
            self._after(self._fabric.times.confirm_s, self._confirm)

    def _confirm(self) -> None:
        """The source forgets the domain, as it was asked to."""
        total_s = asyncio.get_running_loop().time() - self.began_s
        self._source.figures[self._domain.name] = MigrationFigures(
            total_ms=round(total_s * 1000),
            downtime_ms=round(self._fabric.times.switch_s * 1000),
            transferred_bytes=self._outgoing.definition.spec.memory_mib * MIB,
        )
        self._finish(None)
        self._source.forget(self._domain)

    def _reachable(self, again: Callable[[], None]) -> bool:
        """Whether the two nodes hear each other; else wait, and break off after a long silence."""
        if self._fabric.linked(self._source.address, self._destination.address):
            self._silent_since = None
            return True
        now_s = asyncio.get_running_loop().time()
        if self._silent_since is None:
            self._silent_since = now_s
        if now_s - self._silent_since >= self._fabric.times.silence_s:
            self.relay_broke()
        else:
            self._after(1.0, again)
        return False

    def _missing_volumes(self) -> list[str]:
        return [
            volume
            for pool, volume in self._outgoing.definition.volumes()
            if volume not in self._destination.pools.get(pool, {})
        ]

    def _fail(self, why: str) -> None:
        """Nothing has gone on over there: the guest goes on here."""
        if self.done.done():
            return
        self._drop_arrival()
        self._finish(why)
        if self._domain.is_active():
            self._domain.come_back(returned=self._domain.power is ObservedPower.PAUSED)

    def _drop_arrival(self) -> None:
        if self._arrival is not None and self._arrival.incoming:
            arrival, self._arrival = self._arrival, None
            arrival.travel = None
            if not arrival.stays:
                self._destination.forget(arrival)
            elif arrival.is_active():
                arrival.end(ObservedPower.STOPPED)

    def _finish(self, why: str | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.done.done():
            return
        self._domain.travel = None
        if self._arrival is not None:
            self._arrival.travel = None
        if why is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(HypervisorError(why))

    def _after(self, delay_s: float, then: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, then)
