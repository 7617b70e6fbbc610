"""A lab whose guests are moved under trial, while a witness watches all that they say.

Moves the guest, has something done at a moment of it, waits until all is at rest, and holds what
was seen against what may be: `PulseWitness` saw what ran, libvirt and the records say what is left.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from controlplane.cli.client import path_of
from controlplane.cli.errors import ApiProblem, CliError
from controlplane.cli.views import OperationView, VmView
from controlplane.commands.migrations import MIGRATE
from shared.model import BootSpec, DiskSpec, MigrationSpec, Operation, PlacementSpec, VmSpec
from tests.lab import relays
from tests.lab.audit import CONSOLE_POOL, virsh
from tests.lab.cluster import Lab, LabPlan
from tests.lab.domain_events import DomainEvent, DomainEvents
from tests.lab.layout import CACHE_DIR, LOG_DIR, STATE_DIR, LabError
from tests.lab.link import wait_until
from tests.lab.migration_faults import Moment
from tests.lab.nodes import POOLS, LightNode
from tests.lab.pulses import Place, PulseAccount, PulseWitness
from tests.lab.step_watch import StepWatch
from tests.lab.story import NewVm
from tests.lab.trial import MEMORY_MIB, Trial
from tests.lab.witness import Witness

# QEMU 7.2 loses writes of an emulated guest while it moves: the more a guest does, the likelier it
# is that its kernel finds its own memory wrong on arrival. Twenty pulses a second cost one guest of
# ten; this many are still enough to see two guests that run together for a moment.
PULSE_S = 0.1
# Without the kernel's own messages no pulse is torn but by a move.
CMDLINE = f"console=ttyS0 quiet loglevel=1 nova.pulse={PULSE_S}"
MOVER = "mover"
# A guest lives on when it has said this much more.
PULSES_AFTER = 3
# libvirt's patience is 30 s, an agent's reconnection up to 30 s more, and sagas wait for both.
END_LIMIT_S = 180.0
# A boot takes four seconds alone, and longer beside others.
PULSE_LIMIT_S = 30.0
# From the destination's domain being there to its RESUMED at least twice this passes.
MIDDLE_AFTER_S = 0.2
# What an agent sweeps after its last report, it sweeps within seconds.
REST_LIMIT_S = 30.0
FAILED_LOG_DIR = CACHE_DIR / "lab" / "failed"
# Looks are 10 ms apart; a machine with two busy cores may delay some.
WITNESS_GAP_MAX_S = 2.0
_OF_STEPS = {
    Moment.ADMIT: "admit",
    Moment.PRECHECK: "precheck",
    Moment.CLAIM: "claim",
    Moment.PREPARE: "prepare",
    Moment.TRANSFER: "transfer",
    Moment.SWITCH: "switch",
    Moment.FINALIZE: "finalize",
}


class Move(Struct):
    """One migration under trial; ``generation`` is the destination's, once it was given out."""

    vm: VmView
    source: LightNode
    destination: LightNode
    began: float
    operation_id: str = ""
    generation: int = 0

    @property
    def relay_name(self) -> str:
        return f"{self.vm.id}.{self.generation}"


Strike = Callable[[Move], None]


class Spoilt(Exception):
    """A guest was spoilt by QEMU as it moved (see PULSE_S): nothing can be said of that move."""


