"""Ctrl-C and its like: held back around what must not be cut in two, an exception otherwise."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The user, or the session's end, asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def raise_when_asked_to_end() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into Interrupted from now on."""
    for number in ENDING:
        signal.signal(number, _raise)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold the signals back; one that came meanwhile takes effect at the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
