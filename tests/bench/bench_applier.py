"""The applier's gate: keys a second of VM creates in groups, and against one at a time.

A create is four keys: the VM, its operation, an event and an audit record; the applier's own mark
is not counted. Hundreds of callers wait for their creates, as requests do. Both ways run the real
applier, store client and etcd on loopback ports of their own, with the audit by the watch and the
copy of history beside them on the same loop; turns of a second alternate, so that whatever else the
machine does falls on both. A ticker tells how long the loop was held up meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from msgspec import Struct

from controlplane.commands.draft import Author
from controlplane.commands.terms import Decided, OnTerms
from controlplane.commands.vms import CreateVm
from controlplane.reconcilers import loop
from controlplane.reconcilers.history import CopyHistory, TrimCopiedHistory
from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.applier import GROUP_WRITES_MAX, Applier
from controlplane.store.etcd_pool import EtcdStore, connect
from controlplane.store.history import History
from controlplane.store.informer import Informer
from shared.clock import SystemClock
from shared.ids import IdSource, new_cell
from shared.model import Term
from shared.offload import ThreadOffload
from tests.bench.bootstrap import lower_bound
from tests.bench.result import BenchResult, figure
from tests.contract.etcd_process import EtcdCluster
from tests.running_vms import typical_spec
from tests.unit.lone_replica import NO_PEERS

KEYS_PER_CREATE = 4
KEYS_PER_S_MIN = 4_000
RATIO_MIN = 4.0
STALL_P99_MAX_MS = 100.0
SUBMITTERS = 400
PAIRS = 16
# The first pairs pay for caches and connections that later ones find warm.
WARM_UP_PAIRS = 2
TURN_S = 1.0
TICK_S = 0.005
# The term must not end in the middle of a measurement.
LEASE_S = 600
MEMBERS = (1, 3)


class Pair(Struct, frozen=True):
    """Keys per second of two turns that followed each other."""

    grouped: float
    single: float


class Writer:
    """What one leader writes with, on one etcd cluster."""

    def __init__(self, store: EtcdStore, history: History, term: Term) -> None:
        rng = random.Random(7)
        self._store = store
        self._term = term
        self._clock = SystemClock()
        self._ids = IdSource(new_cell(rng), self._clock, rng)
        self._numbers = itertools.count()
        self.state = ClusterState()
        self.informer = Informer(store, self.state)
        self.copy = CopyHistory(self.state, history, NO_PEERS)

    async def turn(self, group_writes_max: int) -> float:
        """Create VMs for a turn with hundreds of callers; return the keys written per second."""
        await self._trim()
        vms_before = len(self.state.vms)
        async with self._applying(group_writes_max) as applier:
            began_s = time.perf_counter()
            await asyncio.gather(*(self._submit(applier, began_s) for _ in range(SUBMITTERS)))
            took_s = time.perf_counter() - began_s
        return (len(self.state.vms) - vms_before) * KEYS_PER_CREATE / took_s

    async def _trim(self) -> None:
        """Take what was copied out of etcd, as the leader does all the time."""
        async with self._applying(GROUP_WRITES_MAX) as applier:
            await TrimCopiedHistory(applier, self.state, self._copied).reconcile()

    def _copied(self) -> int:
        return self.copy.copied_seq

    @asynccontextmanager
    async def _applying(self, group_writes_max: int) -> AsyncIterator[Applier]:
        mark = await self._store.get(keys.MARK)
        applier = Applier(
            self._store,
            self.state,
            self._term,
            mark,
            self._ids,
            self._clock,
            _at_once,
            group_writes_max,
        )
        running = asyncio.create_task(applier.run())
        try:
            yield applier
        finally:
            running.cancel()
            await asyncio.wait({running})

    async def _submit(self, applier: Applier, began_s: float) -> None:
        while time.perf_counter() - began_s < TURN_S:
            decided: Decided[str] = await applier.submit(
                OnTerms(command=_create(next(self._numbers)))
            )
            assert decided.result.startswith("op-"), "a create opens an operation"


def run() -> list[BenchResult]:
    """Measure on one member, which is held against the gates, and on three."""
    results: list[BenchResult] = []
    for members in MEMBERS:
        with EtcdCluster(members) as cluster:
            found = asyncio.run(_measure(cluster))
        results += found if members == MEMBERS[0] else _figures(found, members)
    return results


async def _measure(cluster: EtcdCluster) -> list[BenchResult]:
    pairs: list[Pair] = []
    late_ms: list[float] = []
    async with _writing(cluster) as writer:
        for number in range(WARM_UP_PAIRS + PAIRS):
            if number == WARM_UP_PAIRS:
                # As a replica does once it has listed what there is.
                gc.collect()
                gc.freeze()
            grouped, single = 0.0, 0.0
            # The order changes from pair to pair, so that neither way always comes second.
            for group in (True, False) if number % 2 else (False, True):
                if group:
                    with _ticking(late_ms):
                        grouped = await writer.turn(GROUP_WRITES_MAX)
                else:
                    single = await writer.turn(KEYS_PER_CREATE)
            pairs.append(Pair(grouped, single))
        assert writer.informer.mismatches == 0, "the leader alone writes"
    return _results(pairs[WARM_UP_PAIRS:], late_ms)


@asynccontextmanager
async def _writing(cluster: EtcdCluster) -> AsyncIterator[Writer]:
    """Win the election and follow the watch as a leader does, until left."""
    store = connect(cluster.endpoints, None)
    thread = ThreadOffload("history")
    with tempfile.TemporaryDirectory(prefix="novacron-bench-") as folder:
        history = History(Path(folder) / "history.sqlite", thread)
        lease = await store.grant_lease(LEASE_S)
        campaign = await store.campaign(b"bench", lease)
        writer = Writer(store, history, Term(1, campaign.leader.create_revision))
        listed = asyncio.Event()
        beside = [asyncio.create_task(writer.informer.run(listed.set))]
        await listed.wait()
        writer.informer.audit_only()
        beside.append(asyncio.create_task(loop.run(writer.copy, writer.state.changes)))
        try:
            yield writer
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
            await history.close()
            thread.close()
            await store.close()


def _figures(results: list[BenchResult], members: int) -> list[BenchResult]:
    """Return results without their gates: more members than cores say little of the applier."""
    return [figure(f"{each.name}.{members}_members", each.value, each.unit) for each in results]


def _results(pairs: list[Pair], late_ms: list[float]) -> list[BenchResult]:
    rate = lower_bound([pair.grouped for pair in pairs])
    ratio = lower_bound([pair.grouped / pair.single for pair in pairs])
    p99_ms = statistics.quantiles(late_ms, n=100)[98]
    bound = f"95 % lower bound of the median of {len(pairs)} turns"
    return [
        figure("applier.single", statistics.median(p.single for p in pairs), "keys/s"),
        figure("applier.grouped", statistics.median(p.grouped for p in pairs), "keys/s"),
        _at_least("applier.keys_per_s", rate, "keys/s", KEYS_PER_S_MIN, bound),
        _at_least("applier.grouping_ratio", ratio, "ratio", RATIO_MIN, bound),
        figure("applier.stall_max", max(late_ms), "ms"),
        BenchResult(
            name="applier.stall_p99",
            value=round(p99_ms, 2),
            unit="ms",
            gate=f"at most {STALL_P99_MAX_MS:g}",
            holds=p99_ms <= STALL_P99_MAX_MS,
        ),
    ]


def _at_least(name: str, value: float, unit: str, limit: float, bound: str) -> BenchResult:
    gate = f"at least {limit:g} ({bound})"
    return BenchResult(name=name, value=round(value, 2), unit=unit, gate=gate, holds=value >= limit)


@contextmanager
def _ticking(late_ms: list[float]) -> Iterator[None]:
    """Note how much later than asked each tick of the loop comes."""

    async def tick() -> None:
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            late_ms.append((time.perf_counter() - began_s - TICK_S) * 1000)

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()


async def _at_once() -> None:
    """Hold no write back: the lease outlasts the measurement."""


def _create(number: int) -> CreateVm:
    return CreateVm(
        name=f"web-{number}",
        tenant="default",
        labels={"tier": "gold", "team": f"t{number % 10}"},
        spec=typical_spec(vcpus=2),
        by=Author("user-bench", "req-bench"),
    )
