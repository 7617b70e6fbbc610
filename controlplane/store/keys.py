"""Which record is under which key. Nothing else in the tree spells a key."""

from __future__ import annotations

from shared.admission import Admission, JoinToken
from shared.errors import RecordUnreadable
from shared.model import ApiKey, Cluster, IdempotencyRecord, Node, Operation, Record, Vm

ROOT = "/novacron/"
STATE = f"{ROOT}state/"
HISTORY = f"{ROOT}history/"
REPLICAS = f"{ROOT}replicas/"
LEADER = f"{ROOT}leader"
MARK = f"{ROOT}applied"
CLUSTER = f"{STATE}cluster"
# Not below STATE, where 0.1 complains of what it does not know; elsewhere it looks past it.
IDEMPOTENCY = f"{ROOT}idempotency/"
# Nor where 0.2 complains.
ADMISSION = f"{ROOT}admission/"

# Where only a leader's commits write, besides the mark.
COMMITTED = (STATE, IDEMPOTENCY, ADMISSION, HISTORY)

_FOLDERS: dict[type[Record], str] = {
    Vm: f"{STATE}vms/",
    Node: f"{STATE}nodes/",
    Operation: f"{STATE}operations/",
    ApiKey: f"{STATE}api-keys/",
    IdempotencyRecord: IDEMPOTENCY,
    JoinToken: f"{ADMISSION}tokens/",
    Admission: f"{ADMISSION}nodes/",
}
SEQ_DIGITS = 20


def record_key(record: Record) -> str:
    return key_of(type(record), record.id)


def key_of(kind: type[Record], record_id: str) -> str:
    return CLUSTER if kind is Cluster else _FOLDERS[kind] + record_id


def holds_record(key: str) -> bool:
    """Tell whether a key lies where records do, of this release or of another."""
    return key.startswith((STATE, IDEMPOTENCY, ADMISSION))


def is_committed(key: str) -> bool:
    """Tell whether a key is one that only a leader's commits write."""
    return key == MARK or key.startswith(COMMITTED)


def record_kind(key: str) -> type[Record]:
    """Return which Struct a record's key holds. Raises RecordUnreadable for a foreign key."""
    if key == CLUSTER:
        return Cluster
    for kind, folder in _FOLDERS.items():
        if key.startswith(folder):
            return kind
    raise RecordUnreadable(f"{key} is not a key of this release")


def kinds_below(prefix: str) -> list[type[Record]]:
    """Return whose records lie below one of ``COMMITTED``."""
    below = [kind for kind, folder in _FOLDERS.items() if folder.startswith(prefix)]
    return [*below, Cluster] if CLUSTER.startswith(prefix) else below


def record_of(key: str) -> tuple[type[Record], str]:
    """Return the kind and id of the record that a key names.

    The cluster's one record has a key without its id; it is never deleted.
    """
    return record_kind(key), key.rpartition("/")[2]


def history_key(seq: int) -> str:
    return f"{HISTORY}{seq:0{SEQ_DIGITS}d}"


def history_seq(key: str) -> int:
    """Return the ``seq`` of a key below HISTORY. Raises RecordUnreadable for a foreign key."""
    digits = key.removeprefix(HISTORY)
    if not (digits.isascii() and digits.isdigit()):
        raise RecordUnreadable(f"{key} is not a key of this release")
    return int(digits)


def replica_key(name: str) -> str:
    return REPLICAS + name
