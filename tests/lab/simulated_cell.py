"""The cell of the simulated demo: a whole cluster in this process behind a real HTTPS API.

The cluster is the simulation's, on the real clock and without faults; certificates and token are
made as ``novacron init`` makes them, in a directory that is gone afterwards.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from controlplane.api.app import build_app
from controlplane.api.server import ApiServer, ApiServerSettings
from controlplane.cell_files import CellFiles
from controlplane.cli.context import Context
from controlplane.leader import Founding
from controlplane.telemetry.exporter import Metrics
from shared.clock import SystemClock
from shared.model import ApiKey, Cluster
from shared.version import VERSION
from tests.lab.simulated_demo import Ready
from tests.sim.cluster import ClusterSettings, SimCluster

REPLICA = "replica-1"
NODES = 3


async def serve(stop: asyncio.Event, ready: Ready) -> None:
    """Run the cell until ``stop``; ``ready`` is told how to log in."""
    with tempfile.TemporaryDirectory(prefix="novacron-demo-") as folder:
        directory = Path(folder)
        rng = random.Random()
        files = CellFiles(directory, SystemClock(), rng)
        files.ensure_cell()
        files.add_replica(REPLICA, "127.0.0.1")
        cluster = SimCluster(
            ClusterSettings(
                nodes=NODES,
                node_cpus=4,
                node_memory_mib=2048,
                telemetry=True,
                held_up_share=0.0,
            ),
            rng,
            clock=SystemClock(),
            founding=_founding(directory),
        )
        await cluster.start()
        try:
            if await _is_ready_before(cluster, stop):
                await _serve_api(cluster, directory, files, stop, ready)
        finally:
            await cluster.stop()


async def _is_ready_before(cluster: SimCluster, stop: asyncio.Event) -> bool:
    """Wait for the cluster, or for Ctrl-C; tell whether the cluster came first."""
    waits = [asyncio.ensure_future(cluster.until_ready()), asyncio.ensure_future(stop.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    return not stop.is_set()


async def _serve_api(
    cluster: SimCluster, directory: Path, files: CellFiles, stop: asyncio.Event, ready: Ready
) -> None:
    context = cluster.context()
    windows = cluster.control_plane(REPLICA).windows
    metrics = Metrics(CollectorRegistry(), replica=REPLICA, version=VERSION, windows=windows)
    issued = directory / "replicas" / REPLICA
    server = ApiServer(
        build_app(context, metrics),
        ApiServerSettings(
            host="127.0.0.1",
            port=0,
            certificate=issued / "controlplane.crt",
            key=issued / "controlplane.key",
        ),
    )
    running = asyncio.ensure_future(server.run())
    started = asyncio.ensure_future(server.started())
    await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
    started.cancel()
    ready(
        Context(
            endpoints=(f"https://127.0.0.1:{server.port}",),
            ca=files.ca_file.read_text(),
            token=files.token_file.read_text().strip(),
        ),
        directory,
    )
    await stop.wait()
    server.stop()
    await running


def _founding(directory: Path) -> Founding:
    return Founding(
        msgspec.json.decode((directory / "cluster.json").read_bytes(), type=Cluster),
        msgspec.json.decode((directory / "admin-key.json").read_bytes(), type=ApiKey),
    )
