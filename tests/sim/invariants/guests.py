"""Of guests: where they run, what starts and ends them, and what becomes of their disks."""

from __future__ import annotations

from collections.abc import Iterator

from shared.model import Vm
from tests.sim.ledger import (
    Committed,
    Ended,
    Erased,
    Ledger,
    Left,
    Pausing,
    Restarting,
    Resumed,
    SimEvent,
    Started,
    StillRuns,
)

# An agent that sees a guest come back holds it at once; a call to libvirt may take 8 s.
HELD_WITHIN_S = 10.0


def single_runner(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I1: At any instant a VM's guest runs at most once, on at most one node."""
    if isinstance(event, Resumed) and event.by_libvirt:
        return  # libvirt 9.0 does that when a relay breaks; the product has to end it
    if isinstance(event, Started | Resumed):
        for (node, vm_id), generation in before.running.items():
            if vm_id == event.vm_id:
                yield f"{vm_id} starts on {event.node}, and {generation} of it runs on {node}"


def generation_used_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I2: A generation is started at most once, anywhere, whatever crashed in between."""
    if isinstance(event, Started):
        where = before.started.get((event.vm_id, event.generation))
        if where is not None:
            yield f"generation {event.generation} of {event.vm_id} was started on {where} before"


def start_was_permitted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I2: Nothing starts without a committed permit for that generation, node and boot."""
    if not isinstance(event, Started):
        return
    permit = before.permits.get((event.vm_id, event.generation))
    if permit is None:
        yield f"generation {event.generation} of {event.vm_id} was never given out"
        return
    node_id, boot_id = permit
    if before.names.get(node_id) != event.node:
        yield f"{event.vm_id} starts on {event.node}, its permit is for {node_id}"
    if boot_id != event.boot_id:
        yield f"{event.vm_id} starts in boot {event.boot_id}, its permit is for {boot_id}"


def returned_guest_is_held(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I1: A guest that libvirt let go on beside another is held soon, by an agent that can."""
    if not isinstance(event, StillRuns) or event.attended_s < HELD_WITHIN_S:
        return
    for node, vm_id in before.running:
        if vm_id == event.vm_id and node != event.node:
            yield f"{vm_id} runs on {node}, and for {event.attended_s} s again on {event.node}"


def end_was_wanted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I15: An agent ends a guest only after a record said that this attempt shall not run."""
    if not isinstance(event, Ended) or not event.by_agent:
        return
    attempt = (event.vm_id, event.generation)
    if attempt not in before.stoppable and not before.has_earlier(event.node, ("end", *attempt)):
        yield f"nobody wanted generation {event.generation} of {event.vm_id} to end"


def erased_was_deleted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I17: A VM's domain and volumes go only once its deletion was committed."""
    if not isinstance(event, Erased):
        return
    # One that has joined anew after a restore may have another id than its orders of before name.
    here = [node_id for node_id, name in before.names.items() if name == event.node]
    parts = [(event.vm_id, node_id) for node_id in ("", *here)]
    earlier = before.has_earlier(event.node, *(("remove", *part) for part in parts))
    if before.removable.keys().isdisjoint(parts) and not earlier:
        yield f"a part of {event.vm_id} was removed from {event.node} without a deletion"


def generations_only_rise(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I2: A VM's generations are given out in order; a record never goes back to an earlier one."""
    if not isinstance(event, Committed):
        return
    for _, vm_id, record in event.records:
        vm = before.vms.get(vm_id)
        if not isinstance(record, Vm) or vm is None:
            continue
        known, written = vm.status.generation, record.status.generation
        if written < known:
            yield f"{vm_id} goes back from generation {known} to {written}"


def deleted_is_gone(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I17: A VM whose record is gone never runs again, and its id is never used again."""
    if isinstance(event, Started | Resumed) and event.vm_id in before.deleted:
        yield f"{event.vm_id} runs on {event.node}, and was deleted"
    if isinstance(event, Committed):
        for kind, vm_id, record in event.records:
            if kind is Vm and record is not None and vm_id in before.deleted:
                yield f"{vm_id} is there again, and was deleted"


def last_copy_is_kept(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I22: What a VM has written is not removed from the only node where it is whole."""
    if not isinstance(event, Erased) or not event.volume:
        return
    vm = before.vms.get(event.vm_id)
    if vm is None or vm.deleting or before.has_earlier(event.node, ("remove", vm.id, "")):
        return
    if event.shared:
        yield f"{event.volume} was removed from a pool that all nodes share"
    elif list(before.seats.get(event.vm_id, {})) == [event.node]:
        yield f"{event.volume} was removed from {event.node}, and is nowhere else"


def pause_was_wanted(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I15: A guest stands still only when a user has paused it, or while it is on the move."""
    if not isinstance(event, Left | Pausing):
        return
    attempt = (event.vm_id, event.generation)
    allowed = before.movable if isinstance(event, Left) else before.pausable
    if attempt not in allowed and not before.has_earlier(event.node, ("pause", *attempt)):
        yield f"nobody wanted generation {event.generation} of {event.vm_id} to stand still"


def restarted_once(before: Ledger, event: SimEvent) -> Iterator[str]:
    """I6: A guest is rebooted or reset once for each time that a user has asked for it."""
    if isinstance(event, Restarting):
        attempt = (event.vm_id, event.generation)
        asked = len(before.restarts_asked.get(attempt, {}))
        if before.restarts_made.get(attempt, 0) >= asked:
            yield f"{event.vm_id} is restarted more often than the {asked} times it was asked for"
