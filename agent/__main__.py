"""The agent as a process: real ports, its own metrics, an orderly end that touches no guest."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agent import doctor, join
from agent.app import Agent, AgentPorts
from agent.append_log import FileLog
from agent.config import AgentConfig, check_pools
from agent.drivers import Driver, open_driver, remember_probe
from agent.exporter import CONTENT_TYPE, AgentExporter
from agent.figures import Figures
from agent.handshake import why_not
from agent.identity_files import IdentityFiles
from agent.inventory import NodeFacts
from agent.metrics_server import MetricsServer
from agent.node_sampler import NodeSampler
from agent.outbox import Outbox
from agent.relay_node import NodeRelays, relay_settings
from agent.renewal import CertificateRenewal
from agent.request_spawn import request_in_a_process
from agent.sampler import Sampler
from agent.session_grpc import Dialler
from agent.telemetry import Telemetry
from shared.addresses import host_and_port
from shared.clock import Clock, SystemClock
from shared.config import load_config
from shared.daemon import Verb, run_daemon
from shared.lifetime import run_until_asked_to_stop
from shared.log import set_log_level, set_up_logging
from shared.offload import Offload, ThreadOffload
from shared.reload import Reload
from shared.systemd import Systemd
from shared.tls import TlsMaterial, load_material
from shared.version import VERSION

log = logging.getLogger(__name__)

DEFAULT_CONFIG = Path("/etc/novacron/agent.toml")
CHANGEABLE = {"log_level": lambda config: set_log_level(config.log_level)}
BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


VERBS = (
    Verb(
        name="join",
        about="let this node into a cell, with a join token",
        add_arguments=join.add_arguments,
        run=join.join,
    ),
    Verb(
        name="doctor",
        about="say what on this node keeps its agent from working",
        add_arguments=doctor.add_arguments,
        run=doctor.diagnose,
    ),
)


def main() -> None:
    run_daemon("novacron-agent", __doc__, DEFAULT_CONFIG, _load, _run, VERBS)


def _load(path: Path) -> AgentConfig:
    config = load_config(path, AgentConfig, os.environ)
    check_pools(config.hypervisor)
    return config


def _run(config: AgentConfig, load: Callable[[], AgentConfig]) -> None:
    set_up_logging(config.log_level, os.environ)
    asyncio.run(serve(config, load))


async def serve(config: AgentConfig, load: Callable[[], AgentConfig]) -> None:
    """Serve until a signal asks to stop; guests are left as they are."""
    systemd = Systemd(os.environ)
    tls = _material(config)
    rng = random.SystemRandom()
    node = _node_facts(config)
    disk = ThreadOffload("fence")
    sampling = ThreadOffload("sampling")
    state = FileLog(config.state_dir / "fence")
    clock = SystemClock()
    relays = NodeRelays(relay_settings(config), os.environ)
    hypervisor = open_driver(config, node.boot_id, clock, rng)
    dialler = Dialler(tls, rng, lambda address: asyncio.to_thread(why_not, address, config.tls))
    renewal = _renewal(config, dialler, disk, clock, rng)
    outbox = Outbox(config.telemetry.batch_period_s)
    agent = Agent(
        node,
        config.controlplane,
        AgentPorts(
            hypervisor=hypervisor,
            relays=relays,
            log=state,
            offload=disk,
            dial=dialler.session,
            rng=rng,
        ),
    )
    sampler = Sampler(
        NodeSampler(lambda: agent.node_id or "", sampling, clock).sample,
        hypervisor.samples,
        outbox,
        sample_period_s=config.telemetry.sample_period_s,
        batch_period_s=config.telemetry.batch_period_s,
    )
    telemetry = Telemetry(
        config.controlplane, dialler.telemetry, outbox, agent.telemetry_hello, clock, rng
    )
    figures = Figures(agent, sampler, outbox, telemetry)
    exporter = AgentExporter(figures.agent, figures.domains)
    metrics = MetricsServer(exporter.render, CONTENT_TYPE)
    await metrics.start(*host_and_port(config.metrics.listen))
    relays.start(*host_and_port(config.relay.listen))
    log.info("serving", extra={"node": node.name, "boot": node.boot_id})
    remembering = asyncio.ensure_future(remember_probe(hypervisor, config, node.boot_id))
    try:
        await run_until_asked_to_stop(
            hypervisor.run(),
            agent.run(),
            sampler.run(),
            telemetry.run(),
            relays.run(),
            dialler.keep_open(config.controlplane),
            renewal.run(),
            _watched(systemd, hypervisor),
            on_hangup=partial(_hung_up, Reload(config, load, CHANGEABLE), renewal),
        )
    finally:
        systemd.ending()
        remembering.cancel()
        relays.stop()
        await metrics.close()
        await dialler.close()
        await hypervisor.close()
        state.close()
        disk.close()
        sampling.close()


def _hung_up(reload: Reload[AgentConfig], renewal: CertificateRenewal) -> None:
    """Take over what may change of the configuration, and renew the certificates."""
    reload()
    renewal.renew_now()


def _renewal(
    config: AgentConfig, dialler: Dialler, disk: Offload, clock: Clock, rng: random.Random
) -> CertificateRenewal:
    return CertificateRenewal(
        IdentityFiles(config),
        config.controlplane,
        dialler.renew,
        lambda key: request_in_a_process(config.node_name, key),
        lambda: dialler.use(_material(config)),
        disk,
        clock,
        rng,
    )


def _material(config: AgentConfig) -> TlsMaterial:
    return load_material(config.tls.ca, config.tls.certificate, config.tls.key)


async def _watched(systemd: Systemd, hypervisor: Driver) -> None:
    """Tell systemd once libvirt answers, and from then on that this agent lives.

    A control plane that is away keeps no agent from being ready: its guests are looked after.
    """
    await hypervisor.wait_connected()
    systemd.serving("looks after this node's VMs")
    await systemd.stay_alive()


def _node_facts(config: AgentConfig) -> NodeFacts:
    return NodeFacts(
        name=config.node_name,
        address=config.address,
        relay_address=f"{config.address}:{host_and_port(config.relay.listen)[1]}",
        labels=config.labels,
        boot_id=BOOT_ID_FILE.read_text(encoding="ascii").strip(),
        incarnation=uuid.uuid4().hex,
        agent_version=VERSION,
    )


if __name__ == "__main__":
    main()
