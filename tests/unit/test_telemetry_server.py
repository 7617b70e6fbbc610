"""Taking in samples: a node speaks for itself and for the VMs bound to it."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from controlplane.sessions.telemetry import TelemetryServer
from controlplane.telemetry.windows import Windows
from shared.errors import Disconnected, Forbidden
from shared.model import Sample
from shared.protocol import Batch, BatchSeen, TelemetryHello, TelemetryRefused
from shared.tls import Identity, Role
from tests.unit.core_world import CoreWorld
from tests.unit.pipes import PipeEnd, pipe

IDENTITY = Identity(role=Role.AGENT, name="n1", cell="abc123")


class Kept(Windows):
    """Windows that note what was put into them."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: list[str] = []

    def add(self, sample: Sample) -> bool:
        self.objects.append(sample.object)
        return super().add(sample)


def serving(world: CoreWorld, windows: Windows) -> tuple[PipeEnd, asyncio.Future[None]]:
    ours, theirs = pipe()
    server = TelemetryServer(world.state, windows)
    return ours, asyncio.ensure_future(server.serve(cast(Any, theirs), IDENTITY))


async def test_a_node_speaks_for_itself_and_its_vms() -> None:
    world, windows = CoreWorld(), Kept()
    mine = world.running("mine")
    here, world.node_id = world.node_id, world.join("n2")
    elsewhere = world.running("elsewhere")
    stream, server = serving(world, windows)
    await stream.send(TelemetryHello(node_name="n1", node_id=here, incarnation="i"))
    samples = [Sample(object=each, at=1.0) for each in (here, mine, elsewhere, world.node_id, "x")]
    await stream.send(Batch(number=5, samples=tuple(samples)))

    assert await stream.receive() == BatchSeen(number=5)
    assert windows.objects == [here, mine]
    await stream.close()
    with pytest.raises(Disconnected):
        await server


@pytest.mark.parametrize("fault", ["name", "id", "no hello"])
async def test_another_nodes_name_is_refused(fault: str) -> None:
    world = CoreWorld()
    stream, server = serving(world, Kept())
    hello = TelemetryHello(
        node_name="n2" if fault == "name" else "n1",
        node_id="node-other" if fault == "id" else world.node_id,
        incarnation="i",
    )
    await stream.send(Batch(number=1, samples=()) if fault == "no hello" else hello)

    assert isinstance(await stream.receive(), TelemetryRefused)
    with pytest.raises(Forbidden):
        await server
