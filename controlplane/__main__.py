"""A replica of the control plane as a process: real ports, network servers, an orderly end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from controlplane.api.app import build_app
from controlplane.api.server import ApiServer, ApiServerSettings
from controlplane.app import ControlPlane, Ports, ReplicaSettings
from controlplane.config import DEFAULT_CONFIG, ControlPlaneConfig
from controlplane.replica_files import (
    etcd_tls,
    history_file,
    only_process,
    read_founding,
    read_issuer,
)
from controlplane.services.cluster import readiness
from controlplane.sessions.grpc_server import AgentServer
from controlplane.sessions.peer_grpc import PeerDialler
from controlplane.store.etcd_pool import connect
from controlplane.store.history import History
from controlplane.store.timed import TimedStore
from controlplane.telemetry.exporter import Metrics
from controlplane.telemetry.stalls import watch_stalls
from controlplane.telemetry.windows import Windows
from shared.addresses import host_and_port
from shared.clock import SystemClock
from shared.config import load_config
from shared.daemon import run_daemon
from shared.lifetime import run_until_asked_to_stop
from shared.log import set_log_level, set_up_logging
from shared.offload import ThreadOffload
from shared.reload import Reload
from shared.systemd import Systemd
from shared.tls import load_material
from shared.version import VERSION

log = logging.getLogger(__name__)

CHANGEABLE = {"log_level": lambda config: set_log_level(config.log_level)}

# Somebody waits for a start; who leads changes within seconds.
READY_POLL_S = 0.1
# Containers made and not freed before the collector looks at the young; the times it does before
# it looks at those that outlived it; the times it does that before it looks at all.
COLLECT_AFTER = (5_000, 10, 40)


def main() -> None:
    run_daemon("novacron-controlplane", __doc__, DEFAULT_CONFIG, _load, _run)


def _load(path: Path) -> ControlPlaneConfig:
    return load_config(path, ControlPlaneConfig, os.environ)


def _run(config: ControlPlaneConfig, load: Callable[[], ControlPlaneConfig]) -> None:
    set_up_logging(config.log_level, os.environ)
    with only_process(config.data_dir):
        asyncio.run(serve(config, load))


async def serve(config: ControlPlaneConfig, load: Callable[[], ControlPlaneConfig]) -> None:
    """Serve until a signal asks to stop."""
    systemd = Systemd(os.environ)
    tls = load_material(config.tls.ca, config.tls.certificate, config.tls.key)
    founding = read_founding(config.bootstrap)
    clock = SystemClock()
    issuer = read_issuer(config.enrolment, founding.cluster.cell, tls.ca, clock)
    history_thread, planning_thread = ThreadOffload("history"), ThreadOffload("planning")
    history = History(history_file(config.data_dir), history_thread)
    windows = Windows()
    metrics = Metrics(CollectorRegistry(), replica=config.name, version=VERSION, windows=windows)
    store = TimedStore(
        connect(config.etcd.endpoints, etcd_tls(config.etcd.tls)), metrics.etcd_request
    )
    peers = PeerDialler(tls)
    ports = Ports(
        store=store,
        history=history,
        clock=clock,
        rng=random.SystemRandom(),
        founding=founding,
        offload=planning_thread,
        windows=windows,
        metrics=metrics,
        peers=peers,
        settle_memory=_settle_memory,
        issuer=issuer,
    )
    replica = ControlPlane(_settings(config), ports)
    agents = AgentServer(
        founding.cluster.cell,
        replica.hub,
        replica.leader_address,
        replica.telemetry,
        replica.peers,
        replica.renew,
    )
    host, port = host_and_port(config.api.listen)
    api = ApiServer(
        build_app(replica.context(), metrics),
        ApiServerSettings(
            host=host, port=port, certificate=config.tls.certificate, key=config.tls.key
        ),
    )
    await agents.start(config.agents.listen, tls, b"" if issuer is None else issuer.agents_ca)
    log.info("serving", extra={"api": config.api.listen, "agents": config.agents.listen})
    try:
        await run_until_asked_to_stop(
            _served(replica, api),
            _watched(systemd, replica, api, config.api.advertise),
            watch_stalls(metrics.loop_stalled),
            on_hangup=Reload(config, load, CHANGEABLE),
        )
    finally:
        systemd.ending()
        await agents.stop()
        await peers.close()
        await store.close()
        await history.close()
        history_thread.close()
        planning_thread.close()


async def _served(replica: ControlPlane, api: ApiServer) -> None:
    """Run a replica and its API until cancelled, or until one of them ends.

    Then requests under way come to their end as at any time: this replica hands over, and goes on
    following whoever leads until they have.
    """
    following, serving = asyncio.ensure_future(replica.run()), asyncio.ensure_future(api.run())
    try:
        await asyncio.wait((following, serving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        replica.hand_over()
        for each in (serving, following):
            each.cancel()
            await asyncio.wait({each})
    for each in (serving, following):
        if not each.cancelled():
            each.result()


async def _watched(systemd: Systemd, replica: ControlPlane, api: ApiServer, url: str) -> None:
    """Tell systemd once this replica can answer, and from then on that it lives."""
    await api.started()
    while not readiness(replica.context()).ready:  # noqa: ASYNC110 - who leads has no event
        await asyncio.sleep(READY_POLL_S)
    systemd.serving(f"answers at {url}")
    await systemd.stay_alive()


def _settle_memory() -> None:
    """Take what there is for permanent: a collection holds the loop for 120 ms at 50,000 VMs.

    What comes later and stays, a leader's sessions, costs 100 ms for a thousand agents: the young
    are looked at as ever, all that is not permanent after 2,000,000 new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def _settings(config: ControlPlaneConfig) -> ReplicaSettings:
    return ReplicaSettings(
        name=config.name,
        incarnation=uuid.uuid4().hex,
        url=config.api.advertise,
        agent_address=config.agents.advertise,
        version=VERSION,
        election=config.election,
        sessions=config.sessions,
        scheduler=config.scheduler,
        migrations=config.migrations,
        store_quota_bytes=config.etcd.quota_bytes,
    )


if __name__ == "__main__":
    main()
