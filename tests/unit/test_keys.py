"""Where records lie: keys and back, and keys that are not ours."""

from __future__ import annotations

import pytest

from controlplane.store import keys
from shared.admission import Admission, JoinToken
from shared.errors import RecordUnreadable
from shared.model import ApiKey, Cluster, IdempotencyRecord, Node, Operation, Record, Vm


@pytest.mark.parametrize(
    "kind", [Vm, Node, Operation, ApiKey, IdempotencyRecord, JoinToken, Admission]
)
def test_a_key_names_its_record(kind: type[Record]) -> None:
    key = keys.key_of(kind, "some-id")

    assert keys.holds_record(key)
    assert keys.record_of(key) == (kind, "some-id")


def test_the_cluster_has_one_key() -> None:
    assert keys.key_of(Cluster, "cluster-1") == keys.key_of(Cluster, "cluster-2") == keys.CLUSTER
    assert keys.record_kind(keys.CLUSTER) is Cluster


def test_history_sorts_as_its_numbers_do() -> None:
    seqs = [1, 9, 10, 99, 10**12]
    made = [keys.history_key(seq) for seq in seqs]

    assert made == sorted(made)
    assert [keys.history_seq(key) for key in made] == seqs


def test_idempotency_keys_lie_where_the_release_before_looks_past_them() -> None:
    known_to_0_1 = (keys.STATE, keys.HISTORY, keys.REPLICAS, keys.LEADER, keys.MARK)

    assert not keys.IDEMPOTENCY.startswith(known_to_0_1)
    assert not keys.ADMISSION.startswith((*known_to_0_1, keys.IDEMPOTENCY))


def test_every_record_lies_below_one_place_that_is_listed_at_a_takeover() -> None:
    below = [kind for prefix in keys.COMMITTED for kind in keys.kinds_below(prefix)]

    assert sorted(below, key=repr) == sorted(
        [Vm, Node, Operation, ApiKey, IdempotencyRecord, JoinToken, Admission, Cluster], key=repr
    )


@pytest.mark.parametrize("key", [f"{keys.STATE}quotas/q", f"{keys.STATE}x", keys.LEADER])
def test_foreign_records_are_named(key: str) -> None:
    with pytest.raises(RecordUnreadable):
        keys.record_of(key)


@pytest.mark.parametrize("name", ["", "summary", "-1", "1/2", "٣"])
def test_foreign_history_is_named(name: str) -> None:
    with pytest.raises(RecordUnreadable):
        keys.history_seq(keys.HISTORY + name)
