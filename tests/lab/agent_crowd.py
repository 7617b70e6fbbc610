"""A thousand agents' sessions in one process: their streams, hellos, heartbeats and reports, no
guests.

Each holds a connection to every replica and keeps a session with the leader as an agent does;
whatever VM it is told to run, it reports as running. Reads one JSON object from standard input
(``replicas``, ``cell``, ``count``), prints ``joined`` once all are in session, and ends with
standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import sys
from pathlib import Path

from agent.session import GREETING_TIMEOUT_S, RECONNECT_BACKOFF, LeaderChannel
from agent.session_grpc import Dialler
from shared.errors import Disconnected, NovacronError
from shared.lifetime import until_one_ends
from shared.model import (
    CpuFacts,
    Inventory,
    ObservedPower,
    PoolFacts,
    Term,
    VersionFacts,
)
from shared.protocol import (
    Desired,
    DesiredTogether,
    Heartbeat,
    Hello,
    Intent,
    NotLeader,
    ReportsTogether,
    TermAccepted,
    VmReport,
    Welcome,
)
from shared.tls import load_material
from shared.version import VERSION

INVENTORY = Inventory(
    cpus=128,
    memory_mib=1 << 20,
    cpu=CpuFacts(model="qemu64"),
    pools=(PoolFacts(name="default", capacity_gib=10_000.0, free_gib=10_000.0),),
    networks=("lan",),
    artefacts=("tiny-kernel", "tiny-initrd"),
    versions=VersionFacts(agent=VERSION, libvirt="9.0.0", qemu="7.2.0", kernel="6.1"),
)


def node_name(number: int) -> str:
    return f"crowd-{number}"


def boot_id(number: int) -> str:
    return f"boot-{number}"


class Member:
    """One agent of the crowd."""

    def __init__(self, number: int, replicas: tuple[str, ...], cell: Path) -> None:
        self._name, self._boot_id = node_name(number), boot_id(number)
        self._replicas = replicas
        directory = cell / "nodes" / self._name
        tls = load_material(cell / "ca.crt", directory / "agent.crt", directory / "agent.key")
        self._rng = random.Random(number)
        self._dialler = Dialler(tls, self._rng)
        self._reports: dict[str, VmReport] = {}
        self._term = Term(0, 0)
        self.joined = asyncio.Event()

    async def run(self) -> None:
        await until_one_ends(self._dialler.keep_open(self._replicas), self._keep_session())

    async def _keep_session(self) -> None:
        delays = RECONNECT_BACKOFF.delays(self._rng)
        hint: str | None = None
        for turn in itertools.count(self._rng.randrange(len(self._replicas))):
            address, hint = hint or self._replicas[turn % len(self._replicas)], None
            with contextlib.suppress(NovacronError, TimeoutError):
                hint = await self._attempt(address)
            if self.joined.is_set():
                delays = RECONNECT_BACKOFF.delays(self._rng)
            self.joined.clear()
            await asyncio.sleep(next(delays))

    async def _attempt(self, address: str) -> str | None:
        channel: LeaderChannel = await self._dialler.session(address)
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await channel.send(self._hello())
                answer = await channel.receive()
                if isinstance(answer, NotLeader):
                    if answer.agent_address is None:
                        raise Disconnected("nobody leads")
                    return answer.agent_address
                if not isinstance(answer, Welcome):
                    raise Disconnected("refused")
                self._term = answer.term
                await channel.send(TermAccepted(term=answer.term))
            self.joined.set()
            await until_one_ends(
                self._receive(channel), self._beat(channel, answer.heartbeat_period_s)
            )
        finally:
            await channel.close()
        return None

    async def _receive(self, channel: LeaderChannel) -> None:
        while True:
            message = await channel.receive()
            told = message.desired if isinstance(message, DesiredTogether) else (message,)
            reports = [_runs(d) for d in told if isinstance(d, Desired) and d.intent is Intent.RUN]
            if reports:
                self._reports |= {report.vm_id: report for report in reports}
                await channel.send(ReportsTogether(reports=tuple(reports)))

    async def _beat(self, channel: LeaderChannel, period_s: float) -> None:
        for number in itertools.count(1):
            await channel.send(Heartbeat(number=number))
            await asyncio.sleep(period_s)

    def _hello(self) -> Hello:
        return Hello(
            node_name=self._name,
            boot_id=self._boot_id,
            incarnation=self._name,
            address="192.0.2.1",
            agent_version=VERSION,
            highest_term=self._term,
            inventory=INVENTORY,
            domains=tuple(self._reports.values()),
            together=True,
        )


def _runs(desired: Desired) -> VmReport:
    return VmReport(
        vm_id=desired.vm_id,
        generation=desired.generation,
        power=ObservedPower.RUNNING,
        permit_used=True,
        highest_used=desired.generation,
        revision=desired.revision,
    )


async def main() -> None:
    loop = asyncio.get_running_loop()
    order = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    members = [
        Member(number, tuple(order["replicas"]), Path(order["cell"]))
        for number in range(order["count"])
    ]
    running = [asyncio.ensure_future(member.run()) for member in members]
    for member in members:
        await member.joined.wait()
    print("joined", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
