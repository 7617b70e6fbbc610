"""When a running migration is allowed more downtime, and when it is given up. Pure.

One policy, never-disrupt: QEMU switches over once it expects to need no more than the allowed
downtime, which rises in steps to the VM's limit and never above; a transfer that takes too long, or
stops to come closer, is ended, and the guest goes on where it is.
"""

from __future__ import annotations

import enum

from agent.hypervisor import Transfer

# The steps begin at half of QEMU's own limit of 300 ms: most guests never need more.
DOWNTIME_FIRST_MS = 150
DOWNTIME_STEPS = 5
# The first passes bring everything over once; only later ones say whether the guest is slower than
# the link.
PASSES_BEFORE_STEPS = 3
STEP_COOLDOWN_S = 10.0
# No less to move for so long means that it will never be less.
STALL_LIMIT_S = 150.0


class Surrender(enum.Enum):
    TIMED_OUT = "timed out"
    STALLED = "stalled"


class Convergence:
    """Follows one transfer; times are seconds on the caller's clock."""

    def __init__(self, *, max_downtime_ms: int, timeout_s: float, began_s: float) -> None:
        self._limit_ms = max_downtime_ms
        self._end_s = began_s + timeout_s
        self.downtime_ms = min(DOWNTIME_FIRST_MS, max_downtime_ms)
        self._raised_s = began_s
        self._least: int | None = None
        self._least_s = began_s
        self._passes = 0

    def take(self, transfer: Transfer, now_s: float) -> Surrender | None:
        """Take a look at the transfer in; ``downtime_ms`` is what is allowed from now on."""
        self._measure(transfer, now_s)
        if now_s >= self._end_s:
            return Surrender.TIMED_OUT
        if now_s - self._least_s >= STALL_LIMIT_S:
            return Surrender.STALLED
        rested = now_s - self._raised_s >= STEP_COOLDOWN_S
        if transfer.iteration >= PASSES_BEFORE_STEPS and rested:
            self._raise(now_s)
        return None

    def _measure(self, transfer: Transfer, now_s: float) -> None:
        """Note when there was less to move than ever before, of what is being moved now."""
        # While the destination makes ready nothing is known; disks come first, then memory.
        unknown = transfer.bytes_total == 0
        memory_begins = self._passes == 0 and transfer.iteration > 0
        if unknown or memory_begins:
            self._least, self._least_s = None, now_s
        if not unknown and (self._least is None or transfer.bytes_remaining < self._least):
            self._least, self._least_s = transfer.bytes_remaining, now_s
        self._passes = transfer.iteration

    def _raise(self, now_s: float) -> None:
        first_ms = min(DOWNTIME_FIRST_MS, self._limit_ms)
        step_ms = max(1, (self._limit_ms - first_ms) // DOWNTIME_STEPS)
        if self.downtime_ms < self._limit_ms:
            self.downtime_ms = min(self._limit_ms, self.downtime_ms + step_ms)
            self._raised_s = now_s
