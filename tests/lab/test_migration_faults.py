"""A fault at every moment of a live migration, one at a time, on real nodes.

One test for each pair of `tests/lab/migration_faults.py`. Whatever is done to whom: the migration
ends, the guest runs on one node and never on two, no guest that was not killed starts anew, and
nothing is left over. A lab in which a test failed is given up, so that the next begins with a good
one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from controlplane.cli.views import OperationView
from tests.lab.cluster import LabPlan
from tests.lab.migration_cell import (
    MOVER,
    PULSE_S,
    MigrationCell,
    Move,
    Spoilt,
    complaints,
    speaking_vm,
)
from tests.lab.migration_faults import (
    SAMPLE,
    Pair,
    all_pairs,
    may_split,
    possible_pairs,
    restarts,
    why_impossible,
)
from tests.lab.pulses import PERIOD_S, PulseAccount
from tests.lab.strikes import Striker

pytestmark = pytest.mark.lab

STAYERS = {"a": "stays-a", "b": "stays-b"}
GUESTS = (MOVER, *STAYERS.values())
# One guest of some twenty arrives with its memory spoilt by QEMU's emulation (see PULSE_S), which
# its kernel then says on its console, or never says anything again. Such a run shows nothing.
TRIES_MAX = 3


class Labs:
    """Hands out the present lab, or a new one in place of one that went wrong."""

    def __init__(self, scratch: pytest.TempPathFactory) -> None:
        self._scratch = scratch
        self._cell: MigrationCell | None = None

    @contextlib.contextmanager
    def healthy(self, name: str) -> Iterator[MigrationCell]:
        cell = self._cell = self._cell or self._new()
        try:
            yield cell
        except BaseException:
            print(f"the logs are in {cell.keep_logs(name)}")
            self.close()
            raise

    def close(self) -> None:
        cell, self._cell = self._cell, None
        if cell is not None:
            cell.__exit__(None, None, None)

    def _new(self) -> MigrationCell:
        cell = MigrationCell(self._scratch.mktemp("cell"), LabPlan(nodes=2))
        cell.__enter__()
        stayers = [speaking_vm(name, zone=zone) for zone, name in STAYERS.items()]
        cell.create(*stayers, speaking_vm(MOVER, pool="default"))
        return cell


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labs]:
    labs = Labs(tmp_path_factory)
    try:
        yield labs
    finally:
        labs.close()


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=pair.id, marks=() if pair.id in SAMPLE else pytest.mark.long)
        for pair in possible_pairs()
    ],
)
def test_a_fault_while_a_guest_moves(labs: Labs, pair: Pair) -> None:
    with labs.healthy(pair.id) as cell:
        assert any(_tried(cell, pair) for _ in range(TRIES_MAX)), "nothing could be said of any try"


def _tried(cell: MigrationCell, pair: Pair) -> bool:
    """Do it once, and judge it; False when nothing can be said: the victim had ended before it was
    struck, or QEMU spoilt the guest.
    """
    with cell.witness() as witness:
        ids = {name: cell.trial.api.vm(name).id for name in GUESTS}
        boots = {name: len(witness.account(ids[name]).boots()) for name in GUESTS}
        strike = Striker(cell.lab, pair)
        try:
            move = cell.move(MOVER, {pair.moment: strike})
            strike.close()
        except BaseException:
            strike.abandon()
            raise
        try:
            cell.rest(*GUESTS)
        except Spoilt as spoilt:
            print(f"\n{pair.id}: QEMU spoilt the guest ({spoilt}): once more")
            return False
        seen = {name: witness.account(ids[name]) for name in GUESTS}
    if strike.missed:
        print(f"\n{pair.id}: it had ended already: once more")
        return False
    said = seen[MOVER].last_words(move.began)
    if said:
        print(f"\n{pair.id}: QEMU spoilt the guest ({said[0]}): once more")
        return False
    boots[MOVER] += restarts(pair)
    wrong = [
        f"{name}: {line}"
        for name in GUESTS
        for line in complaints(
            seen[name],
            boots[name],
            move.began,
            may_split=name == MOVER and may_split(pair),
        )
    ]
    assert wrong == []
    ended = cell.ended(move)
    where = cell.trial.api.vm(MOVER).status.where
    if restarts(pair) == 0:
        expected = move.destination if ended.state == "succeeded" else move.source
        assert where == expected.name
    _tell(pair, ended, where, seen[MOVER], move, strike)
    return True


def test_every_pair_runs_or_has_a_reason() -> None:
    pairs = all_pairs()
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert {pair.id for pair in possible_pairs()} >= SAMPLE
    assert all(why_impossible(pair) for pair in set(pairs) - set(possible_pairs()))


def _tell(
    pair: Pair,
    ended: OperationView,
    where: str,
    seen: PulseAccount,
    move: Move,
    strike: Striker,
) -> None:
    """Print what the test's reader wants to know, and no test asserts."""
    both_ms = seen.both_ran_s() * 1000
    print(
        f"\n{pair.id}: struck in {strike.took_s * 1000:.1f} ms; {ended.state} after "
        f"{time.monotonic() - move.began:.1f} s with the guest on {where} "
        f"({move.source.name} to {move.destination.name}); silent for "
        f"{seen.longest_silence_s(move.began):.2f} s; both ran {both_ms:.0f} ms (resolution "
        f"{PERIOD_S * 1000:.0f} ms by CPU time, {PULSE_S * 1000:.0f} ms by pulses), "
        f"{len(seen.said_twice(move.began))} numbers twice"
    )
