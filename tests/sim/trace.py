"""What happened, in order: a hash over all of it, and its lines for whoever wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tests.sim.virtual_loop import true_time_s

Tell = Callable[[str], None]


class Trace:
    """``tell`` is given every line at once, for a replay that somebody reads."""

    def __init__(self, tell: Tell | None = None) -> None:
        self._hash = hashlib.sha256()
        self._tell = tell
        self.lines = 0

    def note(self, text: str) -> None:
        line = f"{true_time_s():.6f} {text}"
        self._hash.update(line.encode() + b"\n")
        self.lines += 1
        if self._tell is not None:
            self._tell(line)

    def digest(self) -> str:
        return self._hash.hexdigest()
