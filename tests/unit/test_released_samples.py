"""What a release has written stays readable: bytes of every record and message, by release."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import NODEFAULT, Struct
from msgspec.structs import fields

from controlplane.sessions import peer_messages
from shared import model, protocol
from shared.codec import pack, unpack
from tests.unit.samples import SAMPLES

RELEASES = Path(__file__).parent.parent / "data" / "samples"
# Parts of other Structs, or never sent or stored on their own.
INSIDE_OTHERS = frozenset(
    {"Record", "Term", "BootSpec", "DiskSpec", "NicSpec", "GroupRule", "PlacementSpec", "HaSpec"}
    | {"MigrationSpec", "VmSpec", "Condition", "GuestRequest", "Attempt", "Problem", "VmStatus"}
    | {"CpuFacts", "NumaCell", "PoolFacts", "VersionFacts", "Inventory", "OperationStep", "Sample"}
    | {"MigrationFacts", "DestinationLayout", "MigrationTarget", "MigrationOrder"}
    | {"MigrationReport", "AgentList", "Sighting"}
)
KINDS = {type(sample).__name__: type(sample) for sample in SAMPLES}


def released() -> list[Path]:
    return sorted(RELEASES.glob("*/*.msgpack"))


def test_there_is_a_sample_of_everything_that_is_stored_or_sent() -> None:
    defined = {
        name
        for module in (model, protocol, peer_messages)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, Struct) and kind.__module__ == module.__name__
    }

    assert defined - INSIDE_OTHERS == set(KINDS)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_sample_leaves_no_field_at_its_default(sample: Struct) -> None:
    at_default = [
        field.name
        for field in fields(sample)
        if field.default is not NODEFAULT and getattr(sample, field.name) == field.default
    ]

    # It has one value only, so far.
    assert set(at_default) <= {"protocol"}


@pytest.mark.parametrize("path", released(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_release_wrote_is_read_as_it_was_meant(path: Path) -> None:
    sample = next(sample for sample in SAMPLES if type(sample).__name__ == path.stem)
    written = path.read_bytes()

    read = unpack(written, KINDS[path.stem])

    assert is_part_of(msgspec.msgpack.decode(written), plain(read))
    assert is_part_of(msgspec.msgpack.decode(written), plain(sample))


def plain(record: Struct) -> Any:
    return msgspec.msgpack.decode(pack(record))


def is_part_of(older: Any, newer: Any) -> bool:
    """Whether all that an older release wrote is there, as it was: fields may have been added."""
    if isinstance(older, dict):
        return isinstance(newer, dict) and all(
            name in newer and is_part_of(value, newer[name]) for name, value in older.items()
        )
    if isinstance(older, list):
        return (
            isinstance(newer, list)
            and len(older) == len(newer)
            and all(map(is_part_of, older, newer))
        )
    return bool(older == newer)


def test_a_lost_or_changed_field_is_seen() -> None:
    assert is_part_of({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2, "c": 3}], "d": 4})
    assert not is_part_of({"a": 1}, {})
    assert not is_part_of({"a": [{"b": 2}]}, {"a": [{"b": 3}]})
    assert not is_part_of([1], [1, 2])
