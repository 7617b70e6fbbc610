"""Ids: ``<kind>-<cell><unique>``, lowercase base32hex, sortable by time of birth.

The cell (6 characters, drawn when the cluster is made) names where a thing was born. The unique
part (20 characters, 100 bits) is 48 bits of Unix milliseconds and 52 random bits, so that ids sort
by age and two replicas never need to talk to agree on one. Names must never look like ids.
"""

from __future__ import annotations

import random
import re
import uuid

from shared.clock import Clock

ALPHABET = "0123456789abcdefghijklmnopqrstuv"
CELL_LENGTH = 6
UNIQUE_LENGTH = 20
RANDOM_BITS = 52

_ID = re.compile(rf"^[a-z]+(?:-[a-z]+)*-[0-9a-v]{{{CELL_LENGTH + UNIQUE_LENGTH}}}\Z")
_DOMAIN_NAMESPACE = uuid.UUID("6f1e0c7e-5d0b-5b8e-9d0a-6e6f76616372")


def base32hex(value: int, length: int) -> str:
    """Return ``value`` as ``length`` base32hex digits, most significant first."""
    assert 0 <= value < 32**length, "the value fits the digits"
    digits = []
    for _ in range(length):
        value, digit = divmod(value, 32)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def looks_like_id(text: str) -> bool:
    return _ID.match(text) is not None


def new_cell(rng: random.Random) -> str:
    return base32hex(rng.getrandbits(5 * CELL_LENGTH), CELL_LENGTH)


def domain_uuid(vm_id: str) -> str:
    """Return the libvirt UUID of a VM born here: a hash (UUIDv5) of its id."""
    return str(uuid.uuid5(_DOMAIN_NAMESPACE, vm_id))


def mac_address(vm_id: str, nic_index: int) -> str:
    """Return a stable, locally administered MAC for one NIC of a VM: 40 bits of a hash.

    QEMU's own prefix leaves 24 bits, which clash within a few thousand NICs.
    """
    digest = uuid.uuid5(_DOMAIN_NAMESPACE, f"{vm_id}/{nic_index}").bytes
    return "52:" + ":".join(f"{byte:02x}" for byte in digest[:5])


class IdSource:
    """Makes ids for one cell; randomness and clock are handed in."""

    def __init__(self, cell: str, clock: Clock, rng: random.Random) -> None:
        assert len(cell) == CELL_LENGTH, "a cell is 6 characters"
        self._cell = cell
        self._clock = clock
        self._rng = rng

    def new(self, kind: str) -> str:
        milliseconds = int(self._clock.now().timestamp() * 1000) & (2**48 - 1)
        unique = (milliseconds << RANDOM_BITS) | self._rng.getrandbits(RANDOM_BITS)
        return f"{kind}-{self._cell}{base32hex(unique, UNIQUE_LENGTH)}"
