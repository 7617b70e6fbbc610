"""Has a certificate request made in a process of its own: see ``certificate_request``."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE

import msgspec

from shared.errors import NovacronError

MODULE = "agent.certificate_request"
# It loads a library of some megabytes, from a disk that may be busy with guests.
LIMIT_S = 60.0


class _Made(msgspec.Struct, frozen=True):
    key: str
    request: str


async def request_in_a_process(name: str, key: str) -> tuple[str, str]:
    """Return a key and its request; ``key`` is empty for a new one. Raises NovacronError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", MODULE, name, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            output, complaint = await process.communicate(key.encode())
    except TimeoutError:
        process.kill()
        raise NovacronError(f"no key could be made within {LIMIT_S:.0f} s") from None
    if process.returncode:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise NovacronError(f"no key could be made: {last}")
    made = msgspec.json.decode(output, type=_Made)
    return made.key, made.request
