"""What the agent measured and no replica has taken yet: a bounded queue of numbered batches.

Owns the order, the numbers and the bound. While nobody answers, the oldest batch makes room for the
newest and is counted; nothing ever waits for room. A batch leaves the queue only when it has been
acknowledged or dropped, so a broken connection costs repetition, never a gap. Memory only: what was
not taken is lost with the process, and numbers start at 1 with each ``incarnation`` of it.

One task fills (``add``, ``seal``), one empties (``next_batch``, ``acknowledge``, ``rewind``).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable

from msgspec.structs import replace

from shared.model import Sample
from shared.protocol import Batch

# A replica's restart or an election takes seconds, an upgrade with trouble minutes. What is older
# would be half outside of the control plane's ten-minute windows anyway.
RETENTION_S = 300.0

# A node with 500 VMs makes 30,000 samples in that time; at about 0.5 kB each this is 20 MB.
SAMPLES_MAX = 40_000

# At most 150 bytes each on the wire: 1.5 MB of the 4 MiB that a message may have.
BATCH_SAMPLES_MAX = 10_000


class Outbox:
    """A queue of batches; ``dropped`` counts the samples let go since the start."""

    def __init__(self, batch_period_s: float, retention_s: float = RETENTION_S) -> None:
        assert batch_period_s > 0, "batches are made at a period"
        self.dropped = 0
        self._batches_max = max(1, math.ceil(retention_s / batch_period_s))
        self._open: list[Sample] = []
        self._batches: deque[Batch] = deque()
        self._samples = 0
        self._last_number = 0
        self._sent = 0
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of batches that are not acknowledged."""
        return len(self._batches)

    def add(self, samples: Iterable[Sample]) -> None:
        """Put samples into the open batch, which is sealed early when it is full."""
        for sample in samples:
            self._open.append(sample)
            if len(self._open) >= BATCH_SAMPLES_MAX:
                self.seal()

    def seal(self) -> None:
        """Close the open batch and number it; does nothing when it is empty."""
        if not self._open:
            return
        self._last_number += 1
        self._batches.append(Batch(number=self._last_number, samples=tuple(self._open)))
        self._samples += len(self._open)
        self._open.clear()
        while len(self._batches) > self._batches_max or self._samples > SAMPLES_MAX:
            self.dropped += self._remove_oldest()
        self._filled.set()

    async def next_batch(self) -> Batch:
        """Return the oldest batch not handed out since the last rewind; waits for one."""
        while (batch := self._first_after(self._sent)) is None:
            self._filled.clear()
            await self._filled.wait()
        self._sent = batch.number
        return replace(batch, dropped=self.dropped)

    def acknowledge(self, number: int) -> None:
        """Let go of every batch up to ``number``, as far as they were handed out."""
        while self._batches and self._batches[0].number <= min(number, self._sent):
            self._remove_oldest()

    def rewind(self) -> None:
        """Hand out again what was not acknowledged: the connection it went to is gone."""
        self._sent = 0
        self._filled.set()

    def _first_after(self, number: int) -> Batch | None:
        if not self._batches or self._batches[-1].number <= number:
            return None
        # Numbers in the queue are dense: the place follows from the first one.
        return self._batches[max(0, number + 1 - self._batches[0].number)]

    def _remove_oldest(self) -> int:
        samples = len(self._batches.popleft().samples)
        self._samples -= samples
        return samples
