"""The judge has nothing against a cell that keeps its promises, whatever its clients do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.histories.judge import counts_of, judge, too_little
from tests.histories.linear import LOOKS_MAX, find_order
from tests.histories.promises import ABSENT
from tests.histories.record import (
    Attempt,
    Fault,
    Freshness,
    Head,
    HistoryLog,
    Kind,
    Outcome,
    read_history,
)
from tests.histories.registers import coming_back, registers_of
from tests.histories.toy_cell import TICK_NS, ToyCell, Wish

KINDS = (
    *(Kind.CREATE,) * 4,
    *(Kind.CHANGE,) * 6,
    *(Kind.CONFIRM,) * 1,
    *(Kind.DELETE,) * 2,
    *(Kind.GET,) * 6,
    *(Kind.LIST,) * 1,
)
# How many operations are under way at a time, at most.
REACH = 6


def worked_on(
    seed: int, operations: int, clients: int = 8, names: int = 4, unknown: float = 0.1
) -> ToyCell:
    """Return a cell that clients have worked on, each doing one thing at a time."""
    rng = random.Random(seed)
    cell = ToyCell(*(f"n{number}" for number in range(names)))
    # Until when each client waits for its answer.
    busy = dict.fromkeys(range(clients), 0)
    keyed: list[Attempt] = []
    for number in range(operations):
        moment = (number + 1) * TICK_NS
        idle = [client for client, until in busy.items() if until < moment - 1]
        client = rng.choice(idle) if idle else 0
        early = rng.randrange(1, min(REACH * TICK_NS, moment - busy[client])) if idle else 1
        late = rng.randrange(1, REACH * TICK_NS) if idle else 1
        mine = [each for each in keyed if each.client == client]
        if mine and rng.random() < 0.1:
            done = cell.again(client, rng.choice(mine), early, late)
        else:
            done = cell.do(_wish(rng, cell, client, f"v{number}", early, late, unknown))
            keyed += [done] if done.key else []
        busy[client] = done.returned_ns
    return cell


def _wish(
    rng: random.Random,
    cell: ToyCell,
    client: int,
    value: str,
    early: int,
    late: int,
    unknown: float,
) -> Wish:
    kind = rng.choice(KINDS)
    name = rng.choice(cell.history().head.names) if kind is not Kind.LIST else ""
    seen = [e.seen.etag for e in cell.attempts if e.seen and e.name == name]
    conditional = kind is Kind.CONFIRM or (
        kind in (Kind.CHANGE, Kind.DELETE) and rng.random() < 0.6
    )
    if conditional and not seen:
        kind, conditional = Kind.GET, False
    keyed = kind in (Kind.CREATE, Kind.CHANGE, Kind.DELETE) and rng.random() < 0.3
    lost = rng.random() < unknown
    return Wish(
        client=client,
        kind=kind,
        name=name,
        value=value if kind in (Kind.CREATE, Kind.CHANGE) else "",
        if_match=rng.choice(seen[-3:]) if conditional else "",
        key=f"key of {value}" if keyed else "",
        freshness=rng.choice(list(Freshness)),
        early=early,
        late=late,
        lost=lost,
        in_vain=lost and rng.random() < 0.5,
        behind=rng.randrange(4),
    )


@given(
    st.integers(min_value=0, max_value=2**32),
    st.integers(min_value=1, max_value=120),
    st.integers(min_value=1, max_value=8),
    st.integers(min_value=1, max_value=5),
)
@settings(max_examples=150, deadline=None)
def test_a_cell_that_keeps_its_promises_is_found_to(
    seed: int, operations: int, clients: int, names: int
) -> None:
    found = judge(worked_on(seed, operations, clients, names).history())
    assert found == [], "\n".join(str(each) for each in found)


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_history_takes_few_looks(seed: int) -> None:
    cell = worked_on(seed, 3000, clients=16, names=24, unknown=0.15)
    for register in registers_of(cell.history()):
        back = coming_back(register.steps)
        assert find_order(register.steps, ABSENT, back, looks_max=LOOKS_MAX // 100) is None
    assert judge(cell.history()) == []


def test_what_shows_too_little_is_not_counted() -> None:
    history = worked_on(1, 100, clients=4).history()
    assert {each.partition(":")[0] for each in too_little(counts_of(history))} == {
        "clients",
        "operations",
        "faults",
    }
    fault = Fault(blow="kill", program="r1", pid=1, began_ns=0, ended_ns=1)
    whole = worked_on(1, 2600, clients=16, names=24, unknown=0.15).history()
    other = replace(fault, began_ns=5)
    assert too_little(counts_of(replace(whole, faults=(fault, other)))) == []


def test_operations_that_were_refused_for_now_do_not_count() -> None:
    cell = worked_on(1, 50, unknown=0.0)
    history = cell.history()
    refused = tuple(replace(each, outcome=Outcome.NOT_DONE) for each in history.attempts)
    assert counts_of(history).operations == 50
    assert counts_of(replace(history, attempts=refused)).operations == 0


def test_a_log_holds_what_was_added_and_leaves_out_half_a_line(tmp_path: Path) -> None:
    history = worked_on(1, 50).history()
    fault = Fault(blow="kill", program="r1", pid=1, began_ns=0, ended_ns=1)
    path = tmp_path / "log"
    log = HistoryLog(path, history.head)
    for attempt in history.attempts:
        log.add(attempt)
    log.add(fault)
    log.close()
    assert read_history(path) == replace(history, faults=(fault,))

    path.write_bytes(path.read_bytes()[:-10])
    assert read_history(path) == history


def test_a_log_is_never_written_over(tmp_path: Path) -> None:
    head = Head(seed=1, clients=1, names=("a",), replicas=("r1",))
    HistoryLog(tmp_path / "log", head).close()
    with pytest.raises(FileExistsError):
        HistoryLog(tmp_path / "log", head)


def test_another_format_is_refused(tmp_path: Path) -> None:
    head = Head(format=0, seed=1, clients=1, names=("a",), replicas=("r1",))
    HistoryLog(tmp_path / "log", head).close()
    with pytest.raises(ValueError, match="not a history of format"):
        read_history(tmp_path / "log")
