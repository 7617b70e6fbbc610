"""Takes in agents' batches of samples, on any replica.

The read loop only decodes and writes into memory; nothing is awaited between a batch and its
acknowledgement.
"""

from __future__ import annotations

from controlplane.sessions.admitted import check_admitted
from controlplane.state import ClusterState
from controlplane.telemetry.windows import Windows
from shared.channel import Channel
from shared.errors import Forbidden, NovacronError
from shared.model import Sample
from shared.problems import problem_of
from shared.protocol import (
    Batch,
    BatchSeen,
    TelemetryAnswer,
    TelemetryHello,
    TelemetryMessage,
    TelemetryRefused,
)
from shared.tls import Identity


class TelemetryServer:
    def __init__(self, state: ClusterState, windows: Windows) -> None:
        self._state = state
        self._windows = windows

    async def serve(
        self,
        channel: Channel[TelemetryAnswer, TelemetryMessage],
        identity: Identity,
        serial: str = "",
    ) -> None:
        """Serve one agent's stream until it ends. Raises Disconnected, Unauthenticated.

        ``serial`` is of the certificate that it has shown; empty where connections have none.
        """
        try:
            node_id = await self._greet(channel, identity)
            check_admitted(self._state, identity.name, serial)
        except NovacronError as error:
            await channel.send(TelemetryRefused(problem=problem_of(error)))
            raise
        while True:
            message = await channel.receive()
            check_admitted(self._state, identity.name, serial)
            if isinstance(message, Batch):
                for sample in message.samples:
                    if self._may_speak_of(node_id, sample):
                        self._windows.add(sample)
                await channel.send(BatchSeen(number=message.number))

    async def _greet(
        self, channel: Channel[TelemetryAnswer, TelemetryMessage], identity: Identity
    ) -> str:
        hello = await channel.receive()
        if not isinstance(hello, TelemetryHello):
            raise Forbidden("telemetry begins with a hello")
        node_id = self._state.node_id_by_name(identity.name)
        if hello.node_name != identity.name or hello.node_id != node_id:
            raise Forbidden(f"the certificate speaks for node {identity.name!r} only")
        return hello.node_id

    def _may_speak_of(self, node_id: str, sample: Sample) -> bool:
        """A node reports itself and the VMs bound to it, and nothing of anybody else's."""
        if sample.object == node_id:
            return True
        stored = self._state.vms.get(sample.object)
        return stored is not None and stored.record.status.node == node_id
