"""The one place where Structs become bytes and bytes become Structs.

MessagePack inside (etcd, streams), JSON outside. Decoding never raises anything but
``RecordUnreadable``, so that a poisoned record can be set aside instead of stopping a loop.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from shared.errors import RecordUnreadable

T = TypeVar("T")

_packer = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_unpackers: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def pack(record: object) -> bytes:
    return _packer.encode(record)


def unpack(data: bytes, kind: type[T]) -> T:
    """Decode ``data`` as ``kind`` (a Struct, or a tagged union of them).

    Raises RecordUnreadable.
    """
    decoder = _unpackers.get(kind)
    if decoder is None:
        decoder = _unpackers.setdefault(kind, msgspec.msgpack.Decoder(kind))
    try:
        decoded: T = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise RecordUnreadable(f"{len(data)} bytes do not decode as {name}: {error}") from error
    return decoded


def to_json(record: object) -> bytes:
    return _json.encode(record)
