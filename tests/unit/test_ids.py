"""Ids: their form, their order, and that names cannot be taken for them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from shared.ids import (
    CELL_LENGTH,
    IdSource,
    base32hex,
    domain_uuid,
    looks_like_id,
    mac_address,
    new_cell,
)
from tests.unit.core_world import HandClock


def source(seed: int = 1) -> tuple[IdSource, HandClock]:
    clock = HandClock()
    return IdSource("abc123", clock, random.Random(seed)), clock


def test_ids_sort_by_age_and_name_their_cell() -> None:
    ids, clock = source()
    made = []
    for days in (0, 1, 400, 100_000):
        clock.at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=days)
        made.append(ids.new("vm"))

    assert made == sorted(made)
    assert all(each.startswith("vm-abc123") and looks_like_id(each) for each in made)
    assert {len(each) for each in made} == {len("vm-") + 26}


def test_ids_of_one_moment_differ() -> None:
    ids, clock = source()
    made = set()
    for _ in range(2000):
        clock.at = datetime(2026, 1, 1, tzinfo=UTC)
        made.add(ids.new("event"))

    assert len(made) == 2000


@pytest.mark.parametrize(
    "name", ["web-1", "vm-1", "vm-abc123", "a" * 30, "vm-" + "w" * 26, "VM-" + "a" * 26]
)
def test_names_do_not_look_like_ids(name: str) -> None:
    assert not looks_like_id(name)


def test_ids_of_every_kind_look_like_ids() -> None:
    ids, _ = source()
    assert all(looks_like_id(ids.new(kind)) for kind in ("vm", "node", "api-key", "op"))
    assert not looks_like_id(ids.new("vm") + "\n")


def test_digits() -> None:
    assert base32hex(0, 3) == "000"
    assert base32hex(32**3 - 1, 3) == "vvv"
    assert base32hex(33, 2) == "11"
    cells = {new_cell(random.Random(seed)) for seed in range(50)}
    assert len(cells) == 50
    assert {len(cell) for cell in cells} == {CELL_LENGTH}


def test_what_is_derived_from_an_id_is_stable_and_its_own() -> None:
    assert domain_uuid("vm-1") == domain_uuid("vm-1") != domain_uuid("vm-2")
    macs = {mac_address(f"vm-{n}", nic) for n in range(1000) for nic in range(8)}
    assert len(macs) == 8000
    # Locally administered, and not a multicast address.
    assert all(int(mac[:2], 16) & 0b11 == 0b10 for mac in macs)
