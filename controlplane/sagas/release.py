"""How a drain lets go of a VM at rest: only to a node that has seen its disks.

That a pool is shared is somebody's word; whether the VM's disks are in it, its new node is asked,
once in a drain: what it answers is in the drain's journal.
"""

from __future__ import annotations

from datetime import timedelta

from controlplane.commands.drains import (
    journal_of,
    note_answer,
    refuse_release,
    release_vm,
)
from controlplane.sagas.context import Outcome, StepContext, Waits, Writes
from controlplane.sagas.preflight import arrival_blockers
from shared.errors import FieldError, NodeUnreachable, Overloaded
from shared.model import Vm, may_have_run
from shared.moves import DrainJournal

# Within seconds a node that is gone is silent, and chosen no more, and a libvirtd that is restarted
# is back; for one that has not answered for so long nobody waits any more.
ASK_LIMIT = timedelta(seconds=60)


async def let_go(context: StepContext, vm: Vm, new_node: str | None) -> Outcome:
    """Have a VM at rest go, or stay because of what its new node answers.

    One that has never run has no disks to be missed: they are made where it is started first.
    """
    if new_node is None or not may_have_run(vm):
        return Writes(release_vm(vm.id, new_node))
    node = context.state.nodes[new_node].record
    query_id = f"{context.operation.id}-{vm.id}"
    silent = journal_of(context.operation).unanswered
    since = next((each.since for each in silent if each.node == new_node), None)
    try:
        blockers = await arrival_blockers(context.nodes.ask, query_id, vm, node)
    except (NodeUnreachable, Overloaded) as unheard:
        if since is None:
            return Writes(note_answer(new_node, answered=False))
        if context.parts.clock.now() - max(since, context.parts.since) <= ASK_LIMIT:
            return Waits(str(unheard))
        why = f"nobody knows whether {node.name} has its disks: {unheard}"
        return Writes(refuse_release(vm.id, why))
    if since is not None:
        return Writes(note_answer(new_node, answered=True))
    if blockers:
        why = f"{node.name}, which was to take it, cannot: {_told(blockers)}"
        return Writes(refuse_release(vm.id, why))
    return Writes(release_vm(vm.id, new_node))


def stays_after_all(journal: DrainJournal, vm: Vm) -> str:
    """Return why a VM that is to be let go of stays; empty when nobody has said so."""
    return next((each.reason for each in journal.refused if each.vm == vm.id), "")


def _told(blockers: tuple[FieldError, ...]) -> str:
    """Return the first one only: the journal holds a reason for each of a node's VMs."""
    more = len(blockers) - 1
    return f"{blockers[0].message}{f' (and {more} more)' if more else ''}"
