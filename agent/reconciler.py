"""Makes desired VMs so on this node, one step at a time, and reports what it then sees.

Whoever works on a VM has taken its key from the queue: that is the VM's lock. Before each call that
acts, the fence is asked again and the driver compares the generation in the domain's metadata. A
call whose outcome is unknown is never reported: the domain is looked at again first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from agent.fence import Fence
from agent.hypervisor import DomainInfo, Hypervisor, volume_name
from agent.inventory import NodeFacts
from agent.migration import Migrations
from agent.orders import definition_of
from agent.steps import ShutdownState, Step, next_step
from agent.survey import sighting_of
from agent.workqueue import WorkQueue
from shared.errors import (
    DiskMissing,
    GenerationMismatch,
    HypervisorError,
    HypervisorUnavailable,
    NovacronError,
    StaleRevision,
    StaleTerm,
)
from shared.model import DiskSpec, ObservedPower, Problem, RequestKind
from shared.problems import problem_of
from shared.protocol import Desired, Intent, MigrationReport, Sighting, Survey, VmReport
from shared.retry import Backoff
from shared.states import RUNNING_POWERS

log = logging.getLogger(__name__)

# As many VMs are worked on at once as libvirt takes requests on one connection.
WORKERS = 5
# From absent to running takes one step, from running to removed four; more means a loop.
STEPS_MAX = 8
# While libvirtd is away it is asked again soon: guests may have ended meanwhile.
LOOK_AGAIN_BACKOFF = Backoff(first_s=0.5, cap_s=5.0)
# A guest that stops by itself as soon as it goes on (its pool is full) is not resumed oftener.
RESUME_PERIOD_S = 10.0
# Events can be lost; every VM is looked at this often anyway.
RESYNC_PERIOD_S = 30.0
# What is under way ends within this, or libvirt hangs: the leader asks again.
SURVEY_LIMIT_S = 8.0


class KnownVm(Struct, frozen=True):
    """A VM that the leader binds here, and what was last seen of its domain."""

    desired: Desired
    power: ObservedPower


Reporter = Callable[[VmReport], None]


class VmReconciler:
    def __init__(
        self,
        hypervisor: Hypervisor,
        fence: Fence,
        node: NodeFacts,
        report: Reporter,
        migrations: Migrations,
        queue: WorkQueue,
        rng: random.Random,
    ) -> None:
        self._hypervisor = hypervisor
        self._fence = fence
        self._node = node
        self._report = report
        self._migrations = migrations
        self._rng = rng
        self._queue = queue
        self._desired: dict[str, Desired] = {}
        self._vm_of_domain: dict[str, str] = {}
        self._faults: dict[str, Problem] = {}
        self._powers: dict[str, ObservedPower] = {}
        self._shutdowns: dict[str, tuple[int, float]] = {}
        self._resumed_s: dict[str, float] = {}
        self._retries: dict[str, Iterator[float]] = {}
        hypervisor.listen(self._domain_changed)

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(WORKERS):
                    tasks.create_task(self._work())
                tasks.create_task(self._resync())
        finally:
            self._queue.close()

    def take(self, desired: Desired) -> None:
        """Work towards a desired state from now on, unless something newer is known."""
        known = self._desired.get(desired.vm_id)
        if known is not None and (known.term, known.revision) > (desired.term, desired.revision):
            log.info("an older desired state of %s is ignored", desired.vm_id)
            return
        self._desired[desired.vm_id] = desired
        self._vm_of_domain[desired.domain_name] = desired.vm_id
        self._queue.add(desired.vm_id)

    def known(self) -> tuple[KnownVm, ...]:
        """Return the VMs that were told of and looked at."""
        return tuple(
            KnownVm(self._desired[vm_id], power)
            for vm_id, power in self._powers.items()
            if vm_id in self._desired
        )

    async def found(self) -> tuple[tuple[VmReport, ...], tuple[str, ...]]:
        """Return reports on the domains of ours, and the names of foreign ones.

        What was worked on while libvirt was asked is left out: its start may have come between.
        """
        epoch = self._fence.term.epoch
        with self._queue.touched() as touched:
            domains = await self._hypervisor.domains()
        reports: list[VmReport] = []
        foreign: list[str] = []
        for domain in domains:
            if domain.vm_id is None:
                foreign.append(domain.name)
            elif domain.vm_id not in touched:
                report = self._seen(domain.vm_id, domain.generation, domain, 0)
                reports.append(replace(report, epoch=epoch))
        return tuple(reports), tuple(foreign)

    async def survey(self) -> Survey:
        """Return every domain of ours, once nothing of an earlier epoch is under way any more.

        What an earlier epoch wanted is forgotten first: none of it would be done. What libvirt
        moves by itself goes on, and is told. Raises HypervisorUnavailable.
        """
        epoch = self._fence.term.epoch
        for vm_id, desired in list(self._desired.items()):
            if desired.term.epoch < epoch:
                self._drop(vm_id)
        try:
            async with asyncio.timeout(SURVEY_LIMIT_S):
                await self._queue.finished()
                domains = await self._look_at_all()
        except TimeoutError:
            raise HypervisorUnavailable(
                f"what is under way on {self._node.name} has not ended in {SURVEY_LIMIT_S:g} s"
            ) from None
        return Survey(boot_id=self._node.boot_id, epoch=epoch, domains=domains)

    async def _look_at_all(self) -> tuple[Sighting, ...]:
        found: list[Sighting] = []
        for domain in await self._hypervisor.domains():
            if domain.vm_id is not None:
                facts = self._fence.facts(domain.vm_id)
                seen = await sighting_of(self._hypervisor, self._migrations, facts, domain)
                found += [] if seen is None else [seen]
        return tuple(found)

    async def drop_all_but(self, vm_ids: tuple[str, ...]) -> None:
        """Stop working on VMs that the leader does not bind here; their domains are left alone."""
        bound = set(vm_ids)
        for vm_id in sorted(set(self._desired) - bound):
            self._drop(vm_id)
        for domain in await self._hypervisor.domains():
            if domain.vm_id is not None and domain.vm_id not in bound:
                log.warning("the domain %s belongs to no VM bound here: left alone", domain.name)

    async def _resync(self) -> None:
        while True:
            # First of all right after the start: a guest may have come back before it.
            self._domain_changed("")
            await asyncio.sleep(RESYNC_PERIOD_S)

    def _domain_changed(self, name: str) -> None:
        self._migrations.domain_changed(name)
        if name:
            vm_id = self._vm_of_domain.get(name)
            if vm_id is not None:
                self._queue.add(vm_id)
            return
        for vm_id in sorted(self._desired):
            self._queue.add(vm_id)

    async def _work(self) -> None:
        while True:
            vm_id = await self._queue.take()
            try:
                desired = self._desired.get(vm_id)
                if desired is not None:
                    await self._reconcile(desired)
                self._retries.pop(vm_id, None)
            except (StaleTerm, StaleRevision) as stale:
                log.warning("%s: refused: %s", vm_id, stale)
            except NovacronError as error:
                self._try_again(vm_id, error)
            finally:
                self._queue.done(vm_id)

    def _try_again(self, vm_id: str, error: NovacronError) -> None:
        delays = self._retries.get(vm_id)
        if delays is None:
            delays = self._retries.setdefault(vm_id, LOOK_AGAIN_BACKOFF.delays(self._rng))
        log.warning("%s: will be looked at again: %s", vm_id, error)
        self._queue.add_after(vm_id, next(delays))

    async def _reconcile(self, desired: Desired) -> None:
        await self._fence.accept_revision(desired.term, desired.vm_id, desired.revision)
        if desired.migration is not None:
            await self._take_part(desired)
            return
        await self._migrations.settle(desired.vm_id)
        try:
            await self._settle(desired)
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            await self._tell_refusal(desired, error)
            raise

    async def _settle(self, desired: Desired) -> None:
        """Take one step after the other. Raises HypervisorError for one that cannot be done."""
        for _ in range(STEPS_MAX):
            domain = await self._hypervisor.domain(desired.domain_name)
            step = next_step(
                desired,
                domain,
                self._fence.facts(desired.vm_id),
                self._node.boot_id,
                self._shutdown_state(desired),
            )
            if step in (Step.SETTLED, Step.AWAIT_SHUTDOWN, Step.CONFLICT):
                self._tell(desired, domain, step)
                return
            log.info("%s: %s", desired.name, step.value, extra={"vm": desired.vm_id})
            if step is Step.REMOVE:
                await self._remove(desired, domain)
                return
            await self._take_step(step, desired, domain)
            if self._desired.get(desired.vm_id) is not desired:
                self._queue.add(desired.vm_id)  # something newer came meanwhile
                return
        raise HypervisorError(f"{desired.name} does not settle in {STEPS_MAX} steps")

    async def _take_part(self, desired: Desired) -> None:
        """Do this node's part in a migration; nothing else happens to the domain meanwhile."""
        try:
            part = await self._migrations.work(desired)
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            await self._tell_part(desired, await self._migrations.refused(desired, error))
            raise
        await self._tell_part(desired, part)

    async def _tell_part(self, desired: Desired, part: MigrationReport) -> None:
        domain = await self._hypervisor.domain(desired.domain_name)
        report = self._seen_for(desired, desired.generation, domain)
        left = desired.intent is Intent.LEAVE and part.settled
        if left and self._desired.get(desired.vm_id) is desired:
            # What is told of it must outlast it: nobody works on the VM here any more.
            self._drop(desired.vm_id)
            await self._fence.forget(desired.vm_id)
        self._report(replace(report, migration=part))

    async def _take_step(self, step: Step, desired: Desired, domain: DomainInfo | None) -> None:
        self._fence.check(desired.term, desired.vm_id, desired.revision)
        name, generation = desired.domain_name, desired.generation
        if step is Step.START:
            await self._start(desired)
        elif step is Step.PAUSE:
            self._resumed_s.pop(desired.vm_id, None)
            await self._hypervisor.pause(name, generation)
        elif step is Step.RESUME:
            await self._resume(desired)
        elif step in (Step.REBOOT, Step.RESET):
            await self._restart_guest(step, desired)
        elif step is Step.ASK_TO_SHUT_DOWN:
            await self._ask_to_shut_down(desired)
        elif step is Step.STOP:
            await self._hypervisor.stop(name, generation)
        elif step is Step.REVOKE:
            await self._fence.use_generation(desired.vm_id, generation)
        elif step is Step.ANSWER:
            await self._answer(desired)

    async def _start(self, desired: Desired) -> None:
        """Prepare and start; the permit is used up, durably, before libvirt is asked to start."""
        self._faults.pop(desired.vm_id, None)
        try:
            for disk in desired.spec.disks:
                await self._ensure_disk(desired, disk)
            await self._hypervisor.define(definition_of(desired, desired.generation))
            await self._fence.use_generation(desired.vm_id, desired.generation)
            self._fence.check(desired.term, desired.vm_id, desired.revision)
            await self._hypervisor.start(desired.domain_name, desired.generation)
        except HypervisorUnavailable:
            raise  # nobody knows how far it came: look again when libvirt answers
        except HypervisorError as error:
            await self._fence.use_generation(desired.vm_id, desired.generation)
            self._faults[desired.vm_id] = problem_of(error)
            log.warning("%s: the start failed: %s", desired.name, error)

    async def _ensure_disk(self, desired: Desired, disk: DiskSpec) -> None:
        """Make a disk, unless the VM has run: an empty one would stand for what it has written.

        Then a file system is not mounted, or the volume is lost. Raises HypervisorError.
        """
        volume, make = volume_name(desired.vm_id, disk.name), not desired.has_run
        try:
            await self._hypervisor.ensure_volume(disk.pool, volume, disk.size_gib, make=make)
        except DiskMissing as missing:
            raise DiskMissing(
                f"disk {disk.name!r} is not in pool {disk.pool!r} on {self._node.name}, although "
                "the VM has run: mount the pool's file system there, or restore its volume "
                f"{volume!r}; no empty one is made in its place"
            ) from missing

    async def _resume(self, desired: Desired) -> None:
        now_s = asyncio.get_running_loop().time()
        resumed_s = self._resumed_s.get(desired.vm_id)
        if resumed_s is not None and now_s - resumed_s < RESUME_PERIOD_S:
            raise HypervisorError(
                "the guest stops again as soon as it is resumed: see whether its pools are full, "
                "and what QEMU's log on its node says"
            )
        self._resumed_s[desired.vm_id] = now_s
        await self._hypervisor.resume(desired.domain_name, desired.generation)

    async def _restart_guest(self, step: Step, desired: Desired) -> None:
        """Answered first: a guest that is rebooted twice is worse than one that is asked again."""
        await self._answer(desired)
        act = self._hypervisor.reboot if step is Step.REBOOT else self._hypervisor.reset
        await act(desired.domain_name, desired.generation)

    async def _ask_to_shut_down(self, desired: Desired) -> None:
        assert desired.request is not None, "only a request asks a guest to shut down"
        await self._hypervisor.shutdown(desired.domain_name, desired.generation)
        deadline_s = desired.request.deadline_s
        end_s = asyncio.get_running_loop().time() + deadline_s
        self._shutdowns[desired.vm_id] = (desired.request.number, end_s)
        self._queue.add_after(desired.vm_id, deadline_s)

    async def _answer(self, desired: Desired) -> None:
        assert desired.request is not None, "only a request is answered"
        await self._fence.answer_request(desired.vm_id, desired.request.number)

    def _shutdown_state(self, desired: Desired) -> ShutdownState:
        request = desired.request
        if request is None or request.kind is not RequestKind.SHUTDOWN:
            return ShutdownState.NOT_ASKED
        number, end_s = self._shutdowns.get(desired.vm_id, (0, 0.0))
        if number != request.number:
            return ShutdownState.NOT_ASKED
        overdue = asyncio.get_running_loop().time() >= end_s
        return ShutdownState.OVERDUE if overdue else ShutdownState.ASKED

    async def _remove(self, desired: Desired, domain: DomainInfo | None) -> None:
        """Leave nothing of the VM: domain, console log, disks; then forget what was known."""
        self._fence.check(desired.term, desired.vm_id, desired.revision)
        if domain is not None:
            if domain.generation > desired.generation:
                raise GenerationMismatch(
                    f"the domain has generation {domain.generation}, above {desired.generation}"
                )
            await self._hypervisor.undefine(desired.domain_name, domain.generation)
        for disk in desired.spec.disks:
            volume = volume_name(desired.vm_id, disk.name)
            await self._hypervisor.delete_volume(disk.pool, volume)
        self._drop(desired.vm_id)
        await self._fence.forget(desired.vm_id)
        self._report(
            VmReport(
                vm_id=desired.vm_id,
                generation=desired.generation,
                power=ObservedPower.ABSENT,
                permit_used=True,
                revision=desired.revision,
                epoch=desired.term.epoch,
                removed=True,
            )
        )

    def _drop(self, vm_id: str) -> None:
        desired = self._desired.pop(vm_id, None)
        if desired is not None:
            self._vm_of_domain.pop(desired.domain_name, None)
        for known in (self._faults, self._powers, self._shutdowns, self._resumed_s):
            known.pop(vm_id, None)

    def _tell(self, desired: Desired, domain: DomainInfo | None, step: Step) -> None:
        generation, fault = desired.generation, self._faults.get(desired.vm_id)
        if step is Step.CONFLICT and domain is not None:
            mismatch = GenerationMismatch(
                f"generation {domain.generation} runs here, {desired.generation} is wanted"
            )
            log.error("%s: %s", desired.name, mismatch)
            generation, fault = domain.generation, problem_of(mismatch)
        report = self._seen_for(desired, generation, domain, fault)
        self._powers[desired.vm_id] = report.power
        self._report(report)

    async def _tell_refusal(self, desired: Desired, error: HypervisorError) -> None:
        """Tell why a guest that is there is not as it should be; it is tried again."""
        domain = await self._hypervisor.domain(desired.domain_name)
        if domain is None or domain.generation != desired.generation:
            return
        if domain.power in RUNNING_POWERS:
            report = self._seen_for(desired, desired.generation, domain, problem_of(error))
            self._powers[desired.vm_id] = report.power
            self._report(report)

    def _seen_for(
        self,
        desired: Desired,
        generation: int,
        domain: DomainInfo | None,
        fault: Problem | None = None,
    ) -> VmReport:
        """Return a report that answers a desired state."""
        report = self._seen(desired.vm_id, generation, domain, desired.revision, fault)
        return replace(report, epoch=desired.term.epoch)

    def _seen(
        self,
        vm_id: str,
        generation: int,
        domain: DomainInfo | None,
        revision: int,
        fault: Problem | None = None,
    ) -> VmReport:
        facts = self._fence.facts(vm_id)
        power = ObservedPower.ABSENT if domain is None else domain.power
        if fault is not None and power not in (*RUNNING_POWERS, ObservedPower.UNKNOWN):
            power = ObservedPower.FAILED
        return VmReport(
            vm_id=vm_id,
            generation=generation,
            power=power,
            permit_used=facts.used_generation >= generation,
            highest_used=facts.used_generation,
            revision=revision,
            answered_request=facts.answered_request,
            fault=fault,
        )
