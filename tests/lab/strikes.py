"""Does one fault to one part of a lab while a guest moves there, and undoes it after its time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from tests.lab import network, relays
from tests.lab.cluster import Lab
from tests.lab.migration_cell import Move
from tests.lab.migration_faults import STAYS_S, Fault, Pair, Victim
from tests.lab.nodes import LightNode
from tests.lab.state import agent_program, anchor_program, libvirtd_program

REPLICA = "r1"
MEMBER = "etcd1"


class Striker:
    """Is called at the moment of its pair; to be closed when the migration has ended."""

    def __init__(self, lab: Lab, pair: Pair) -> None:
        self._lab = lab
        self._pair = pair
        self._pid: int | None = None
        self._cut = False
        self._timer: threading.Timer | None = None
        self.missed = False
        self.at = 0.0
        # How long the blow itself took, from the moment on.
        self.took_s = 0.0

    def __call__(self, move: Move) -> None:
        """Strike; ``missed`` says that what was to be struck had ended already."""
        self.at = time.monotonic()
        try:
            self._strike(move)
        except (ProcessLookupError, FileNotFoundError):
            self.missed = True
            return
        self.took_s = time.monotonic() - self.at
        if stays_s := STAYS_S[self._pair.fault]:
            self._timer = threading.Timer(stays_s, self._undo)
            self._timer.start()

    def close(self) -> None:
        """Return once the fault's time is over and it was undone."""
        if self._timer is not None:
            self._timer.join()

    def abandon(self) -> None:
        """Undo the fault at once."""
        if self._timer is not None:
            self._timer.cancel()
            self._undo()

    def _strike(self, move: Move) -> None:
        if self._pair.victim is Victim.NETWORK:
            anchor = self._lab.link.pid_of(anchor_program(move.source.name))
            network.drop_between(anchor, move.destination.address)
            self._cut, self._pid = True, anchor
        else:
            self._pid = self._victim_pid(move)
            number = signal.SIGKILL if self._pair.fault is Fault.KILL else signal.SIGSTOP
            os.kill(self._pid, number)

    def _undo(self) -> None:
        assert self._pid is not None, "it has struck"
        if self._cut:
            network.heal(self._pid)
            return
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(self._pid, signal.SIGCONT)

    def _victim_pid(self, move: Move) -> int:
        link, victim = self._lab.link, self._pair.victim
        programs = {
            Victim.SOURCE_AGENT: agent_program(move.source.name),
            Victim.DESTINATION_AGENT: agent_program(move.destination.name),
            Victim.SOURCE_LIBVIRTD: libvirtd_program(move.source.name),
            Victim.DESTINATION_LIBVIRTD: libvirtd_program(move.destination.name),
            Victim.REPLICA: REPLICA,
            Victim.ETCD: MEMBER,
        }
        if victim in programs:
            return link.pid_of(programs[victim])
        if victim is Victim.SOURCE_QEMU:
            return qemu_pid(move.source, move.vm.id)
        if victim is Victim.DESTINATION_QEMU:
            return qemu_pid(move.destination, move.vm.id)
        of_source = victim is Victim.SOURCE_RELAY
        pid = (
            relays.source_pid(move.source, move.relay_name)
            if of_source
            else relays.destination_pid(move.destination, move.relay_name)
        )
        if pid is None:
            raise ProcessLookupError(f"{victim.value} of {move.relay_name} does not run")
        return pid


def qemu_pid(node: LightNode, domain: str) -> int:
    """Return the QEMU of a domain, from libvirt's own file. Raises FileNotFoundError."""
    return int(Path(node.directory, "run/libvirt/qemu", f"{domain}.pid").read_text())
