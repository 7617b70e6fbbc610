"""Guests of a simulated node: they boot, count on their console, obey their power button, end.

A guest's own time passes while it runs and stands still while it is paused. It behaves as the tiny
guest of the tests does on real nodes, and knows the same switch on its kernel command line:
``nova.exit=poweroff@S`` (also ``reboot@S``, ``panic@S``), S seconds after its boot.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.hypervisor import DomainInfo
from shared.model import ObservedPower, Sample, VmSpec
from shared.moves import EndState
from shared.units import KIB, MIB

if TYPE_CHECKING:
    from agent.simulated_fabric import Travel

BOOT_S = 1.0
COUNT_PERIOD_S = 0.2
# From its power button to its end.
POWER_OFF_S = 0.3
# As a rotating log would keep; a guest that ran for a week must not cost more.
CONSOLE_BYTES_MAX = 64 * KIB

_LINES_MAX = CONSOLE_BYTES_MAX // len("count 1\n")
_EXIT = re.compile(r"(?:^| )nova\.exit=(poweroff|reboot|panic)@([0-9]+(?:\.[0-9]+)?)(?= |$)")
_CPU_SHARE = 0.1
_RUNNING = (ObservedPower.RUNNING, ObservedPower.PAUSED)


class HeldFor(enum.Enum):
    """Why a domain is paused that no user has paused."""

    NOTHING = "nothing"
    SWITCH = "switch"
    ARRIVAL = "arrival"
    REFLEX = "reflex"


class ConsoleLog:
    """What a domain's guests have said: a file of the node's, which outlives the domain."""

    def __init__(self) -> None:
        self.text = b""

    def append(self, text: str) -> None:
        self.text = (self.text + text.encode())[-CONSOLE_BYTES_MAX:]


class SimulatedDomain:
    """One domain and its guest; ``changed(name)`` is called after each change of power.

    ``vm_id`` and ``spec`` are None for a foreign domain.
    """

    def __init__(
        self,
        name: str,
        uuid: str,
        vm_id: str | None,
        generation: int,
        spec: VmSpec | None,
        console: ConsoleLog,
        changed: Callable[[str], None],
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.vm_id = vm_id
        self.generation = generation
        self.spec = spec
        self.power = ObservedPower.STOPPED
        self.console = console
        self._changed = changed
        self._guest_s = 0.0
        self._resumed_at: float | None = None
        self._booted = False
        self._counted = 0
        self._due: list[tuple[float, str]] = []
        self._timer: asyncio.TimerHandle | None = None
        # On the move: its migration, whether it still comes in, has come and not gone on yet, and
        # stays if it ends, why it is paused, and whether libvirt has let it go on after it had
        # switched.
        self.travel: Travel | None = None
        self.incoming = False
        self.never_ran = False
        self.stays = False
        self.held_for = HeldFor.NOTHING
        self.returned = False
        self.arrived = False
        self.was_paused = False

    def info(self) -> DomainInfo:
        return DomainInfo(
            name=self.name,
            uuid=self.uuid,
            vm_id=self.vm_id,
            generation=self.generation,
            power=self.power,
        )

    def is_active(self) -> bool:
        return self.power in _RUNNING

    @property
    def executes(self) -> bool:
        """Whether its guest is here, running or at a user's wish paused."""
        return self.is_active() and not self.incoming and self.held_for is HeldFor.NOTHING

    def end_state(self) -> EndState:
        """Return what it is as one end of a migration."""
        if not self.is_active():
            return EndState.NEVER_RAN if self.never_ran else EndState.DOWN
        if self.incoming:
            return EndState.INCOMING
        if self.travel is not None and not self.arrived:
            return EndState.MOVING
        if self.power is ObservedPower.RUNNING:
            return EndState.RUNNING
        # One that a user had paused before stays paused for that reason.
        away = self.held_for is HeldFor.SWITCH and not self.was_paused
        return EndState.AWAY if away else EndState.HELD

    def start(self) -> None:
        self.incoming = False
        self._boot()
        self._set_power(ObservedPower.RUNNING)

    def end(self, power: ObservedPower, *, tell: bool = True) -> None:
        """End the guest; ``power`` says how. Untold, as when the node itself ends."""
        self._halt()
        self.power = power
        self.held_for = HeldFor.NOTHING
        self.returned = False
        if tell:
            self._changed(self.name)
        if self.travel is not None:
            self.travel.guest_ended()

    def pause(self) -> None:
        if self.power is ObservedPower.RUNNING:
            self._halt()
            self._set_power(ObservedPower.PAUSED)

    def resume(self) -> None:
        if self.power is ObservedPower.PAUSED:
            self._go_on()
            self.held_for = HeldFor.NOTHING
            self.returned = False
            self._set_power(ObservedPower.RUNNING)

    def hold(self) -> None:
        """Be paused by an agent that does not know whether it runs elsewhere."""
        self._halt()
        self.held_for = HeldFor.REFLEX
        self.returned = False
        self._set_power(ObservedPower.PAUSED)

    def go_away(self) -> None:
        """Be paused to go on on another node."""
        self.was_paused = self.power is ObservedPower.PAUSED
        self._halt()
        self.held_for = HeldFor.SWITCH
        self._set_power(ObservedPower.PAUSED)

    def come_back(self, *, returned: bool = True) -> None:
        """Go on here after all; ``returned``: it had been paused to go on elsewhere."""
        if self.held_for is not HeldFor.SWITCH:
            return
        self.held_for = HeldFor.NOTHING
        self.returned = returned
        if self.was_paused:
            self._changed(self.name)
            return
        self._go_on()
        self._set_power(ObservedPower.RUNNING)

    def arrive(self, origin: SimulatedDomain, *, paused: bool) -> None:
        """Go on with the guest of ``origin``, which stands still."""
        self._guest_s = origin._guest_s
        self._booted = origin._booted
        self._counted = origin._counted
        self._due = list(origin._due)
        self.incoming = False
        self.arrived = True
        if paused:
            self.held_for = HeldFor.NOTHING if origin.was_paused else HeldFor.ARRIVAL
            self._set_power(ObservedPower.PAUSED)
            return
        self._go_on()
        self._set_power(ObservedPower.RUNNING)

    def reset(self) -> None:
        running = self.power is ObservedPower.RUNNING
        self._halt()
        self._boot(go_on=running)

    def press_power_button(self, outcome: str) -> None:
        """Have the guest do ``outcome`` soon; one that has not booted yet does not notice."""
        self.catch_up()
        if self._booted:
            self._due.append((self._guest_time_s() + POWER_OFF_S, outcome))
            self._arm()

    def catch_up(self) -> None:
        """Write what the guest would have said by now on its console."""
        guest_s = self._guest_time_s()
        if guest_s < BOOT_S:
            return
        lines = []
        if not self._booted:
            self._booted = True
            lines.append(f"boot {BOOT_S:.2f}\n")
        total = int((guest_s - BOOT_S) / COUNT_PERIOD_S) + 1
        first = max(self._counted + 1, total - _LINES_MAX + 1)
        lines += [f"count {number}\n" for number in range(first, total + 1)]
        self._counted = max(self._counted, total)
        self.console.append("".join(lines))

    def sample(self, at: float) -> Sample:
        assert self.vm_id is not None, "a domain of ours"
        assert self.spec is not None, "a domain of ours"
        active_s = self._guest_time_s()
        disk_bytes = active_s * KIB * len(self.spec.disks)
        network_bytes = active_s * KIB * len(self.spec.nics)
        return Sample(
            object=self.vm_id,
            at=at,
            cpu_s_total=active_s * _CPU_SHARE * self.spec.vcpus,
            memory_bytes=float(self.spec.memory_mib * MIB),
            memory_available_bytes=float(self.spec.memory_mib * MIB // 2),
            disk_read_bytes_total=disk_bytes,
            disk_write_bytes_total=disk_bytes,
            disk_read_requests_total=float(int(disk_bytes / KIB)),
            disk_write_requests_total=float(int(disk_bytes / KIB)),
            network_receive_bytes_total=network_bytes,
            network_transmit_bytes_total=network_bytes,
        )

    def _set_power(self, power: ObservedPower) -> None:
        self.power = power
        self._changed(self.name)

    def _boot(self, *, go_on: bool = True) -> None:
        self._guest_s = 0.0
        self._booted = False
        self._counted = 0
        self._due = []
        asked = _EXIT.search(self.spec.boot.cmdline) if self.spec else None
        if asked:
            self._due.append((BOOT_S + float(asked[2]), asked[1]))
        if go_on:
            self._go_on()

    def _go_on(self) -> None:
        self.never_ran = False
        self._resumed_at = asyncio.get_running_loop().time()
        self._arm()

    def _halt(self) -> None:
        self.catch_up()
        self._guest_s = self._guest_time_s()
        self._resumed_at = None
        self._disarm()

    def _guest_time_s(self) -> float:
        if self._resumed_at is None:
            return self._guest_s
        return self._guest_s + asyncio.get_running_loop().time() - self._resumed_at

    def _arm(self) -> None:
        self._disarm()
        if self._due and self._resumed_at is not None:
            due_s = min(self._due)[0]
            delay_s = max(0.0, due_s - self._guest_time_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._act)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _act(self) -> None:
        """Do what the guest has been about to do."""
        _, outcome = min(self._due)
        if outcome == "reboot":
            self.reset()
        elif outcome == "panic":
            self.end(ObservedPower.CRASHED)
        else:
            self.end(ObservedPower.SHUT_OFF)
