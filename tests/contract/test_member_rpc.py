"""The port ``MemberRpc``: the model answers as a real member does, down to refusals."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.store import keys
from controlplane.store.etcd_grpc import EtcdTls, GrpcMember
from controlplane.store.etcd_rpc import (
    TXN_OPS_MAX,
    Compare,
    DeleteOp,
    Event,
    MemberRpc,
    Op,
    PutOp,
    RangeOp,
    Target,
    Txn,
    WatchStart,
    prefix_end,
)
from controlplane.store.port import KeyValue
from shared.errors import (
    ChangeTooLarge,
    Compacted,
    NotFound,
    NovacronError,
    OutcomeUnknown,
    StoreError,
    StoreUnavailable,
)
from tests.contract.certificates import certificates
from tests.contract.etcd_process import EtcdCluster
from tests.contract.store_worlds import CALL_S, etcd_world, model_world

HERE = f"{keys.ROOT}rpc/"
HERE_END = prefix_end(HERE)
SEEDS = range(4)


@pytest.fixture(params=["model", pytest.param("etcd_one", marks=pytest.mark.etcd)])
async def rpc(request: pytest.FixtureRequest) -> AsyncIterator[MemberRpc]:
    if request.param == "model":
        async with model_world() as (model, _):
            yield model.rpcs[0]
        return
    async with etcd_world(request.getfixturevalue(request.param)) as real:
        yield real.rpcs[0]


@pytest.mark.parametrize(
    "success",
    [
        (PutOp(f"{HERE}a", b""), PutOp(f"{HERE}a", b"")),
        (PutOp(f"{HERE}a", b""), DeleteOp(f"{HERE}a")),
        (DeleteOp(HERE, HERE_END), PutOp(f"{HERE}a", b"")),
    ],
)
async def test_a_key_is_written_once_in_a_transaction(
    rpc: MemberRpc, success: tuple[Op, ...]
) -> None:
    with pytest.raises(StoreError, match="duplicate key"):
        await rpc.txn(Txn((), success), CALL_S)
    assert not (await rpc.range(RangeOp(HERE, HERE_END), CALL_S)).items


async def test_operations_are_limited(rpc: MemberRpc) -> None:
    puts = tuple(PutOp(f"{HERE}{number}", b"") for number in range(TXN_OPS_MAX + 1))
    compares = tuple(Compare(put.key, Target.VERSION, 0) for put in puts)

    await rpc.txn(Txn(compares[:-1], puts[:-1], puts[:-1]), CALL_S)
    for txn in (Txn((), puts), Txn((), (), puts), Txn(compares, ())):
        with pytest.raises(ChangeTooLarge):
            await rpc.txn(txn, CALL_S)


@pytest.mark.parametrize("size_bytes", [3 * 2**19, 3 * 2**20])
async def test_bytes_are_limited(rpc: MemberRpc, size_bytes: int) -> None:
    with pytest.raises(ChangeTooLarge):
        await rpc.txn(Txn((), (PutOp(f"{HERE}a", bytes(size_bytes)),)), CALL_S)
    await rpc.txn(Txn((), (PutOp(f"{HERE}a", bytes(2**20)),)), CALL_S)


async def test_an_unknown_lease_refuses_the_branch_taken(rpc: MemberRpc) -> None:
    put = PutOp(f"{HERE}a", b"", lease=4711)

    with pytest.raises(NotFound):
        await rpc.txn(Txn((), (PutOp(f"{HERE}b", b""), put)), CALL_S)
    await rpc.txn(Txn((), (PutOp(f"{HERE}c", b""),), (put,)), CALL_S)
    with pytest.raises(NotFound):
        await rpc.lease_revoke(4711, CALL_S)
    assert (await rpc.lease_keep_alive(4711, CALL_S)).ttl_s <= 0

    found = (await rpc.range(RangeOp(HERE, HERE_END), CALL_S)).items
    assert [item.key for item in found] == [f"{HERE}c"]


async def test_a_short_lease_is_lengthened(rpc: MemberRpc) -> None:
    lease = await rpc.lease_grant(1, CALL_S)
    assert lease.ttl_s == 2
    assert (await rpc.lease_keep_alive(lease.id, CALL_S)).ttl_s == 2


async def test_revisions_that_cannot_be_read_are_refused(rpc: MemberRpc) -> None:
    for value in (b"1", b"2", b"3"):
        done = await rpc.txn(Txn((), (PutOp(f"{HERE}a", value),)), CALL_S)
    newest = done.header.revision

    old = await rpc.range(RangeOp(f"{HERE}a", revision=newest - 1), CALL_S)
    assert [item.value for item in old.items] == [b"2"]
    await rpc.compact(newest - 1, CALL_S)
    assert await rpc.range(RangeOp(f"{HERE}a", revision=newest - 1), CALL_S) == old
    with pytest.raises(Compacted):
        await rpc.range(RangeOp(f"{HERE}a", revision=newest - 2), CALL_S)
    with pytest.raises(Compacted):
        await rpc.compact(newest - 1, CALL_S)
    for call in (
        rpc.compact(newest + 100, CALL_S),
        rpc.range(RangeOp(f"{HERE}a", revision=newest + 100), CALL_S),
    ):
        with pytest.raises(StoreError, match="future revision"):
            await call


@pytest.mark.etcd
@pytest.mark.parametrize("seed", SEEDS)
async def test_model_and_etcd_agree_on_any_transactions(seed: int, etcd_one: EtcdCluster) -> None:
    async with model_world() as (model, _), etcd_world(etcd_one) as real:
        transcripts = [await _transcript(world.rpcs[0], seed) for world in (model, real)]
    assert transcripts[0] == transcripts[1]
    assert any("committed" in line for line in transcripts[0])
    assert any("refused" in line for line in transcripts[0])


@pytest.mark.etcd
async def test_tls_with_clientcertificates(tmp_path: Path) -> None:
    ours, strangers = certificates(tmp_path / "ours"), certificates(tmp_path / "strangers")
    with EtcdCluster(tls_dir=tmp_path / "ours") as cluster:
        good = GrpcMember(cluster.endpoints[0], ours)
        plain = GrpcMember(cluster.endpoints[0], None)
        foreign = GrpcMember(
            cluster.endpoints[0], EtcdTls(ours.ca, strangers.certificate, strangers.key)
        )
        wary = GrpcMember(cluster.endpoints[0], strangers)
        try:
            assert (await good.status(CALL_S)).leader_id
            for refused in (plain, foreign, wary):
                with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                    await refused.status(2.0)
        finally:
            await asyncio.gather(*(each.close() for each in (good, plain, foreign, wary)))


async def test_a_member_that_is_not_there_did_nothing() -> None:
    member = GrpcMember("127.0.0.1:9", None)
    with pytest.raises(StoreUnavailable):
        await member.txn(Txn((), (PutOp(f"{HERE}a", b""),)), 2.0)
    with pytest.raises(StoreUnavailable):
        await member.lease_keep_alive(1, 2.0)
    with pytest.raises(StoreUnavailable):
        await member.watch(WatchStart(HERE, HERE_END, 1), 2.0)
    await member.close()


async def _transcript(rpc: MemberRpc, seed: int) -> list[str]:
    """Run random transactions and tell each answer, with revisions counted from the start."""
    rng = random.Random(seed)
    zero = (await rpc.range(RangeOp(HERE), CALL_S)).header.revision
    lease = (await rpc.lease_grant(600, CALL_S)).id
    lines = []
    for step in range(150):
        txn = _random_txn(rng, zero, lease)
        try:
            done = await rpc.txn(txn, CALL_S)
        except NovacronError as error:
            lines.append(f"{step}: refused {error.code}")
            continue
        reads = [[_relative(kv, zero) for kv in found] for found in done.reads]
        lines.append(
            f"{step}: committed {done.succeeded} at {done.header.revision - zero}: {reads}"
        )
    await rpc.lease_revoke(lease, CALL_S)
    newest = (await rpc.range(RangeOp(HERE), CALL_S)).header.revision
    for back in (0, 10, 50):
        pinned = RangeOp(HERE, HERE_END, limit=3, revision=newest - back)
        page = await rpc.range(pinned, CALL_S)
        lines.append(f"-{back}: {page.more} {[_relative(kv, zero) for kv in page.items]}")
    # The revocation deletes what the lease still held, in no documented order.
    history = await _history(rpc, zero + 1, newest)
    return lines + sorted(f"{e.deleted} {_relative(e.kv, zero)}" for e in history)


async def _history(rpc: MemberRpc, start: int, newest: int) -> list[Event]:
    stream = await rpc.watch(WatchStart(HERE, HERE_END, start), CALL_S)
    events: list[Event] = []
    async with asyncio.timeout(CALL_S):
        # The newest revision is the revocation of a lease that holds a key (see _random_txn).
        while not events or events[-1].kv.mod_revision < newest:
            events += (await stream.receive()).events
    await stream.close()
    assert [e.kv.mod_revision for e in events] == sorted(e.kv.mod_revision for e in events)
    return events


def _random_txn(rng: random.Random, zero: int, lease: int) -> Txn:
    compares = tuple(_random_compare(rng, zero) for _ in range(rng.randrange(2)))
    return Txn(compares, _random_branch(rng, lease), _random_branch(rng, lease))


def _random_compare(rng: random.Random, zero: int) -> Compare:
    target = rng.choice(list(Target))
    value = rng.choice((0, 1, 2)) if target is Target.VERSION else zero + rng.randrange(40)
    return Compare(_random_key(rng), target, 0 if rng.random() < 0.3 else value)


def _random_branch(rng: random.Random, lease: int) -> tuple[Op, ...]:
    ops: list[Op] = [PutOp(f"{HERE}leased", b"%d" % rng.randrange(100), lease)]
    for _ in range(rng.randrange(4)):
        key, draw = _random_key(rng), rng.random()
        if draw < 0.5:
            ops.append(PutOp(key, b"%d" % rng.randrange(100), rng.choice((0, 0, lease))))
        elif draw < 0.7:
            ops.append(DeleteOp(key))
        elif draw < 0.75:
            ops.append(DeleteOp(key, f"{HERE}d"))
        else:
            ops.append(RangeOp(HERE, HERE_END, limit=rng.choice((0, 2))))
    return tuple(ops)


def _random_key(rng: random.Random) -> str:
    return HERE + rng.choice("abcde")


def _relative(kv: KeyValue, zero: int) -> tuple[str, bytes, int, int, bool]:
    created = kv.create_revision and kv.create_revision - zero
    return kv.key, kv.value, created, kv.mod_revision - zero, bool(kv.lease)
