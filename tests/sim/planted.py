"""Planted bugs: each breaks the product in one place, and names the invariant meant to find it.

A bug is a context manager that patches the product while it is entered. They test the simulation:
a search over seeds that does not find one is a search that finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from msgspec import Struct
from msgspec.structs import replace

from agent import arrivals
from agent import reconciler as agent_reconciler
from agent.fence import Departure, Fence
from agent.steps import Step, next_step
from controlplane.commands.attempts import PermitStart
from controlplane.commands.draft import Draft, SealedDraft
from controlplane.commands.operations import put_vm
from controlplane.reconcilers.silence import NoteSilence
from controlplane.sagas import matrix, migrate
from controlplane.sagas.context import StepContext
from controlplane.sessions import hub
from controlplane.sessions.desired import desired_of
from controlplane.state import ClusterState
from controlplane.store.etcd_members import Effect
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.etcd_rpc import Txn, TxnDone
from controlplane.store.port import Committed, NotCommitted, Write
from controlplane.store.port import Fence as StoreFence
from shared.errors import OutcomeUnknown
from shared.model import AttemptState, Node, Term, Vm
from shared.moves import EndState, MigrationClaim, MigrationStage
from shared.protocol import Desired, Intent, MigrationReport, MigrationRole
from tests.sim.agent_ports import ProcessHypervisor
from tests.sim.invariants import Invariant
from tests.sim.invariants.guests import (
    end_was_wanted,
    erased_was_deleted,
    generation_used_once,
    returned_guest_is_held,
    single_runner,
)
from tests.sim.invariants.moves import (
    arrived_guest_is_not_cleaned,
    claim_outlives_the_guest,
    moves_are_begun_once,
    owner_has_the_guest,
    start_has_no_rival,
)
from tests.sim.invariants.records import (
    history_is_dense,
    nothing_acknowledged_is_lost,
    within_capacity,
    written_by_the_leader,
)

_E = EndState


class PlantedBug(Struct, frozen=True):
    """``found_by`` is the invariant that must find it, alone; the search begins at ``first``."""

    plant: Callable[[], AbstractContextManager[Any]]
    found_by: Invariant
    first: int = 0


def fence_forgets_generations() -> AbstractContextManager[Any]:
    """A permit is not used up, so that it starts the VM again."""

    async def forget(self: Fence, vm_id: str, generation: int) -> None:
        return None

    return patch.object(Fence, "use_generation", forget)


def failures_reported_as_success() -> AbstractContextManager[Any]:
    """A commit of unknown outcome is neither sent again nor read back."""
    commit = EtcdStore.commit

    async def hopeful(
        self: EtcdStore, fence: StoreFence, writes: Sequence[Write]
    ) -> Committed | NotCommitted:
        try:
            return await commit(self, fence, writes)
        except OutcomeUnknown:
            return Committed(fence.mark_revision)

    return patch.object(EtcdStore, "commit", hopeful)


def commits_without_the_term() -> AbstractContextManager[Any]:
    """A commit does not ask whose the leader key is."""
    txn = EtcdStore._txn

    async def unfenced(self: EtcdStore, request: Txn, effect: Effect) -> TxnDone:
        fenced = len(request.compares) == 2
        return await txn(
            self, replace(request, compares=request.compares[1:]) if fenced else request, effect
        )

    return patch.object(EtcdStore, "_txn", unfenced)


class _MoveAway(Struct, frozen=True, kw_only=True):
    """Takes a VM from a node that is silent, as if that proved anything."""

    vm_id: str

    def decide(self, draft: Draft) -> None:
        vm = draft.find(Vm, self.vm_id)
        if vm is None or vm.status.attempt is None or vm.deleting:
            return
        over = replace(vm.status.attempt, state=AttemptState.ENDED)
        put_vm(draft, replace(vm, status=replace(vm.status, node=None, attempt=over)))


def silence_is_death() -> AbstractContextManager[Any]:
    """VMs of a silent node are started elsewhere."""
    reconcile = NoteSilence.reconcile

    async def impatient(self: NoteSilence) -> None:
        await reconcile(self)
        for node_id, stored in list(self._state.nodes.items()):
            if stored.record.state.value == "silent":
                for vm_id in sorted(self._state.vm_ids_on(node_id)):
                    await self._applier.submit(_MoveAway(vm_id=vm_id))

    return patch.object(NoteSilence, "reconcile", impatient)


def starts_without_room() -> AbstractContextManager[Any]:
    """Nobody asks whether a stopped VM still has room on its node."""
    decide = PermitStart.decide

    def careless(self: PermitStart, draft: Draft) -> int:
        return decide(replace(self, check=lambda *_: None), draft)

    return patch.object(PermitStart, "decide", careless)


def stop_removes() -> AbstractContextManager[Any]:
    """An agent that stopped a VM leaves nothing of it."""

    def thorough(desired: Desired, *facts: Any) -> Step:
        step = next_step(desired, *facts)
        stopped = desired.intent is Intent.STOP and step is Step.SETTLED
        return Step.REMOVE if stopped else step

    return patch.object(agent_reconciler, "next_step", thorough)


def strays_are_stopped() -> AbstractContextManager[Any]:
    """An agent ends every guest that it was not told of, whoever may have started it."""
    start = agent_reconciler.VmReconciler.drop_all_but

    async def tidy(self: Any, vm_ids: tuple[str, ...]) -> None:
        await start(self, vm_ids)
        for domain in await self._hypervisor.domains():
            await self._hypervisor.stop(domain.name, domain.generation)

    return patch.object(agent_reconciler.VmReconciler, "drop_all_but", tidy)


def refused_change_uses_a_number() -> AbstractContextManager[Any]:
    """Numbers are given out before the outcome is known: a group that fails leaves a gap."""
    sealed = Draft.sealed
    # By the memory itself, not its address: a new process must begin without the old numbers.
    given_out: WeakKeyDictionary[ClusterState, int] = WeakKeyDictionary()

    def eager(self: Draft, last_seq: int) -> SealedDraft:
        memory = self._state
        draft = sealed(self, max(last_seq, given_out.get(memory, 0)))
        if draft.history:
            given_out[memory] = draft.history[-1].seq
        return draft

    return patch.object(Draft, "sealed", eager)


def switched_source_is_resumed() -> AbstractContextManager[Any]:
    """The source of a migration that has switched is told what one that failed is told."""

    def mixed_up(stored: Any, node: Node, term: Term, name_of: Any) -> Desired | None:
        desired = desired_of(stored, node, term, name_of)
        if desired is None or desired.migration is None or desired.intent is not Intent.LEAVE:
            return desired
        order = replace(desired.migration, stage=MigrationStage.RESUME)
        return replace(desired, intent=Intent.RUN, migration=order)

    return patch.object(hub, "desired_of", mixed_up)


def return_codes_decide() -> AbstractContextManager[Any]:
    """Where the guest is is read from what the source's call returned."""

    def believed(context: StepContext, vm: Vm, claim: MigrationClaim) -> tuple[EndState, EndState]:
        report = migrate._report(context, vm, claim, claim.source)
        if report is None or not report.over:
            return EndState.UNKNOWN, EndState.UNKNOWN
        failed = report.fault is not None
        return (_E.RUNNING, _E.ABSENT) if failed else (_E.ABSENT, _E.RUNNING)

    return patch.multiple(migrate, _ends=believed, _fresh_ends=believed)