class MigrationCell:
    """Is entered once, and serves many moves; ``broken`` says that one of them went wrong."""

    def __init__(self, scratch: Path, plan: LabPlan) -> None:
        self.lab = Lab(plan)
        self._scratch = scratch
        self._inside = contextlib.ExitStack()
        self._records = itertools.count()

    def __enter__(self) -> MigrationCell:
        with self._inside:
            enter = self._inside.enter_context
            enter(self.lab)
            watching = enter(Witness(self._scratch / "looks"))
            self.trial = Trial(self.lab, watching)
            self._inside.callback(self.trial.api.close)
            self.events = enter(DomainEvents(self.lab.nodes))
            self.steps = enter(StepWatch(self.lab.state().etcd[0]))
            self._inside = self._inside.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._inside.close()

    def create(self, vm: NewVm) -> VmView:
        """Create a VM and return once its guest speaks."""
        api = self.trial.api
        ended = api.wait(api.create_vm(vm))
        assert ended.state == "succeeded", ended
        view = api.vm(vm.name)
        self._speaks(view)
        return view

    def console_log(self, node: LightNode, vm: VmView) -> Path:
        return node.inside(POOLS[CONSOLE_POOL]) / f"{vm.id}.log"

    @contextlib.contextmanager
    def witness(self) -> Iterator[PulseWitness]:
        """Watch every guest of the lab with a new record."""
        places = [
            Place(
                node.name,
                str(node.inside(POOLS[CONSOLE_POOL])),
                str(node.directory / "run" / "libvirt" / "qemu"),
            )
            for node in self.lab.nodes
        ]
        with PulseWitness(self._scratch / f"pulses-{next(self._records)}", places) as watching:
            yield watching

    def move(self, name: str, moment: Moment | None = None, strike: Strike | None = None) -> Move:
        """Ask for a migration to the other node, and return once it was struck and has ended."""
        vm = self.trial.api.vm(name)
        source = self.lab.node(vm.status.where)
        destination = next(node for node in self.lab.nodes if node.name != source.name)
        move = Move(vm=vm, source=source, destination=destination, began=time.monotonic())
        trap = _Trap(move, moment, strike)
        self.steps.hook, self.events.hook = trap.written, trap.told
        try:
            # Whether it was taken is told by its record: the answer may be lost.
            with contextlib.suppress(CliError):
                self.trial.api.act(vm.name, "migrate", {"destination": destination.name})
            wait_until(lambda: bool(move.operation_id), "the migration's record")
            trap.join()
            self.ended(move)
        finally:
            self.steps.hook, self.events.hook = _nothing, _nothing
        return move

    def ended(self, move: Move) -> OperationView:
        """Return the migration's operation once it has ended, however it did."""

        def view() -> OperationView | None:
            try:
                return self.trial.api.operation(move.operation_id)
            except ApiProblem:
                return None

        found: list[OperationView] = []

        def has_ended() -> bool:
            with contextlib.suppress(CliError):
                seen = view()
                if seen is not None and seen.ended:
                    found[:] = [seen]
            return bool(found)

        try:
            wait_until(has_ended, "the migration to end", limit_s=END_LIMIT_S)
        except LabError as error:
            raise LabError(f"{error}; it is {view()}") from None
        return found[0]

    def rest(self, *names: str) -> None:
        """Return once nothing is under way or left over, and these guests have spoken again.

        Raises Spoilt for one that has arrived and never will, after it was started anew.
        """
        self.trial.settle()
        try:
            wait_until(
                lambda: not self.leftovers(), "nothing to be left over", limit_s=REST_LIMIT_S
            )
        except LabError as error:
            raise LabError("\n".join((str(error), *self.leftovers()))) from None
        for name in names:
            vm = self.trial.eventually(
                partial(self.trial.api.vm, name),
                lambda vm: vm.status.phase == "Running",
                f"{name} to run",
            )
            qemus = self.trial.witness.account()
            assert len(qemus.running(vm.id)) == 1, f"{name} runs in {qemus.running(vm.id)}"
            try:
                self._speaks(vm)
            except LabError as silent:
                self._revive(vm)
                raise Spoilt(str(silent)) from None

    def leftovers(self) -> list[str]:
        """Return what only a migration under way may have."""
        found = [line for node in self.lab.nodes for line in relays.leftovers(node)]
        for item in self.trial.api.client.collect(path_of("vms")).items:
            vm = msgspec.json.decode(item, type=_Moving)
            if vm.status.migration is not None:
                found.append(f"{vm.name}: claimed by {vm.status.migration}")
            found += [f"{vm.name}: something is left on {node}" for node in vm.status.left_on]
        return found

    def keep_logs(self, name: str) -> Path:
        """Copy the lab's logs to where no later lab overwrites them; returns where."""
        kept = FAILED_LOG_DIR / name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(LOG_DIR, kept)
        for console in STATE_DIR.glob(f"nodes/*/var-lib/{POOLS[CONSOLE_POOL][9:]}/*.log"):
            shutil.copyfile(console, kept / f"{console.parents[3].name}.{console.name}")
        return kept

    def _revive(self, vm: VmView) -> None:
        """Start a guest anew that libvirt takes for a running one."""
        state = virsh(self.lab.node(vm.status.where), "domstate", vm.id).strip()
        assert state == "running", f"{vm.name} does not speak: its domain is {state}"
        assert self.trial.api.wait(self.trial.api.act(vm.name, "reset")).state == "succeeded"
        self._speaks(vm)

    def _speaks(self, vm: VmView) -> None:
        log = self.console_log(self.lab.node(vm.status.where), vm)
        before = _pulses(log)
        wait_until(
            lambda: _pulses(log) >= before + PULSES_AFTER,
            f"{vm.name} to speak on {vm.status.where}",
            limit_s=PULSE_LIMIT_S,
        )


