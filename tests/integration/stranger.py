"""A peer of the agents' port that says what a test wants, under any certificate."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent.session import LeaderChannel
from agent.session_grpc import Dialler
from shared.model import CpuFacts, Inventory, PoolFacts, Sample, Term, VersionFacts
from shared.protocol import (
    Batch,
    Hello,
    InSync,
    LeaderMessage,
    TelemetryAnswer,
    TelemetryHello,
    TermAccepted,
    Welcome,
)
from shared.tls import TlsMaterial


class Stranger:
    """One connection to the replica with some material; its streams."""

    def __init__(self, address: str, tls: TlsMaterial) -> None:
        self._address = address
        self._dialler = Dialler(tls, random.Random(1))

    async def __aenter__(self) -> Stranger:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._dialler.close()

    async def greet(self, name: str) -> LeaderMessage:
        """Say hello as a node and return the answer. Raises Disconnected."""
        channel: LeaderChannel = await self._dialler.session(self._address)
        await channel.send(_hello(name))
        answer = await channel.receive()
        await channel.close()
        return answer

    @asynccontextmanager
    async def session(self, name: str) -> AsyncIterator[LeaderChannel]:
        """Yield the stream of a node whose greeting is over. Raises Disconnected."""
        channel: LeaderChannel = await self._dialler.session(self._address)
        await channel.send(_hello(name))
        welcome = await channel.receive()
        assert isinstance(welcome, Welcome)
        await channel.send(TermAccepted(term=welcome.term))
        assert isinstance(await channel.receive(), InSync)
        yield channel
        await channel.close()

    async def measure(self, hello: TelemetryHello, *samples: Sample) -> TelemetryAnswer:
        """Say hello, send samples in one batch, return the answer. Raises Disconnected."""
        channel = await self._dialler.telemetry(self._address)
        await channel.send(hello)
        if samples:
            await channel.send(Batch(number=1, samples=samples))
        answer = await channel.receive()
        await channel.close()
        return answer


def _hello(name: str) -> Hello:
    return Hello(
        node_name=name,
        boot_id=str(uuid.uuid4()),
        incarnation=uuid.uuid4().hex,
        address="127.0.0.1",
        agent_version="0.1.0",
        highest_term=Term(0, 0),
        inventory=Inventory(
            cpus=1,
            memory_mib=1024,
            cpu=CpuFacts(model="qemu64"),
            pools=(PoolFacts(name="default", capacity_gib=10.0, free_gib=10.0),),
            artefacts=("tiny-initrd", "tiny-kernel"),
            versions=VersionFacts(agent="0.1.0", libvirt="9.0.0", qemu="7.2.0", kernel="6.1"),
        ),
        domains=(),
    )
