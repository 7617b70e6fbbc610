"""What happened, in order: a hash over all of it, and its last lines for people."""

from __future__ import annotations

import hashlib
from collections import deque

from tests.sim.virtual_loop import true_time_s

# Enough to see what led to a violation; a whole run has some ten thousand lines.
TAIL_LINES = 400


class Trace:
    """``keep_all`` keeps every line, for a replay that somebody reads."""

    def __init__(self, *, keep_all: bool = False) -> None:
        self._hash = hashlib.sha256()
        self._tail: deque[str] = deque(maxlen=None if keep_all else TAIL_LINES)
        self.lines = 0

    def note(self, text: str) -> None:
        line = f"{true_time_s():.6f} {text}"
        self._hash.update(line.encode() + b"\n")
        self._tail.append(line)
        self.lines += 1

    def digest(self) -> str:
        return self._hash.hexdigest()

    def tail(self) -> list[str]:
        return list(self._tail)
