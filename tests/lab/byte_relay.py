"""Carries a migration's control connection between two nodes of the lab, and knows nothing of it.

The source's libvirtd connects to a unix socket in its own node, as it does in production, and
reaches the destination's. Here only bytes are passed on, by a process of the lab's supervisor (it
runs this module): no token, no TLS. It serves tests and measurements of libvirt itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from tests.lab import runtime
from tests.lab.cluster import Lab
from tests.lab.layout import REPOSITORY
from tests.lab.nodes import LightNode
from tests.lab.supervisor import Program

# As much as a stream's own buffer; libvirt's messages are far smaller.
PIECE_BYTES = 64 * 1024


class ByteRelay:
    """The way from one node's libvirtd to another's, open while this is entered."""

    def __init__(self, lab: Lab, source: LightNode, destination: LightNode) -> None:
        self._link = lab.link
        self._program = f"{source.name}.relay-to-{destination.name}"
        name = f"relay-to-{destination.name}.sock"
        self._listen = source.directory / "run" / name
        self._target = destination.libvirt_socket
        self.uri = f"qemu+unix:///system?socket=/run/{name}"

    def kill(self) -> None:
        """End it as a crash would; what it carried ends with it."""
        os.kill(self._link.pid_of(self._program), signal.SIGKILL)

    def __enter__(self) -> ByteRelay:
        self._link.start(
            Program(
                name=self._program,
                arguments=(
                    *(sys.executable, "-m", "tests.lab.byte_relay"),
                    *(str(self._listen), str(self._target)),
                ),
                environment=runtime.environment(Path("/")) | {"PYTHONPATH": str(REPOSITORY)},
                restart=False,
            )
        )
        self._link.wait_for(self._program, self._listen.exists, "the relay to listen")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._link.stop(self._program, grace_s=0.0)
        self._listen.unlink(missing_ok=True)


async def serve(listen: str, target: str) -> None:
    """Pass on what comes to ``listen`` to ``target``, and back, until killed."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_unix_connection(target)
        await asyncio.gather(_pump(reader, their_writer), _pump(their_reader, writer))

    server = await asyncio.start_unix_server(carry, listen)
    await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    writer.close()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
