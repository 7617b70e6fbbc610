"""Bugs planted in the leader, its applier and its loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.attempts import ObserveVm, PermitStart
from controlplane.commands.draft import Draft, SealedDraft
from controlplane.commands.operations import put_vm
from controlplane.commands.terms import OnTerms
from controlplane.reconcilers.silence import NoteSilence
from controlplane.services import writes
from controlplane.services.context import Context
from controlplane.state import ClusterState
from controlplane.store import applier
from controlplane.store.applier import Applier
from controlplane.store.etcd_members import Effect
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.etcd_rpc import Txn, TxnDone
from controlplane.store.informer import Informer
from controlplane.store.port import Committed, NotCommitted, WatchBatch, Write
from controlplane.store.port import Fence as StoreFence
from shared.errors import OutcomeUnknown
from shared.ids import IdSource
from shared.model import AttemptState, IdempotencyRecord, Vm, attempt_generation

# So many ids of a kind are given out before they begin anew.
IDS_IN_ALL = 12


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


def reports_of_any_attempt_count() -> AbstractContextManager[Any]:
    """What a node says of an earlier attempt is taken for the present one's."""
    decide = ObserveVm.decide

    def mixed_up(self: ObserveVm, draft: Draft) -> None:
        vm = draft.find(Vm, self.report.vm_id)
        generation = 0 if vm is None else attempt_generation(vm)
        report = replace(self.report, generation=generation, permit_used=True)
        decide(replace(self, report=report) if generation else self, draft)

    return patch.object(ObserveVm, "decide", mixed_up)


def commits_without_the_mark() -> AbstractContextManager[Any]:
    """A commit does not ask what was committed last: sent again, it is made again."""
    txn = EtcdStore._txn

    async def unmarked(self: EtcdStore, request: Txn, effect: Effect) -> TxnDone:
        fenced = len(request.compares) == 2
        return await txn(
            self, replace(request, compares=request.compares[:1]) if fenced else request, effect
        )

    return patch.object(EtcdStore, "_txn", unmarked)


def acknowledged_before_it_is_stored() -> AbstractContextManager[Any]:
    """Whoever asked is told of what was decided before it is written: from memory."""
    write = Applier._write

    async def hasty(self: Applier, sealed: SealedDraft, group: list[tuple[Any, Any]]) -> None:
        self._take(sealed, self._state.revision)
        applier._resolve(group)
        await write(self, sealed, group)

    return patch.object(Applier, "_write", hasty)


def ids_are_used_again() -> AbstractContextManager[Any]:
    """Ids of operations and of VMs come round."""
    new, given_out = IdSource.new, WeakKeyDictionary[IdSource, dict[str, int]]()

    def few(self: IdSource, kind: str) -> str:
        if kind not in ("op", "vm"):
            return new(self, kind)
        counts = given_out.setdefault(self, {})
        counts[kind] = counts.get(kind, 0) + 1
        return f"{kind}-{self._cell}{counts[kind] % IDS_IN_ALL:020d}"

    return patch.object(IdSource, "new", few)


def keys_are_not_kept() -> AbstractContextManager[Any]:
    """A request that is sent again under its key is done again."""
    decide = OnTerms.decide

    def forgetful(self: OnTerms[Any], draft: Draft) -> Any:
        decided = decide(self, draft)
        if self.key is not None and not decided.replayed:
            draft.delete(IdempotencyRecord, self.key.id)
        return decided

    return patch.object(OnTerms, "decide", forgetful)


def a_stop_is_not_audited() -> AbstractContextManager[Any]:
    """One kind of change leaves no audit record."""
    audit = Draft.audit

    def partial(self: Draft, action: str, *rest: Any, **more: Any) -> None:
        if action != "vm.stop":
            audit(self, action, *rest, **more)

    return patch.object(Draft, "audit", partial)


@contextmanager
def lost_watches_are_forgotten() -> Iterator[None]:
    """After a watch was lost, the next begins with what comes then, and nobody counts commits."""
    follow = Informer._follow

    async def careless(self: Informer, next_revision: int) -> int:
        return await follow(self, 0 if self._state.revision else next_revision)

    def blind(self: Informer, batch: WatchBatch) -> bool:
        return False

    with (
        patch.object(Informer, "_follow", careless),
        patch.object(Informer, "_lacks_commits", blind),
    ):
        yield


def takeover_without_a_listing() -> AbstractContextManager[Any]:
    """A new leader takes its memory for the newest, as the watch has left it."""
    load = Informer.load

    async def trusting(self: Informer, revision_min: int) -> None:
        if not revision_min:
            await load(self, revision_min)

    return patch.object(Informer, "load", trusting)


def old_memory_says_what_is_there() -> AbstractContextManager[Any]:
    """A write is refused for what this replica's memory lacks, however old that is."""

    async def at_once(context: Context) -> None:
        return

    return patch.object(writes, "_catch_up", at_once)
