"""One lab under trial: faults are done to it, and what came of them is looked up.

``Trial`` joins a lab, its API and the witness, with the questions that fault tests ask. A question
waits, with a limit, for an API that is away for a while; it never sends a change twice.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from controlplane.cli.client import path_of
from controlplane.cli.errors import ApiProblem, CliError, Unreachable
from controlplane.cli.views import EventView, NodeView, OperationView, VmView
from shared.model import BootSpec, DiskSpec, PlacementSpec, VmSpec
from tests.lab import audit, witness
from tests.lab.cluster import Lab
from tests.lab.layout import LabError
from tests.lab.link import wait_until
from tests.lab.story import NewVm
from tests.lab.witness import Witness

T = TypeVar("T")

# Leases run out, processes start anew, agents reconnect with jitter up to 30 s: all of it together,
# twice over, on a machine with two cores.
SETTLE_LIMIT_S = 90.0
CONSOLE_DIR = "/var/lib/libvirt/novacron-console"
CMDLINE = "console=ttyS0"
# With this much a guest boots, and six more of them fit beside the residents.
MEMORY_MIB = 96


class Asked(Struct, frozen=True):
    """A change that was asked for; without an operation it was refused, or nobody knows.

    ``status`` is HTTP's of a refusal, 0 when no answer came at all.
    """

    name: str
    operation: OperationView | None
    status: int = 0
    problem: str = ""


class Trial:
    """``zones`` are where nodes are: n1 in a, n2 in b, n3 in c."""

    def __init__(self, lab: Lab, watching: Witness) -> None:
        self.lab = lab
        self.api = lab.api()
        self.witness = watching

    def eventually(self, ask: Callable[[], T], holds: Callable[[T], bool], what: str) -> T:
        """Ask until the answer is as wanted, through refusals; raises LabError in the end."""
        last: list[T] = []

        def fits() -> bool:
            try:
                last[:] = [ask()]
            except CliError:
                return False
            return holds(last[0])

        try:
            wait_until(fits, what, limit_s=SETTLE_LIMIT_S)
        except LabError as error:
            raise LabError(f"{error}; the last answer was {last}") from None
        return last[0]

    def burst(self, ask: Callable[[str], OperationView], names: Iterable[str]) -> list[Asked]:
        """Ask for one change after the other, each once, whatever becomes of it."""
        return [self._ask(ask, name) for name in names]

    def settle(self) -> None:
        """Return once nothing is under way, every node is ready, and all records are true."""
        self.eventually(
            self.operations, lambda found: all(o.ended for o in found), "every operation to end"
        )
        self.eventually(
            self.api.nodes,
            lambda nodes: all(n.state == "ready" for n in nodes),
            "every node to be ready again",
        )
        # A report may be on its way to a record; what is left over for good stays a difference.
        try:
            self.eventually(
                self._differences, lambda found: not found, "records and nodes to agree"
            )
        except LabError as error:
            raise LabError("\n".join((str(error), *self._differences()))) from None

    def operations(self) -> list[OperationView]:
        items = self.api.client.collect(path_of("operations")).items
        return [msgspec.json.decode(item, type=OperationView) for item in items]

    def events(self, target: str) -> list[EventView]:
        """Return all that ever happened to an object, oldest first."""
        return self._events("object", target)

    def ever_created(self) -> set[str]:
        """Return the id of every VM that there ever was; its domain has the same name."""
        return {event.object for event in self._events("kind", "vm.created")}

    def vms(self) -> dict[str, VmView]:
        return {vm.name: vm for vm in self.api.vms()}

    def node_view(self, name: str) -> NodeView:
        return next(n for n in self.api.nodes() if n.name == name)

    def counts(self, vm: VmView) -> list[witness.Boot]:
        """Return what a VM's guest has counted, from its node's disk."""
        node = self.lab.node(vm.status.where)
        return witness.boots(node.inside(Path(CONSOLE_DIR) / f"{vm.id}.log"))

    def progress(self, vm: VmView) -> int:
        """Return how many counts a guest has written in all its boots."""
        return sum(len(boot.counts) for boot in self.counts(vm))

    def wait_counting(self, vms: Collection[VmView]) -> None:
        """Return once every guest has counted on from where it is now."""
        before = {vm.id: self.progress(vm) for vm in vms}
        for vm in vms:
            wait_until(
                partial(self._has_counted, vm, before[vm.id]),
                f"guest {vm.name} to count on after {before[vm.id]} counts",
                limit_s=SETTLE_LIMIT_S,
            )

    def kill(self, program: str) -> None:
        os.kill(self.lab.link.pid_of(program), signal.SIGKILL)

    def killed_and_back(self, program: str) -> None:
        """Kill a program and return once the supervisor has started it again."""
        link = self.lab.link
        before = link.program(program)
        assert before is not None, f"{program} is no program of the lab"
        self.kill(program)
        wait_until(
            lambda: link.lives(program) and link.program(program) != before, f"a new {program}"
        )

    @contextmanager
    def stopped(self, program: str) -> Iterator[None]:
        """Let a program stand still (SIGSTOP) for as long as the block lasts."""
        pid = self.lab.link.pid_of(program)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def killed_after(self, program: str, delay_s: float) -> Iterator[None]:
        """Kill a program that long after the block begins; returns once it is back."""
        timer = threading.Timer(delay_s, self.killed_and_back, (program,))
        timer.start()
        try:
            yield
        finally:
            timer.join()

    def _differences(self) -> list[str]:
        """Return what differs; a libvirtd that does not listen yet is itself a difference."""
        try:
            return audit.differences(self.lab, self.api)
        except LabError as silent:
            return [str(silent)]

    def _events(self, field: str, value: str) -> list[EventView]:
        items = self.api.client.collect(path_of("events"), ((field, value),)).items
        return [msgspec.json.decode(item, type=EventView) for item in items]

    def _has_counted(self, vm: VmView, before: int) -> bool:
        return self.progress(vm) > before

    def _ask(self, ask: Callable[[str], OperationView], name: str) -> Asked:
        try:
            return Asked(name, ask(name))
        except Unreachable as lost:
            return Asked(name, None, problem=str(lost))
        except ApiProblem as refused:
            return Asked(name, None, refused.problem.status, str(refused))


def new_vm(name: str, *, zone: str = "", disk: bool = False, cmdline: str = CMDLINE) -> NewVm:
    """Return the body that creates a small VM, in one zone or anywhere."""
    spec = VmSpec(
        vcpus=1,
        memory_mib=MEMORY_MIB,
        boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline=cmdline),
        disks=(DiskSpec(name="data", size_gib=1),) if disk else (),
        placement=PlacementSpec(node_labels={"zone": zone} if zone else {}),
    )
    return NewVm(name=name, spec=spec)
