"""An agent's relays in a process of its own, which a test kills: ``python -m`` with JSON arguments.

It tells what the test needs on its standard output, one line, and then waits to be killed. Its
standard input is the test's: it ends with a test that is killed itself.
"""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from agent.relay import RelayTarget
from agent.relay_node import NodeRelays
from agent.relay_settings import RelaySettings


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Which side to be; a source is given a target and a token, a destination admits a node."""

    settings: RelaySettings
    name: str
    admits: str = ""
    target: RelayTarget = RelayTarget("", "")
    token: str = ""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    port: int = 0
    token: str = ""
    uri: str = ""


def encode(part: Part) -> str:
    return msgspec.json.encode(part, enc_hook=str).decode()


async def serve(part: Part) -> None:
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 1)
    relays = NodeRelays(part.settings, os.environ)
    if part.admits:
        port = relays.start("127.0.0.1", 0)
        tell(Told(port=port, token=await relays.admit(part.name, part.admits)))
        await relays.run()
    tell(Told(uri=await relays.open(part.name, part.target, part.token)))
    await asyncio.Event().wait()


def tell(told: Told) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    decoded = msgspec.json.decode(sys.argv[1], type=Part, dec_hook=lambda kind, value: kind(value))
    asyncio.run(serve(decoded))
