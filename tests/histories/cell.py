"""A cell as ``./dev lab status --json`` tells of it: where its parts are, and their pids."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

STATUS_LIMIT_S = 30.0


class Replica(Struct, frozen=True, kw_only=True):
    """``pid`` is None while it does not run."""

    name: str
    url: str
    pid: int | None = None


class Member(Struct, frozen=True, kw_only=True):
    name: str
    endpoint: str
    pid: int | None = None


class CellStatus(Struct, frozen=True, kw_only=True):
    """``ca`` and ``token`` are paths of files."""

    ca: str
    token: str
    replicas: tuple[Replica, ...]
    members: tuple[Member, ...]

    def read_token(self) -> str:
        return Path(self.token).read_text().strip()


class StatusCommand:
    """Asks for the status by a command, each time anew: pids change when a part is restarted."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)

    def __call__(self) -> CellStatus:
        done = subprocess.run(
            self._command, check=True, capture_output=True, timeout=STATUS_LIMIT_S
        )
        return msgspec.json.decode(done.stdout, type=CellStatus)