@contextmanager
def running_destination_is_cleaned() -> Iterator[None]:
    """Of two guests the source's is kept, and whatever is on the destination is ended."""
    two = {(source, _E.RUNNING): matrix.Verdict.STAYED for source in (_E.RUNNING, _E.HELD)}
    with (
        patch.dict(matrix.VERDICTS, two),
        patch.object(arrivals, "_NEVER_RAN", frozenset(EndState) - {_E.ABSENT}),
    ):
        yield


def departures_are_forgotten() -> AbstractContextManager[Any]:
    """That a guest has set out is in the agent's memory only."""

    async def remember(self: Fence, vm_id: str, departure: Departure) -> None:
        self._take(replace(self.facts(vm_id), departure=departure))

    return patch.object(Fence, "depart", remember)


def unreachable_is_empty() -> AbstractContextManager[Any]:
    """A destination that cannot be asked counts as one that has nothing."""
    ends, fresh_ends, report = migrate._ends, migrate._fresh_ends, migrate._report

    def assumed(found: Any) -> Any:
        def of(context: StepContext, vm: Vm, claim: MigrationClaim) -> tuple[EndState, EndState]:
            source, destination = found(context, vm, claim)
            gone = claim.destination is None or not context.nodes.trusts(claim.destination)
            return (_E.RUNNING, _E.ABSENT) if gone else (source, destination)

        return of

    def answered(
        context: StepContext, vm: Vm, claim: MigrationClaim, node_id: str | None
    ) -> MigrationReport | None:
        if node_id is None or context.nodes.trusts(node_id):
            return report(context, vm, claim, node_id)
        return MigrationReport(
            generation=claim.generation,
            role=MigrationRole.DESTINATION,
            stage=claim.stage,
            end=EndState.ABSENT,
            over=True,
            settled=True,
        )

    return patch.multiple(
        migrate, _ends=assumed(ends), _fresh_ends=assumed(fresh_ends), _report=answered
    )


