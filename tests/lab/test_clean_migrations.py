"""A hundred live migrations in a row, with nothing done to anybody, and what they took."""

from __future__ import annotations

import itertools
import statistics
from functools import partial
from pathlib import Path

import pytest

from controlplane.cli.client import path_of
from controlplane.cli.views import MigrationFiguresView, MigrationView
from tests.lab.cluster import LabPlan
from tests.lab.migration_cell import MigrationCell, Spoilt, complaints, speaking_vm

pytestmark = [pytest.mark.lab, pytest.mark.long]

MOVES = 100
# One of each kind, in turn: nothing, a disk that is copied, a disk that both nodes see.
POOLS_OF = {"bare": "", "copied": "default", "shared": "shared"}
# Guests that do next to nothing (see `migration_cell.PULSE_S`).
IDLE_PULSE_S = 0.5
SPOILT_MAX = 10


def test_a_hundred_migrations_in_a_row(tmp_path: Path) -> None:
    figures: dict[str, list[MigrationFiguresView]] = {name: [] for name in POOLS_OF}
    spoilt: list[str] = []
    with MigrationCell(tmp_path, LabPlan(nodes=2)) as cell:
        idle = partial(speaking_vm, pulse_s=IDLE_PULSE_S)
        cell.create(*(idle(name, pool=pool) for name, pool in POOLS_OF.items()))
        for name in itertools.cycle(POOLS_OF):
            if sum(map(len, figures.values())) == MOVES:
                break
            assert len(spoilt) < SPOILT_MAX, spoilt
            try:
                said = _moved(cell, name, figures[name])
            except Spoilt as silent:
                said = [str(silent)]
            spoilt += said[:1]
        cell.rest(*POOLS_OF)
    for name, all_of_it in figures.items():
        print(f"\n{name}: {_spread('total', [f.total_ms for f in all_of_it])}", end="")
        print(f"; {_spread('downtime', [f.downtime_ms for f in all_of_it])}", end="")
    print(f"\n{MOVES} migrations; besides, QEMU spoilt {len(spoilt)}: {spoilt}")


def _moved(cell: MigrationCell, name: str, figures: list[MigrationFiguresView]) -> list[str]:
    """Move a guest and note what that took; returns the guest's last words if it has spoken any.

    Raises Spoilt.
    """
    with cell.witness() as witness:
        vm = cell.trial.api.vm(name)
        boots = len(witness.account(vm.id).boots())
        move = cell.move(name)
        ended = cell.ended(move)
        assert ended.state == "succeeded", ended
        cell.rest(name)
        assert cell.trial.api.vm(name).status.where == move.destination.name
        seen = witness.account(vm.id)
    if said := seen.last_words(move.began):
        return said
    assert complaints(seen, boots, move.began) == []
    path = path_of("migrations", move.operation_id)
    view = cell.trial.api.client.get_as(MigrationView, path)
    assert view.figures is not None, view
    figures.append(view.figures)
    return []


def _spread(what: str, values: list[int]) -> str:
    return f"{what} {min(values)} / {statistics.median(values):.0f} / {max(values)} ms"
