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
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from controlplane.cli.client import path_of
from controlplane.cli.errors import ApiProblem, CliError
from controlplane.cli.views import OperationView, VmView
from controlplane.commands.migrations import MIGRATE
from shared.model import BootSpec, DiskSpec, MigrationSpec, Operation, PlacementSpec, VmSpec
from shared.moves import MigrationJournal
from tests.lab import relays
from tests.lab.audit import CONSOLE_POOL, virsh
from tests.lab.cluster import Lab, LabPlan
from tests.lab.commands import attempt
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
CMDLINE = "console=ttyS0 quiet loglevel=1 nova.pulse="
MOVER = "mover"
# A guest lives on when it has said this much more.
PULSES_AFTER = 3
# The reflex takes 10 to 20 ms: one pulse can fall into that, and one more on a busy machine.
SPLIT_PULSES_MAX = 2
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
# Told by the destination's libvirtd. It makes the domain one that stays right before it resumes
# the guest, or leaves that to us.
_OF_EVENTS = {
    "started": Moment.MIDDLE,
    "defined": Moment.ARRIVED,
    "resumed": Moment.RESUMED,
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
NO_STRIKES: Mapping[Moment, Strike] = {}


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

    def create(self, *vms: NewVm) -> None:
        """Create VMs, all at once, and return once their guests speak."""
        api = self.trial.api
        accepted = [api.create_vm(vm) for vm in vms]
        for operation in accepted:
            ended = api.wait(operation)
            assert ended.state == "succeeded", ended
        for vm in vms:
            self.speaks(api.vm(vm.name))

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

    def move(
        self,
        name: str,
        strikes: Mapping[Moment, Strike] = NO_STRIKES,
        meanwhile: Strike | None = None,
    ) -> Move:
        """Ask for a migration to the other node, and return once it was struck and has ended.

        ``meanwhile`` is called when all has been struck, and may be what lets it end.
        """
        vm = self.trial.api.vm(name)
        source = self.lab.node(vm.status.where)
        destination = next(node for node in self.lab.nodes if node.name != source.name)
        move = Move(vm=vm, source=source, destination=destination, began=time.monotonic())
        trap = _Trap(move, strikes)
        self.steps.hook, self.events.hook = trap.written, trap.told
        try:
            # Whether it was taken is told by its record: the answer may be lost.
            said = ""
            try:
                self.trial.api.act(vm.name, "migrate", {"destination": destination.name})
            except CliError as error:
                said = f" (it was answered: {error})"
            wait_until(lambda: bool(move.operation_id), f"the migration's record{said}")
            trap.join()
            if meanwhile is not None:
                meanwhile(move)
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
        for node in self.lab.nodes:
            wait_until(
                partial(_answers, node),
                f"the libvirtd of {node.name} to be back",
                limit_s=REST_LIMIT_S,
            )
        self.trial.settle()
        try:
            wait_until(
                lambda: not self.leftovers(), "nothing to be left over", limit_s=REST_LIMIT_S
            )
        except LabError as error:
            raise LabError("\n".join((str(error), *self.leftovers()))) from None
        for name in names:
            vm = self._running(name)
            qemus = self.trial.witness.account()
            assert len(qemus.running(vm.id)) == 1, f"{name} runs in {qemus.running(vm.id)}"
            try:
                self.speaks(vm)
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

    def _running(self, name: str) -> VmView:
        try:
            return self.trial.eventually(
                partial(self.trial.api.vm, name),
                lambda vm: vm.status.phase == "Running",
                f"{name} to run",
            )
        except LabError as error:
            vm = self.trial.api.vm(name)
            state = virsh(self.lab.node(vm.status.where), "domstate", "--reason", vm.id).strip()
            raise LabError(f"{error}; its domain on {vm.status.where} is {state}") from None

    def _revive(self, vm: VmView) -> None:
        """Start a guest anew that libvirt takes for a running one."""
        state = virsh(self.lab.node(vm.status.where), "domstate", vm.id).strip()
        assert state == "running", f"{vm.name} does not speak: its domain is {state}"
        assert self.trial.api.wait(self.trial.api.act(vm.name, "reset")).state == "succeeded"
        self.speaks(vm)

    def speaks(self, vm: VmView) -> None:
        """Return once a guest has spoken on, where it is by its view. Raises LabError."""
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
    pulse_s: float = PULSE_S,
    migration: MigrationSpec = MigrationSpec(),  # noqa: B008 (frozen)
) -> NewVm:
    """Return the body that creates a VM whose guest says a pulse all the time."""
    spec = VmSpec(
        vcpus=1,
        memory_mib=MEMORY_MIB,
        boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline=f"{CMDLINE}{pulse_s}"),
        disks=(DiskSpec(name="data", size_gib=1, pool=pool),) if pool else (),
        placement=PlacementSpec(node_labels={"zone": zone} if zone else {}),
        migration=migration,
    )
    return NewVm(name=name, spec=spec)