@contextmanager
def leftovers_are_no_rivals() -> Iterator[None]:
    """A VM is started anew although its former node may still run it."""
    decide, index = PermitStart.decide, ClusterState._index_vm

    def careless(self: PermitStart, draft: Draft) -> int:
        draft.put(_without_leftovers(draft.vm(self.vm_id)))
        return decide(self, draft)

    def as_if_free(self: ClusterState, vm: Vm) -> None:
        index(self, vm)
        index(self, _without_leftovers(vm))

    with (
        patch.object(PermitStart, "decide", careless),
        patch.object(ClusterState, "_index_vm", as_if_free),
    ):
        yield


def _without_leftovers(vm: Vm) -> Vm:
    return replace(vm, status=replace(vm.status, leftovers=()))


def nobody_holds_returned_guests() -> AbstractContextManager[Any]:
    """An agent lets a guest be that libvirt lets go on although it may have moved."""

    async def look_away(self: ProcessHypervisor, name: str, generation: int) -> bool:
        return False

    return patch.object(ProcessHypervisor, "hold", look_away)


PLANTED: tuple[PlantedBug, ...] = (
    PlantedBug(fence_forgets_generations, generation_used_once),
    PlantedBug(failures_reported_as_success, nothing_acknowledged_is_lost),
    PlantedBug(commits_without_the_term, written_by_the_leader),
    PlantedBug(silence_is_death, single_runner),
    PlantedBug(starts_without_room, within_capacity),
    PlantedBug(stop_removes, erased_was_deleted),
    PlantedBug(strays_are_stopped, end_was_wanted),
    PlantedBug(refused_change_uses_a_number, history_is_dense),
    PlantedBug(switched_source_is_resumed, single_runner),
    PlantedBug(return_codes_decide, owner_has_the_guest),
    PlantedBug(running_destination_is_cleaned, arrived_guest_is_not_cleaned, first=35),
    PlantedBug(departures_are_forgotten, moves_are_begun_once),
    PlantedBug(unreachable_is_empty, claim_outlives_the_guest),
    PlantedBug(leftovers_are_no_rivals, start_has_no_rival, first=33),
    PlantedBug(nobody_holds_returned_guests, returned_guest_is_held),
)
