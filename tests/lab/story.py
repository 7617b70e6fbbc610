"""The story that both demos tell: VMs are placed, run, moved live, stopped, started, deleted; a
node is drained; with times.

It speaks to the API as any client does, and knows nothing of what is behind it. Every figure it
prints was measured while it ran.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus

from msgspec import Struct

from controlplane.cli.client import path_of
from controlplane.cli.errors import ApiProblem
from controlplane.cli.views import CandidateView, NodeView, OperationView, PlanView
from shared.model import (
    BootSpec,
    DiskSpec,
    GroupRule,
    Labels,
    NicSpec,
    PlacementSpec,
    VmSpec,
)
from tests.lab.api import LabApi
from tests.lab.layout import LabError

Say = Callable[[str], None]

BOOT = BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline="console=ttyS0")
# Emulated guests that boot at the same time on two cores take turns.
FIRST_COUNT_LIMIT_S = 120.0
CONSOLE_BYTES = 4096
POLL_S = 0.2
# More than a guest counts while it is moved.
COUNTS_TO_SEE = 20
# Long enough for a counter to have moved visibly.
COUNT_PAUSE_S = 1.0


class NewVm(Struct, frozen=True, kw_only=True):
    """The body that creates a VM."""

    name: str
    labels: Labels = {}
    spec: VmSpec


class Timed(Struct, frozen=True):
    """What was asked for, and the seconds from the request until the operation had ended."""

    what: str
    seconds: float


_APART = PlacementSpec(anti_affinity=(GroupRule(group="web"),))
_LAN = (NicSpec(network="lan"),)


def _small(
    name: str,
    *,
    nics: tuple[NicSpec, ...] = (),
    disks: tuple[DiskSpec, ...] = (),
    placement: PlacementSpec = PlacementSpec(),  # noqa: B008 (frozen)
) -> NewVm:
    spec = VmSpec(vcpus=1, memory_mib=192, boot=BOOT, nics=nics, disks=disks, placement=placement)
    return NewVm(name=name, labels={"demo": name.rpartition("-")[0]}, spec=spec)


VMS = (
    _small("web-1", nics=_LAN, placement=_APART),
    _small("web-2", nics=_LAN, placement=_APART),
    _small("web-3", nics=_LAN, placement=_APART),
    _small("db-1", nics=_LAN, disks=(DiskSpec(name="data", size_gib=1),)),
    _small("batch-1"),
    _small("batch-2"),
)
# One that is all memory, and one whose disk moves along.
BUSINESS = "batch-1"
STORE = "db-1"
GIANT = NewVm(name="giant", spec=VmSpec(vcpus=8, memory_mib=1024 * 1024, boot=BOOT))


class Story:
    """One telling; ``figures`` collects what was measured."""

    def __init__(self, api: LabApi, say: Say) -> None:
        self._api = api
        self._say = say
        self._node_names: dict[str, str] = {}
        self.figures: list[Timed] = []

    def tell(self) -> None:
        """Tell all of it; raises LabError or CliError when something does not go as told."""
        nodes = self._api.nodes()
        self._node_names = {n.id: n.name for n in nodes}
        self._chapter("The nodes")
        self._show_nodes(nodes)
        self._chapter("Six VMs, and one that is too large")
        for vm in VMS:
            self._create(vm)
        self._ask_for_the_impossible()
        self._chapter("The guests, by the counters on their serial consoles")
        counts = self._wait_for_counts()
        self._chapter("A VM moves to another node while it runs")
        for name in (BUSINESS, STORE):
            self._migrate(name)
        self._chapter("Stopped, started, paused, shut down, deleted")
        self._change_some()
        self._chapter("A node is drained")
        self._drain(self._api.vm(BUSINESS).status.node)
        self._chapter("What there is now")
        self._show_vms()
        self._show_untouched(counts)

    def summary(self) -> list[str]:
        """Return what was measured, a line for each kind of operation."""
        kinds = list(dict.fromkeys(f.what for f in self.figures))
        lines = []
        for kind in kinds:
            seconds = [f.seconds for f in self.figures if f.what == kind]
            lines.append(
                f"{kind:14} {len(seconds)} time(s): median {statistics.median(seconds):.2f} s, "
                f"longest {max(seconds):.2f} s"
            )
        return lines

    def _show_nodes(self, nodes: Sequence[NodeView]) -> None:
        for node in nodes:
            inventory = node.inventory
            if inventory is None:
                raise LabError(f"node {node.name} has not said what it has")
            guests = "KVM" if inventory.virtualization == "kvm" else "emulation (TCG), no KVM here"
            self._say(
                f"{node.name:5} {node.address:12} {node.state}: {inventory.cpus} CPUs, "
                f"{inventory.memory_mib} MiB, {inventory.cpu.model}; guests run under {guests}"
            )

    def _create(self, vm: NewVm) -> None:
        plan = self._api.plan(vm)
        took = self._timed("create", lambda: self._api.create_vm(vm))
        node = self._api.vm(vm.name).status.node
        self._say(f"{vm.name:8} runs on {self._name_of(node)} after {took:.2f} s; {_why(plan)}")

    def _ask_for_the_impossible(self) -> None:
        accepted = self._api.create_vm(GIANT)
        seen = self._api.vm(GIANT.name)
        self._say(
            f"{GIANT.name:8} asked for {GIANT.spec.memory_mib // 1024} GiB: {seen.status.phase}, "
            f"its operation is {accepted.state}"
        )
        for candidate in self._api.placement(GIANT.name).candidates:
            self._say(f"         {candidate.node_name}: {_reasons(candidate)}")

    def _wait_for_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        deadline = time.monotonic() + FIRST_COUNT_LIMIT_S
        for vm in VMS:
            while (count := self._count(vm.name)) is None:
                if time.monotonic() > deadline:
                    raise LabError(f"guest {vm.name} does not count")
                time.sleep(POLL_S)
            counts[vm.name] = count
        self._say(", ".join(f"{name} at {count}" for name, count in counts.items()))
        return counts

    def _change_some(self) -> None:
        self._act("batch-1", "stop")
        self._act("batch-1", "start")
        self._act("web-1", "pause")
        before = self._count("web-1")
        time.sleep(COUNT_PAUSE_S)
        self._say(f"         web-1's counter while paused: {before}, then {self._count('web-1')}")
        self._act("web-1", "resume")
        self._act("batch-2", "shutdown")
        for name in (STORE, GIANT.name):
            took = self._timed("delete", partial(self._api.delete_vm, name))
            self._say(f"{name:8} delete: done after {took:.2f} s")

    def _migrate(self, name: str) -> None:
        """Move a VM, and prove by its guest's own counter that it went on where it was."""
        old = self._api.vm(name).status.node
        before = self._count(name)
        started = time.monotonic()
        ended = self._succeeded(self._api.wait(self._api.act(name, "migrate")))
        took = time.monotonic() - started
        self.figures.append(Timed("migrate", took))
        told = self._api.migration(ended.id).figures
        downtime = "" if told is None else f", {told.downtime_ms} ms of it without the guest"
        new = self._api.vm(name).status.node
        self._say(
            f"{name:8} {self._name_of(old)} -> {self._name_of(new)} after {took:.2f} s{downtime}"
        )
        if before is None:
            raise LabError(f"guest {name} did not count before it was moved")
        last = self._counted_on(name, before)
        self._say(
            f"         its guest counted on from {before} to {last}, every number once, "
            "without a boot"
        )

    def _counted_on(self, name: str, before: int) -> int:
        """Return how far a guest has counted since ``before``; raises when it was not in a row.

        The console log is joined of what both nodes have written.
        """
        deadline = time.monotonic() + FIRST_COUNT_LIMIT_S
        while time.monotonic() < deadline:
            log = self._console(name, -CONSOLE_BYTES)
            ending = b"\r\n" if b"\r\n" in log else b"\n"
            _, _, since = log.rpartition(b"count %d%s" % (before, ending))
            counted = _counters(since)
            if b"boot " in since or counted != list(range(before + 1, before + 1 + len(counted))):
                raise LabError(f"guest {name} did not go on as it was: {counted} after {before}")
            if len(counted) > COUNTS_TO_SEE:
                return counted[-1]
            time.sleep(POLL_S)
        raise LabError(f"guest {name} does not count where it was moved to")

    def _drain(self, node_id: str | None) -> None:
        """Ask what a drain would do, clear what is in its way, and drain."""
        name = self._name_of(node_id)
        for vm in self._api.plan_drain(name).vms:
            why = "; ".join(reason.message for reason in vm.reasons)
            target = f" to {vm.target_name}" if vm.target_name else ""
            self._say(f"{vm.vm_name:8} {'BLOCKED: ' + why if why else vm.action + target}")
            if why:
                took = self._timed("delete", partial(self._api.delete_vm, vm.vm_name))
                self._say(f"         so its user gives it up; done after {took:.2f} s")
        took = self._timed("drain", lambda: self._api.drain(name))
        emptied = next(each for each in self._api.nodes() if each.name == name)
        if emptied.allocated.vms:
            raise LabError(f"node {name} still has {emptied.allocated.vms} VMs")
        self._say(f"{name:8} drained: empty and cordoned after {took:.2f} s")
        self._api.uncordon(name)
        self._say(f"{name:8} open again for new VMs")

    def _act(self, name: str, action: str) -> None:
        took = self._timed(action, lambda: self._api.act(name, action))
        phase = self._api.vm(name).status.phase
        self._say(f"{name:8} {action}: {phase} after {took:.2f} s")

    def _timed(self, what: str, ask: Callable[[], OperationView]) -> float:
        started = time.monotonic()
        self._succeeded(self._api.wait(ask()))
        took = time.monotonic() - started
        self.figures.append(Timed(what, took))
        return took

    def _succeeded(self, ended: OperationView) -> OperationView:
        if ended.state != "succeeded":
            detail = ended.error.detail or ended.error.title if ended.error else "no reason given"
            raise LabError(f"{ended.kind} {ended.state}: {detail}")
        return ended

    def _show_vms(self) -> None:
        for vm in sorted(self._api.vms(), key=lambda each: each.name):
            self._say(
                f"{vm.name:8} {vm.status.phase:8} on {self._name_of(vm.status.node):5} "
                f"{vm.spec.vcpus} vCPU, {vm.spec.memory_mib} MiB"
            )

    def _show_untouched(self, counts: dict[str, int]) -> None:
        now = self._count("web-2")
        if now is None or now <= counts["web-2"]:
            raise LabError(f"guest web-2 stood still: {counts['web-2']}, then {now}")
        self._say(f"web-2, which nobody touched, counted on from {counts['web-2']} to {now}")

    def _count(self, name: str) -> int | None:
        """Return the last counter on a guest's console; None before the first."""
        try:
            found = _counters(self._console(name, -CONSOLE_BYTES))
        except ApiProblem as error:
            if error.problem.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        return found[-1] if found else None

    def _console(self, name: str, offset: int) -> bytes:
        query = (("offset", offset), ("limit", CONSOLE_BYTES))
        return self._api.client.get(path_of("vms", name, "console-log"), query).body

    def _name_of(self, node: str | None) -> str:
        return self._node_names.get(node, node) if node else "-"

    def _chapter(self, title: str) -> None:
        self._say(f"\n== {title}")


def _counters(log: bytes) -> list[int]:
    """Return the counters that a guest has printed in whole."""
    return [int(found) for found in re.findall(rb"count (\d+)\r?\n", log)]


def _why(plan: PlanView) -> str:
    """Say in a line what the plan made of each node."""
    ranked = sorted(plan.candidates, key=lambda c: (not c.fits, -(c.score or 0.0), c.node_name))
    words = []
    for candidate in ranked:
        if not candidate.fits:
            words.append(f"{candidate.node_name} refused ({_reasons(candidate)})")
            continue
        parts = ", ".join(f"{k} {v:.2f}" for k, v in candidate.scores.items())
        words.append(f"{candidate.node_name} {candidate.score or 0.0:.3f} ({parts})")
    return "; ".join(words)


def _reasons(candidate: CandidateView) -> str:
    return "; ".join(r.message or r.code for r in candidate.reasons) or "fits"
