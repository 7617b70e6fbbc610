"""What both kinds of relay process are besides relays: on their own, and silent if need be.

A relay outlives the agent that started it, so that nothing it holds may break when that one dies:
it keeps none of the agent's descriptors but standard error, and a log line that cannot be written
at once is lost. Standard library only; no asyncio either, which would double the time to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from types import TracebackType

LOGGER = "agent.relay"
# The destination's end is handed its connection as the first descriptor after the standard ones.
CONNECTION_FD = 3
# What a pipe takes at once when it takes anything.
LINE_BYTES_MAX = 4096


def begin(handed_over: int) -> bytes:
    """Let go of everything but ``handed_over`` descriptors; returns the order."""
    sys.excepthook = _tell_crash
    _fill_standard_descriptors()
    os.closerange(CONNECTION_FD + handed_over, os.sysconf("SC_OPEN_MAX"))
    parts = []
    while part := os.read(0, 65536):
        parts.append(part)
    _forget(0)
    return b"".join(parts)


def answer(line: str) -> None:
    """Tell the agent, if it is still there, how the start went; it is told one thing only."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode() + b"\n")
    _forget(1)


def say(level: str, message: str, **extra: object) -> None:
    """Write a log line as ``shared.log`` does, if standard error takes it at once."""
    now_s = time.time()
    line = {
        "at": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now_s))}"
        f".{int(now_s % 1 * 1000):03d}+00:00",
        "level": level,
        "logger": LOGGER,
        "message": message,
        **extra,
    }
    data = json.dumps(line, default=str).encode() + b"\n"
    stderr = select.poll()
    stderr.register(2, select.POLLOUT)
    # An agent that hangs reads no logs: a full pipe would hold up a migration.
    takes = any(events & select.POLLOUT for _, events in stderr.poll(0))
    if takes and len(data) <= LINE_BYTES_MAX:
        with contextlib.suppress(OSError):
            os.write(2, data)


def _tell_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    say("error", "a relay crashed", exception=f"{kind.__name__}: {error}"[:1000], at_line=place)


def _fill_standard_descriptors() -> None:
    """Keep a socket from becoming the standard error of an agent that was started without one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < CONNECTION_FD:
        pass
    os.close(descriptor)


def _forget(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)
