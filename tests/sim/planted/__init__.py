"""Planted bugs: each breaks the product in one place, and names the invariant meant to find it.

A bug is a context manager that patches the product while it is entered. They test the simulation:
a search over seeds that does not find one is a search that finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from msgspec import Struct

from tests.sim.invariants import Check, everything_settles, guests, moves, records
from tests.sim.planted import agents, control_plane, migrations


class PlantedBug(Struct, frozen=True):
    """``found_by`` is the invariant that must find it, alone; the search begins at ``first``."""

    plant: Callable[[], AbstractContextManager[Any]]
    found_by: Check
    first: int = 0


PLANTED: tuple[PlantedBug, ...] = (
    PlantedBug(agents.fence_forgets_generations, guests.generation_used_once, first=36),
    PlantedBug(agents.stop_removes, guests.erased_was_deleted),
    PlantedBug(agents.strays_are_stopped, guests.end_was_wanted),
    PlantedBug(agents.answers_are_forgotten, guests.restarted_once),
    PlantedBug(control_plane.reports_of_any_attempt_count, everything_settles),
    PlantedBug(agents.cut_off_agents_pause_guests, guests.pause_was_wanted),
    PlantedBug(agents.gone_vms_are_remembered, records.nothing_grows_without_bound),
    PlantedBug(
        control_plane.failures_reported_as_success, records.nothing_acknowledged_is_lost, first=16
    ),
    PlantedBug(
        control_plane.acknowledged_before_it_is_stored, records.nothing_acknowledged_is_lost
    ),
    PlantedBug(control_plane.commits_without_the_term, records.written_by_the_leader, first=12),
    PlantedBug(control_plane.commits_without_the_mark, records.history_is_dense, first=3),
    PlantedBug(control_plane.silence_is_death, guests.single_runner, first=59),
    PlantedBug(control_plane.starts_without_room, records.within_capacity, first=25),
    PlantedBug(control_plane.refused_change_uses_a_number, records.history_is_dense),
    PlantedBug(control_plane.leftovers_are_no_rivals, moves.start_has_no_rival, first=64),
    PlantedBug(control_plane.ids_are_used_again, records.operation_ends_once),
    PlantedBug(control_plane.ids_are_used_again, guests.deleted_is_gone),
    PlantedBug(control_plane.keys_are_not_kept, records.key_is_used_once, first=13),
    PlantedBug(control_plane.a_stop_is_not_audited, records.changes_are_audited, first=3),
    PlantedBug(control_plane.lost_watches_are_forgotten, records.views_are_monotone, first=1),
    PlantedBug(
        control_plane.old_memory_says_what_is_there, records.what_is_there_is_found, first=14
    ),
    PlantedBug(control_plane.takeover_without_a_listing, everything_settles, first=80),
    PlantedBug(migrations.switched_source_is_resumed, guests.single_runner),
    PlantedBug(migrations.return_codes_decide, moves.owner_has_the_guest, first=19),
    PlantedBug(
        migrations.running_destination_is_cleaned, moves.arrived_guest_is_not_cleaned, first=131
    ),
    PlantedBug(migrations.departures_are_forgotten, moves.moves_are_begun_once, first=2),
    PlantedBug(migrations.unreachable_is_empty, moves.claim_outlives_the_guest, first=7),
    PlantedBug(migrations.nobody_holds_returned_guests, guests.returned_guest_is_held, first=4),
    PlantedBug(migrations.failed_source_is_swept, guests.last_copy_is_kept, first=2),
)
