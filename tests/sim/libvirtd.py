"""A node's libvirtd with its guests: what survives agents. ``agent_ports.py`` is how they reach it.

Owns the witness of guests: after every call and every event it compares which guests run with what
it saw before, and tells an observer. A call that libvirtd has taken is carried out even if the
agent that made it is dead by then, or has given up a libvirtd that hangs. When libvirtd itself is
away, guests go on. What it says of a domain is always true; what it says of an act may be a lie.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agent.hypervisor import DomainListener, Hypervisor
from agent.simulated_driver import SimulatedDriver, SimulatedNodeState
from shared.errors import HypervisorError, HypervisorUnavailable
from shared.model import ObservedPower
from tests.sim.ledger import (
    Arrived,
    Ended,
    Erased,
    Left,
    Pausing,
    Restarting,
    Resumed,
    SimEvent,
    Started,
    StillRuns,
)
from tests.sim.process import Process, later, never_mind, outside
from tests.sim.virtual_loop import true_time_s

Result = TypeVar("Result")
Observer = Callable[[SimEvent], None]

# Some calls wait for a lock, a disk, another guest; which share, the cluster's settings say.
HELD_UP_S = (1.0, 8.0)
# How often a guest is looked at that libvirt let go on.
ATTEND_S = 0.5
# As agent/libvirt_lane.py's keep-alive finds a libvirtd that hangs: its calls end, and nobody knows
# what becomes of them.
SILENCE_LIMIT_S = 20.0
# An agent looks at every domain each 30 s, by a clock that may be slow.
LOOKED_AGAIN_S = 35.0
# How much later than said an act is carried out that was said to be done.
EARLY_ANSWER_S = (0.0, 3.0)


class Libvirtd:
    """One boot of a node: ``state`` is looked at by the witness, ``driver`` is what agents use."""

    def __init__(
        self,
        node: str,
        boot_id: str,
        state: SimulatedNodeState,
        driver: SimulatedDriver,
        rng: random.Random,
        observe: Observer,
        held_up_share: float,
    ) -> None:
        self._held_up_share = held_up_share
        self.node = node
        self.boot_id = boot_id
        self.available = True
        self._over = False
        self.acts_said_to_fail = 0
        self.acts_said_to_be_done = 0
        self._answers = asyncio.Event()
        self._answers.set()
        self._hangs_since_s: float | None = None
        self._awaited: dict[asyncio.Future[None], None] = {}
        self._tells = True
        self._unheard_until_s = 0.0
        self._driver = driver
        self._state = state
        self._rng = rng
        self._observe = observe
        self._running: dict[str, int] = {}
        self._still: dict[str, int] = {}
        self._arrived: dict[str, int] = {}
        self._listeners: list[tuple[Process, DomainListener]] = []
        self._ending_by_agent: dict[str, None] = {}
        state.observe(self._domain_changed)

    def listen(self, process: Process, listener: DomainListener) -> None:
        self._listeners = [each for each in self._listeners if each[0].alive]
        self._listeners.append((process, listener))

    def go_away(self) -> None:
        """Die as a process does: calls under way have an unknown outcome, events are lost."""
        self.available = False
        self._state.libvirtd_dies()

    def come_back(self) -> None:
        if not self.available:
            self.available = True
            self.witness()
            self._state.libvirtd_returns()

    def end_boot(self) -> None:
        """See what the node's end has ended, and nothing more: the next boot has its own."""
        self.witness()
        self._over = True

    def hang(self) -> None:
        """Take calls and answer none, as when stopped; what was asked is done when it goes on."""
        self._answers.clear()
        self._hangs_since_s = true_time_s()
        later(SILENCE_LIMIT_S, self._silence_lasts, self._hangs_since_s)

    def go_on(self) -> None:
        if self._hangs_since_s is not None:
            self._answers.set()
            self._hangs_since_s = None
            self._domain_changed("")

    async def answer(self, call: asyncio.Task[Result]) -> Result:
        """Return what a call returns. Raises HypervisorUnavailable for a libvirtd that hangs."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda _: _come(answer))
        self._awaited[answer] = None
        if self._hangs_since_s is not None:
            later(SILENCE_LIMIT_S, _give_up, answer)
        try:
            await answer
        finally:
            del self._awaited[answer]
        return call.result()

    def lose_events(self) -> None:
        """Tell nobody of any change from now on."""
        self._tells = False

    def tell_events(self) -> None:
        """Tell of changes again; what was lost stays lost until an agent looks by itself."""
        if not self._tells:
            self._tells = True
            self._unheard_until_s = true_time_s() + LOOKED_AGAIN_S

    def recover(self) -> None:
        """Have nothing wrong any more."""
        self.acts_said_to_fail = self.acts_said_to_be_done = 0
        self.tell_events()
        self.go_on()
        self.come_back()

    async def call(
        self, work: Callable[[Hypervisor], Awaitable[Result]], bounds: tuple[float, float]
    ) -> Result:
        """Carry a call out, a little later; raises HypervisorUnavailable before or after it."""
        self._refuse_when_away()
        held_up = self._rng.random() < self._held_up_share
        delay_s = self._rng.uniform(*(HELD_UP_S if held_up else bounds))
        await asyncio.sleep(delay_s / 2)
        await self._answers.wait()
        self._refuse_when_away()
        try:
            result = await work(self._driver)
        finally:
            self.witness()
        await asyncio.sleep(delay_s / 2)
        await self._answers.wait()
        self._refuse_when_away()
        return result

    async def act(
        self,
        work: Callable[[Hypervisor], Awaitable[None]],
        bounds: tuple[float, float],
        *,
        by_guest: bool = False,
    ) -> None:
        """Carry out what changes something, and tell how it ended, or lie.

        What a guest's QEMU does by itself (``by_guest``) may be said to be done before it is; what
        libvirt keeps, a definition or a volume, is there when it says so.
        """
        if self.acts_said_to_be_done > 0 and by_guest:
            self.acts_said_to_be_done -= 1
            later(self._rng.uniform(*EARLY_ANSWER_S), self._act_late, work, bounds)
            return
        lies = self.acts_said_to_fail > 0
        if lies:
            self.acts_said_to_fail -= 1
        await self.call(work, bounds)
        if lies:
            raise HypervisorError("internal error: an unexpected answer")

    def _act_late(
        self, work: Callable[[Hypervisor], Awaitable[None]], bounds: tuple[float, float]
    ) -> None:
        outside(self.call(work, bounds), "libvirtd-late-act").add_done_callback(never_mind)

    async def stop(self, driver: Hypervisor, name: str, generation: int) -> None:
        """Stop a domain for an agent, and witness whose wish that was."""
        self._ending_by_agent[name] = None
        try:
            await driver.stop(name, generation)
            self.witness()
        finally:
            self._ending_by_agent.pop(name, None)

    def erased(self, vm_id: str) -> None:
        self._observe(Erased(self.node, vm_id))

    def erased_volume(self, pool: str, volume: str) -> None:
        shared = any(each.name == pool and each.shared for each in self._state.facts.pools)
        self._observe(Erased(self.node, volume.rpartition("-")[0], volume, shared))

    def told(self, kind: type[Restarting] | type[Pausing], name: str, generation: int) -> None:
        """Note that an agent has a guest do something."""
        domain = self._state.domains.get(name)
        if domain is not None and domain.vm_id is not None:
            self._observe(kind(self.node, domain.vm_id, generation))

    def witness(self) -> None:
        """Compare which guests run with what was seen last."""
        if self._over:
            return
        ours = {d.vm_id: d for d in self._state.domains.values() if d.vm_id is not None}
        running = {vm: d.generation for vm, d in ours.items() if d.executes}
        still = {
            vm: d.generation
            for vm, d in ours.items()
            if d.is_active() and not d.executes and not d.incoming
        }
        before, stood_still = self._running, self._still
        self._running, self._still = running, still
        self._see_arrivals({vm: d.generation for vm, d in ours.items() if d.stays})
        for vm_id, generation in (*before.items(), *stood_still.items()):
            if generation in (running.get(vm_id), still.get(vm_id)):
                continue
            by_agent = vm_id in self._ending_by_agent
            self._observe(Ended(self.node, vm_id, generation, by_agent))
        for vm_id, generation in still.items():
            if stood_still.get(vm_id) != generation:
                self._observe(Left(self.node, vm_id, generation))
        for vm_id, generation in running.items():
            if before.get(vm_id) == generation:
                continue
            if stood_still.get(vm_id) == generation:
                returned = ours[vm_id].returned
                self._observe(Resumed(self.node, vm_id, generation, returned))
                if returned:
                    self._attend(ours[vm_id].name, vm_id, generation, 0.0)
            else:
                paused = ours[vm_id].power is ObservedPower.PAUSED
                self._observe(Started(self.node, self.boot_id, vm_id, generation, paused))

    def _see_arrivals(self, arrived: dict[str, int]) -> None:
        known, self._arrived = self._arrived, arrived
        for vm_id, generation in arrived.items():
            if known.get(vm_id) != generation:
                self._observe(Arrived(self.node, vm_id, generation))

    def _attend(self, name: str, vm_id: str, generation: int, attended_s: float) -> None:
        """Tell for how long a returned guest runs on while somebody could hold it."""
        domain = self._state.domains.get(name)
        if domain is None or domain.generation != generation or not domain.returned:
            return
        attended = self._is_attended()
        if attended and attended_s:
            self._observe(StillRuns(self.node, vm_id, generation, attended_s))
        later(
            ATTEND_S,
            self._attend,
            name,
            vm_id,
            generation,
            attended_s + ATTEND_S if attended else 0.0,
        )

    def _is_attended(self) -> bool:
        """Whether an agent knows of every change, and could do something about it."""
        heard = self._tells and true_time_s() >= self._unheard_until_s
        agents = any(process.alive and process.stopped is None for process, _ in self._listeners)
        return self.available and self._hangs_since_s is None and heard and agents

    def _domain_changed(self, name: str) -> None:
        """Told at once of each change; agents hear of it a little later, while they live."""
        self.witness()
        if not self._tells or self._hangs_since_s is not None:
            return
        for process, listener in self._listeners:
            if process.alive:
                process.call_soon(listener, name)

    def _silence_lasts(self, since_s: float) -> None:
        """Have the clients give it up that wait since it began to hang, if it still does."""
        if self._hangs_since_s == since_s:
            for answer in list(self._awaited):
                _give_up(answer)

    def _refuse_when_away(self) -> None:
        if not self.available:
            raise HypervisorUnavailable(f"libvirtd of {self.node} does not answer")


def _come(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_result(None)


def _give_up(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_exception(HypervisorUnavailable("libvirtd has not answered for too long"))