class _MovingStatus(Struct, frozen=True):
    migration: str | None = None
    left_on: tuple[str, ...] = ()


class _Moving(Struct, frozen=True):
    name: str
    status: _MovingStatus


def speaking_vm(
    name: str,
    *,
    zone: str = "",
    pool: str = "",
    migration: MigrationSpec = MigrationSpec(),  # noqa: B008 (frozen)
) -> NewVm:
    """Return the body that creates a VM whose guest says a pulse all the time."""
    spec = VmSpec(
        vcpus=1,
        memory_mib=MEMORY_MIB,
        boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline=CMDLINE),
        disks=(DiskSpec(name="data", size_gib=1, pool=pool),) if pool else (),
        placement=PlacementSpec(node_labels={"zone": zone} if zone else {}),
        migration=migration,
    )
    return NewVm(name=name, spec=spec)


def complaints(seen: PulseAccount, boots: int) -> list[str]:
    """Return what must not be in what was seen of a guest that has booted so often."""
    found = [f"{len(seen.boots())} boots, not {boots}"] if len(seen.boots()) != boots else []
    found += [f"{number} was said on {nodes} in one boot" for _, number, nodes in seen.said_twice()]
    found += [f"{after} came after {before}" for before, after in seen.went_back()]
    if seen.longest_gap_s > WITNESS_GAP_MAX_S:
        found.append(f"the witness did not look for {seen.longest_gap_s:.1f} s")
    return found


def _nothing(_: object) -> None:
    pass


def _pulses(log: Path) -> int:
    return log.read_bytes().count(b"\npulse ") if log.exists() else 0


class _Trap:
    """Strikes once, when the moment comes: in the thread that hears of it."""

    def __init__(self, move: Move, moment: Moment | None, strike: Strike | None) -> None:
        self._move = move
        self._moment = moment
        self._strike = strike
        self._struck = threading.Event()
        self._lock = threading.Lock()
        self._fault: BaseException | None = None

    def written(self, operation: Operation) -> None:
        move = self._move
        if operation.kind != MIGRATE or operation.target != move.vm.id:
            return
        move.operation_id = move.operation_id or operation.id
        journal = operation.saga
        move.generation = getattr(journal, "generation", 0) or move.generation
        if self._moment in _OF_STEPS and operation.phase == _OF_STEPS[self._moment]:
            self._fire()

    def told(self, event: DomainEvent) -> None:
        move = self._move
        if (event.node, event.domain) != (move.destination.name, move.vm.id):
            return
        if self._moment is Moment.RESUMED and event.kind == "resumed":
            self._fire()
        if self._moment is Moment.MIDDLE and event.kind == "started":
            threading.Timer(MIDDLE_AFTER_S, self._fire).start()

    def join(self) -> None:
        """Return once it has struck; raises what went wrong in that."""
        if self._strike is None:
            return
        assert self._struck.wait(END_LIMIT_S), f"the moment {self._moment} never came"
        if self._fault is not None:
            raise self._fault

    def _fire(self) -> None:
        with self._lock:
            if self._struck.is_set() or self._strike is None:
                return
            try:
                self._strike(self._move)
            except BaseException as fault:
                self._fault = fault
            self._struck.set()
