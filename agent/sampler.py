"""The loop that measures: node and VMs every period, into the outbox, sealed as batches.

Owns the rhythm and the latest figures. It never stops for a source that fails or hangs: a source
without an answer is left out this time and counted. It knows neither libvirt nor /proc; both
sources are handed in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from agent.outbox import Outbox
from shared.errors import HypervisorError
from shared.model import Sample

log = logging.getLogger(__name__)

# Bulk statistics take milliseconds. One that takes longer than this many periods hangs.
SOURCE_PERIODS_MAX = 1

VmSource = Callable[[], Awaitable[tuple[Sample, ...]]]
NodeSource = Callable[[], Awaitable[Sample | None]]


class Sampler:
    """Takes samples for as long as ``run`` runs.

    ``node_source`` returns a sample, or None while the node does not know its id; it raises
    OSError when the kernel does not answer. ``vm_source`` is ``Hypervisor.samples``.
    """

    def __init__(
        self,
        node_source: NodeSource,
        vm_source: VmSource,
        outbox: Outbox,
        *,
        sample_period_s: float,
        batch_period_s: float,
    ) -> None:
        assert 0 < sample_period_s <= batch_period_s, "a batch holds at least one round of samples"
        self.taken = 0
        self.failures = 0
        self.missed_rounds = 0
        self._node_source = node_source
        self._vm_source = vm_source
        self._outbox = outbox
        self._period_s = sample_period_s
        self._rounds_per_batch = max(1, round(batch_period_s / sample_period_s))
        self._latest: tuple[Sample, ...] = ()
        self._failing = False

    def latest(self) -> tuple[Sample, ...]:
        """Return the samples of the last round, the node's first."""
        return self._latest

    async def run(self) -> None:
        """Sample until cancelled; rounds that a slow one overran are skipped, not made up."""
        loop = asyncio.get_running_loop()
        due_at = loop.time()
        rounds = 0
        while True:
            await self._round()
            rounds += 1
            if rounds % self._rounds_per_batch == 0:
                self._outbox.seal()
            due_at += self._period_s
            late_s = loop.time() - due_at
            if late_s > 0:
                missed = int(late_s // self._period_s) + 1
                self.missed_rounds += missed
                due_at += missed * self._period_s
            await asyncio.sleep(due_at - loop.time())

    async def _round(self) -> None:
        """Measure the node first: what a hanging libvirt does to it is worth knowing."""
        faults: list[Exception] = []
        samples: list[Sample] = []
        try:
            node = await self._node_source()
            if node is not None:
                samples.append(node)
        except OSError as error:
            faults.append(error)
        try:
            async with asyncio.timeout(self._period_s * SOURCE_PERIODS_MAX):
                samples.extend(await self._vm_source())
        except (HypervisorError, TimeoutError) as error:
            faults.append(error)
        self._outbox.add(samples)
        self._latest = tuple(samples)
        self.taken += len(samples)
        self.failures += len(faults)
        self._log(faults)

    def _log(self, faults: list[Exception]) -> None:
        """Say when measuring begins to fail and when it works again, not every five seconds."""
        if faults and not self._failing:
            log.warning("samples are missing: %s", "; ".join(map(repr, faults)))
        elif self._failing and not faults:
            log.info("samples are complete again")
        self._failing = bool(faults)
