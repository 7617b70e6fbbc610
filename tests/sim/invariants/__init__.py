"""What must hold at every step, one function each; and what must hold once everything is healed.

An invariant is a function ``(before, event) -> iterator of complaints`` over the ledger as it was
before the event. It knows nothing of how the product works. The same functions are meant for other
recorded histories than the simulation's. Which promises they stand for:

I1 one runner             single_runner, returned_guest_is_held
I2 authority to start     start_was_permitted, generation_used_once, generations_only_rise
I3 nothing is lost        nothing_acknowledged_is_lost; at rest: acknowledged_is_kept
I4 linearizability        what_is_there_is_found; of recorded histories: tests/histories
I5 one end                operation_ends_once; at rest: everything_settles
I6 effects at most once   moves_are_begun_once, restarted_once, generation_used_once
I7 idempotency            key_is_used_once
I8 clean unwind           at rest: nothing_is_left_over
I9 capacity               within_capacity
I10 quota                 there are no quotas yet
I11 audit                 changes_are_audited, history_is_dense
I12 tenants apart         there is one tenant yet
I13 fenced writers        written_by_the_leader
I14 a node's rights       of certificates, which streams here do without: tests/unit/test_hub.py
I15 guests go on          end_was_wanted, pause_was_wanted
I16 no silent drop        at rest: replicas_agree
I17 deleted is gone       erased_was_deleted, deleted_is_gone
I18 secrets               no record holds one yet
I19 monotone views        views_are_monotone
I20 bounds                nothing_grows_without_bound
I21 brake                 nothing fails over yet: start_has_no_rival, and single_runner
I22 migration             owner_has_the_guest, claim_outlives_the_guest,
                          arrived_guest_is_not_cleaned, last_copy_is_kept
I23 version skew          all of them, in the seeds that begin with the release before
I24 liveness              no_process_dies_by_itself; at rest: everything_settles; the loop itself
                          finds one that is busy without end
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tests.sim.invariants import guests, moves, records
from tests.sim.invariants.settled import Found, everything_settles, replicas_agree
from tests.sim.ledger import Committed, Ledger, SimEvent

__all__ = ["INVARIANTS", "Found", "Judge", "Violation", "everything_settles", "replicas_agree"]

Invariant = Callable[[Ledger, SimEvent], Iterator[str]]
# One of these, or one of those that are looked at when all has come to rest.
Check = Callable[..., Iterator[str]]


class Violation(AssertionError):
    """An invariant does not hold; ``name`` is its function's."""

    def __init__(self, name: str, complaint: str) -> None:
        super().__init__(f"{name}: {complaint}")
        self.name = name


class Judge:
    """Judges each event as it comes, and remembers what it has seen."""

    def __init__(self, invariants: Iterable[Invariant] | None = None) -> None:
        self.ledger = Ledger()
        self._invariants = tuple(INVARIANTS if invariants is None else invariants)

    def take(self, event: SimEvent) -> None:
        """Raise Violation when the event may not happen after what happened before.

        What a restore writes is judged once it is whole.
        """
        restores = self.ledger.restoring and isinstance(event, Committed)
        for invariant in () if restores else self._invariants:
            for complaint in invariant(self.ledger, event):
                raise Violation(invariant.__name__, complaint)
        self.ledger.take(event)


INVARIANTS: tuple[Invariant, ...] = (
    guests.single_runner,
    guests.generation_used_once,
    guests.start_was_permitted,
    guests.generations_only_rise,
    guests.returned_guest_is_held,
    guests.end_was_wanted,
    guests.pause_was_wanted,
    guests.restarted_once,
    guests.erased_was_deleted,
    guests.deleted_is_gone,
    guests.last_copy_is_kept,
    moves.start_has_no_rival,
    moves.moves_are_begun_once,
    moves.owner_has_the_guest,
    moves.claim_outlives_the_guest,
    moves.arrived_guest_is_not_cleaned,
    records.within_capacity,
    records.written_by_the_leader,
    records.history_is_dense,
    records.changes_are_audited,
    records.operation_ends_once,
    records.key_is_used_once,
    records.nothing_acknowledged_is_lost,
    records.views_are_monotone,
    records.what_is_there_is_found,
    records.nothing_grows_without_bound,
    records.no_process_dies_by_itself,
)
