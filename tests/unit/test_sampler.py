"""The sampler's rhythm and its faults, on a loop whose clock is the test's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from agent.outbox import Outbox
from agent.sampler import NodeSource, Sampler, VmSource
from shared.errors import HypervisorUnavailable
from shared.model import Sample

PERIOD_S = 5.0


class FakeTime:
    """Stands for the loop's clock and sleep: time passes only when somebody sleeps."""

    def __init__(self, until_s: float) -> None:
        self.now_s = 0.0
        self._until_s = until_s

    def time(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        assert delay_s >= 0.0
        self.now_s += delay_s
        if self.now_s >= self._until_s:
            raise asyncio.CancelledError


async def run_for(
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    outbox: Outbox,
    node: Callable[[FakeTime], Sample | None] | None = None,
    vms: Callable[[FakeTime], Awaitable[tuple[Sample, ...]]] | None = None,
) -> Sampler:
    """Run a sampler for some of its own seconds."""
    clock = FakeTime(seconds)

    async def two_vms() -> tuple[Sample, ...]:
        return (Sample(object="vm-1", at=clock.now_s), Sample(object="vm-2", at=clock.now_s))

    async def measure() -> Sample | None:
        return node(clock) if node else node_sample(clock)

    node_source: NodeSource = measure
    vm_source: VmSource = (lambda: vms(clock)) if vms else two_vms
    sampler = Sampler(
        node_source, vm_source, outbox, sample_period_s=PERIOD_S, batch_period_s=2 * PERIOD_S
    )
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", clock.time)
        patch.setattr(asyncio, "sleep", clock.sleep)
        with pytest.raises(asyncio.CancelledError):
            await sampler.run()
    return sampler


def node_sample(clock: FakeTime) -> Sample | None:
    return Sample(object="node-1", at=clock.now_s)


async def test_every_period_a_round_and_every_second_round_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outbox = Outbox(2 * PERIOD_S)
    sampler = await run_for(monkeypatch, 25.0, outbox)
    assert len(outbox) == 2, "five rounds: two batches and an open one"
    first, second = await outbox.next_batch(), await outbox.next_batch()
    assert [s.at for s in first.samples] == [0.0] * 3 + [5.0] * 3
    assert [s.at for s in second.samples] == [10.0] * 3 + [15.0] * 3
    assert [s.object for s in sampler.latest()] == ["node-1", "vm-1", "vm-2"]
    assert (sampler.taken, sampler.failures, sampler.missed_rounds) == (15, 0, 0)


async def test_a_round_that_takes_long_does_not_shift_the_rhythm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took_s = iter([2.0, 0.0, 12.0, 0.0, 0.0])

    def slow(clock: FakeTime) -> Sample | None:
        at = clock.now_s
        clock.now_s += next(took_s)
        return Sample(object="node-1", at=at)

    async def no_vms(clock: FakeTime) -> tuple[Sample, ...]:
        return ()

    outbox = Outbox(2 * PERIOD_S)
    sampler = await run_for(monkeypatch, 35.0, outbox, node=slow, vms=no_vms)
    dates = [s.at for _ in range(2) for s in (await outbox.next_batch()).samples]
    assert dates == [0.0, 5.0, 10.0, 25.0]
    assert sampler.missed_rounds == 2


async def test_a_failing_hypervisor_costs_its_samples_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(clock: FakeTime) -> tuple[Sample, ...]:
        if clock.now_s < 15.0:
            raise HypervisorUnavailable("libvirtd is away")
        return (Sample(object="vm-1", at=clock.now_s),)

    outbox = Outbox(2 * PERIOD_S)
    with caplog.at_level(logging.INFO):
        sampler = await run_for(monkeypatch, 20.0, outbox, vms=broken)
    assert (sampler.taken, sampler.failures) == (5, 3)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"], "once each, not per round"
    assert "libvirtd is away" in caplog.text


async def test_a_failing_kernel_interface_costs_the_nodes_sample_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(clock: FakeTime) -> Sample | None:
        raise FileNotFoundError("/proc/pressure/cpu")

    sampler = await run_for(monkeypatch, 10.0, Outbox(2 * PERIOD_S), node=broken)
    assert (sampler.taken, sampler.failures) == (4, 2)


async def test_a_node_without_an_id_yet_sends_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = await run_for(monkeypatch, 5.0, Outbox(2 * PERIOD_S), node=lambda clock: None)
    assert [s.object for s in sampler.latest()] == ["vm-1", "vm-2"]
    assert sampler.failures == 0


async def test_a_hanging_hypervisor_is_given_up_after_a_period() -> None:
    """On the real clock with a period of milliseconds; asserts what happens, not when."""
    hung = asyncio.Event()
    rounds: list[float] = []
    outbox = Outbox(0.02)

    async def hang() -> tuple[Sample, ...]:
        await hung.wait()
        return ()

    async def node() -> Sample | None:
        rounds.append(0.0)
        return Sample(object="node-1", at=float(len(rounds)))

    sampler = Sampler(node, hang, outbox, sample_period_s=0.01, batch_period_s=0.02)
    task = asyncio.create_task(sampler.run())
    batch = await outbox.next_batch()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {s.object for s in batch.samples} == {"node-1"}
    assert sampler.failures >= 1