def complaints(
    seen: PulseAccount, boots: int, since: float, *, may_split: bool = False
) -> list[str]:
    """Return what must not be in what was seen of a guest that has booted so often until now.

    ``may_split``: two may have run until the source's agent held one, for less than a pulse or two.
    """
    found = [f"{len(seen.boots())} boots, not {boots}"] if len(seen.boots()) != boots else []
    if may_split and len(seen.said_twice(since)) <= SPLIT_PULSES_MAX:
        return found
    found += [
        f"{number} was said on {nodes} in one boot" for number, nodes in seen.said_twice(since)
    ]
    found += [f"{after} came after {before}" for before, after in seen.went_back(since)]
    if seen.longest_gap_s > WITNESS_GAP_MAX_S:
        found.append(f"the witness did not look for {seen.longest_gap_s:.1f} s")
    return found


def _answers(node: LightNode) -> bool:
    return attempt("virsh", "-c", node.libvirt_uri, "list").returncode == 0


def _nothing(_: object) -> None:
    pass


def _pulses(log: Path) -> int:
    return log.read_bytes().count(b"\npulse ") if log.exists() else 0


class _Trap:
    """Strikes once at each moment, in the thread that hears of it."""

    def __init__(self, move: Move, strikes: Mapping[Moment, Strike]) -> None:
        self._move = move
        self._strikes = strikes
        self._struck = {moment: threading.Event() for moment in strikes}
        self._lock = threading.Lock()
        self._faults: list[BaseException] = []
        self._heard: list[str] = []

    def written(self, operation: Operation) -> None:
        move = self._move
        if operation.kind != MIGRATE or operation.target != move.vm.id:
            return
        move.operation_id = move.operation_id or operation.id
        journal = operation.saga
        assert isinstance(journal, MigrationJournal), "a migration's journal"
        move.generation = journal.generation or move.generation
        self._heard.append(operation.phase)
        for moment, step in _OF_STEPS.items():
            if operation.phase == step:
                self._come(moment)

    def told(self, event: DomainEvent) -> None:
        move = self._move
        if (event.node, event.domain) != (move.destination.name, move.vm.id):
            return
        self._heard.append(event.kind)
        moment = _OF_EVENTS.get(event.kind)
        if moment is Moment.MIDDLE:
            threading.Timer(MIDDLE_AFTER_S, self._come, (moment,)).start()
        elif moment is not None:
            self._come(moment)

    def join(self) -> None:
        """Return once it has struck; raises what went wrong in that."""
        for moment, struck in self._struck.items():
            assert struck.wait(END_LIMIT_S), f"the moment {moment.value} never came: {self._heard}"
        if self._faults:
            raise self._faults[0]

    def _come(self, moment: Moment) -> None:
        with self._lock:
            if moment not in self._struck or self._struck[moment].is_set():
                return
            try:
                self._strikes[moment](self._move)
            except Exception as fault:
                self._faults.append(fault)
            self._struck[moment].set()
