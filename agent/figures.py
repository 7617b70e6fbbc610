"""What the agent's own ``/metrics`` is made of: gathered at once, without asking libvirt."""

from __future__ import annotations

from collections.abc import Iterator

from agent.app import Agent
from agent.exporter import AgentFigures, DomainFigures
from agent.outbox import Outbox
from agent.sampler import Sampler
from agent.telemetry import Telemetry
from shared.units import MIB
from shared.version import VERSION


class Figures:
    def __init__(
        self, agent: Agent, sampler: Sampler, outbox: Outbox, telemetry: Telemetry
    ) -> None:
        self._agent = agent
        self._sampler = sampler
        self._outbox = outbox
        self._telemetry = telemetry

    def agent(self) -> AgentFigures:
        return AgentFigures(
            version=VERSION,
            session_connected=self._agent.session.connected,
            outbox_batches=len(self._outbox),
            outbox_dropped_samples=self._outbox.dropped,
            samples_taken=self._sampler.taken,
            sample_failures=self._sampler.failures,
            missed_rounds=self._sampler.missed_rounds,
            last_report_at=self._telemetry.last_taken_at,
        )

    def domains(self) -> Iterator[DomainFigures]:
        samples = {sample.object: sample for sample in self._sampler.latest()}
        for known in self._agent.reconciler.known():
            yield DomainFigures(
                domain=known.desired.domain_name,
                power=known.power,
                vcpus=known.desired.spec.vcpus,
                memory_max_bytes=known.desired.spec.memory_mib * MIB,
                sample=samples.get(known.desired.vm_id),
            )
