"""Bytes and Structs: what was written is read, a newer writer is understood, poison is named."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import pack, to_json, unpack
from shared.errors import RecordUnreadable
from shared.model import HistoryEntry, Node, ObservedPower, Operation, Power, Term, Vm
from shared.protocol import AgentMessage, LeaderMessage, VmReport
from tests.unit.core_world import CoreWorld, desired


def records() -> list[tuple[Any, Any]]:
    world = CoreWorld()
    vm_id = world.running()
    world.create("pending")
    report = VmReport(vm_id="v", generation=1, power=ObservedPower.RUNNING, permit_used=True)
    operation = next(iter(world.state.operations.values())).record
    return [
        (world.vm(vm_id), Vm),
        (world.node(), Node),
        (operation, Operation),
        (world.state.history[1], HistoryEntry),
        (report, AgentMessage),
        (desired(), LeaderMessage),
    ]


@pytest.mark.parametrize(("record", "kind"), records())
def test_what_was_packed_is_unpacked(record: Any, kind: Any) -> None:
    assert unpack(pack(record), kind) == record


@pytest.mark.parametrize(("record", "kind"), records())
def test_fields_of_a_newer_writer_are_passed_over(record: Any, kind: Any) -> None:
    table = msgspec.msgpack.decode(pack(record))
    table["field_of_tomorrow"] = {"any": [1, "thing"]}

    assert unpack(msgspec.msgpack.encode(table), kind) == record


def test_enum_values_of_a_newer_writer_are_unknown() -> None:
    table = msgspec.msgpack.decode(pack(desired()))
    table["intent"] = "hibernate"
    table["spec"]["power"] = "hibernated"
    message: Any = unpack(msgspec.msgpack.encode(table), LeaderMessage)  # type: ignore[arg-type]

    assert message.intent.value == "unknown"
    assert message.spec.power is Power.UNKNOWN


@pytest.mark.parametrize(("record", "kind"), records())
def test_poison_is_unreadable_and_nothing_else(record: Any, kind: Any) -> None:
    data = pack(record)
    rng = random.Random(1)
    for _ in range(2000):
        poisoned = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            poisoned[rng.randrange(len(poisoned))] = rng.randrange(256)
        try:
            unpack(bytes(poisoned[: rng.randint(0, len(poisoned))]), kind)
        except RecordUnreadable:
            continue


@given(st.binary(max_size=64))
def test_any_bytes_decode_or_are_unreadable(data: bytes) -> None:
    for kind in (Vm, Term):
        try:
            unpack(data, kind)
        except RecordUnreadable:
            continue


def test_deep_nesting_is_unreadable() -> None:
    with pytest.raises(RecordUnreadable):
        unpack(b"\x91" * 100_000, Vm)


def test_json_is_for_people() -> None:
    assert to_json(Term(1, 2)) == b"[1,2]"
    assert b'"power":"running"' in to_json(desired().spec)
