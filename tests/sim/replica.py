"""A replica in the simulation: its disk, its processes one after the other, its supervisor."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from controlplane.app import ControlPlane, Ports, ReplicaSettings
from controlplane.sessions.hub import GREETING_TIMEOUT_S
from controlplane.sessions.peer_messages import PEER_METHOD, PeerAnswer, PeerRequest
from controlplane.store.etcd_pool import EtcdStore
from controlplane.store.history import History
from controlplane.telemetry.exporter import unscraped_metrics
from controlplane.telemetry.windows import Windows
from shared.errors import Disconnected, NovacronError, OutcomeUnknown
from shared.offload import inline
from shared.protocol import SESSION_METHOD, NotLeader
from shared.tls import Identity, Role
from shared.version import VERSION
from tests.sim.etcd_link import EtcdLink
from tests.sim.ledger import Died
from tests.sim.network import Stream
from tests.sim.previous_processes import make_replica, replica_kinds, serve_as
from tests.sim.process import Process, later

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

log = logging.getLogger(__name__)

T = TypeVar("T")

# As a supervisor restarts what died.
RESTART_DELAY_S = 1.0


class SimReplica:
    """``is_previous``: its next process is of the previous release; then ``previous`` is it.

    ``slow_disk_s``: how long SQLite takes for each thing, at least and at most.
    """

    def __init__(self, cluster: SimCluster, name: str) -> None:
        self._cluster = cluster
        self._rng = cluster.part()
        self.name = name
        self._disk = History(None, inline)
        self.slow_disk_s: tuple[float, float] | None = None
        self._started = 0
        self._store: EtcdStore | None = None
        self._main: asyncio.Task[None] | None = None
        self.process: Process | None = None
        self.control_plane: ControlPlane | None = None
        self.is_previous = False
        self.previous: Any = None

    @property
    def address(self) -> str:
        return f"{self.name}:8444"

    def start(self) -> None:
        """Start a new process on what the disk has kept."""
        assert self.process is None, "a replica has one process"
        self._started += 1
        process = Process(
            self.name, f"{self.name}.{self._started}", self._cluster.host_clock(self.name)
        )
        self._cluster.trace.note(f"start {process.incarnation}")
        self.process = process
        self._main = process.spawn(self._run(process), process.incarnation)

    def crash(self, *, power_loss: bool = False) -> None:
        """kill -9."""
        if self.process is None:
            return
        self._cluster.trace.note(f"kill {self.process.incarnation}")
        process, self.process, self.control_plane = self.process, None, None
        self.previous = None
        process.kill(power_loss=power_loss)

    async def stop(self) -> None:
        """End as on SIGTERM."""
        if self.process is not None and self._main is not None:
            self._main.cancel()
            await asyncio.wait({self._main})
            self.crash()
        await self._disk.close()

    async def _run(self, process: Process) -> None:
        rng = random.Random(self._rng.getrandbits(64))
        make = self._make_previous if self.is_previous else self._make_present
        try:
            control_plane, store = make(process, rng)
        except Exception as error:
            self._cluster.observe(Died(process.incarnation, repr(error)))
            raise
        await self._run_to_its_end(process, control_plane, store)

    def _make_previous(self, process: Process, rng: random.Random) -> tuple[Any, Any]:
        cluster = self._cluster
        disk = _HistoryOfProcess(self._disk, process, self._disk_delay_s)
        self.previous, store = make_replica(
            cluster, self.name, self.address, process, (self._disk, disk.offload), rng
        )
        serve = serve_as(self.previous, cluster.founding.cluster.cell)
        cluster.network.listen(process, self.address, serve, replica_kinds())
        return self.previous, store

    def _make_present(self, process: Process, rng: random.Random) -> tuple[Any, Any]:
        cluster = self._cluster
        links = [EtcdLink(cluster.network, process, each) for each in cluster.etcd.members]
        store = EtcdStore(links, rng, cluster.settings.store)
        windows = Windows()
        ports = Ports(
            store=store,
            history=_HistoryOfProcess(self._disk, process, self._disk_delay_s),
            clock=cluster.clock_of(self.name),
            rng=rng,
            founding=cluster.founding,
            offload=inline,
            windows=windows,
            metrics=unscraped_metrics(windows),
            peers=_PeersOfProcess(cluster, process),
            settle_memory=_leave_memory,
        )
        settings = ReplicaSettings(
            name=self.name,
            incarnation=process.incarnation,
            url=f"https://{self.name}:8443",
            agent_address=self.address,
            version=VERSION,
            election=cluster.settings.election,
            sessions=cluster.settings.sessions,
            exchange_period_s=cluster.settings.exchange_period_s,
            comparison_period_s=cluster.settings.comparison_period_s,
        )
        control_plane = self.control_plane = ControlPlane(settings, ports)

        async def serve(method: str, stream: Stream, host: str) -> None:
            await _serve(control_plane, cluster.founding.cluster.cell, method, stream, host)

        cluster.network.listen(process, self.address, serve)
        return control_plane, store

    async def _run_to_its_end(self, process: Process, control_plane: Any, store: Any) -> None:
        try:
            await control_plane.run()
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            self._end(process, control_plane, error)
        finally:
            await store.close()

    def _disk_delay_s(self) -> float:
        return 0.0 if self.slow_disk_s is None else self._rng.uniform(*self.slow_disk_s)

    def _end(self, process: Process, control_plane: Any, error: BaseException) -> None:
        """Die of an error. Only a process that has not reached the store yet may do so."""
        foreseen = all(isinstance(each, NovacronError) for each in leaves(error))
        if not foreseen or control_plane.state.revision > 0:
            self._cluster.observe(Died(process.incarnation, repr(error)))
        if self.process is process:
            self.crash()
            later(RESTART_DELAY_S, self._start_again)

    def _start_again(self) -> None:
        if self.process is None:
            self.start()


async def _serve(
    control_plane: ControlPlane, cell: str, method: str, stream: Stream, host: str
) -> None:
    """Do what controlplane/sessions/grpc_server.py does with what a peer has opened."""
    try:
        if method == PEER_METHOD:
            peer = Identity(cell, Role.REPLICA, host)
            await stream.send(await control_plane.peers.answer(await stream.receive(), peer))
            return
        identity = Identity(cell, Role.AGENT, host)
        if method != SESSION_METHOD:
            await control_plane.telemetry.serve(stream, identity)
            return
        hub = control_plane.hub()
        if hub is None:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await stream.receive()
            await stream.send(NotLeader(agent_address=control_plane.leader_address()))
        else:
            await hub.serve(stream, identity)
    except (Disconnected, TimeoutError):
        pass
    except NovacronError as error:
        log.warning("the stream of %s ended: %s", host, error)


def _leave_memory() -> None:
    """Many replicas of many clusters share this process, one cluster after the other."""


def leaves(error: BaseException) -> Sequence[BaseException]:
    """Return the errors that a group is made of, however deep."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]


class _PeersOfProcess:
    """The port ``PeerCall``: a stream for each call, which ends with its answer."""

    def __init__(self, cluster: SimCluster, process: Process) -> None:
        self._cluster = cluster
        self._process = process

    async def __call__(self, address: str, request: PeerRequest, limit_s: float) -> PeerAnswer:
        self._process.check()
        try:
            async with asyncio.timeout(limit_s):
                stream = await self._cluster.network.dial(address, PEER_METHOD)
        except TimeoutError:
            raise Disconnected(f"{address} did not accept a connection in time") from None
        try:
            async with asyncio.timeout(limit_s):
                await stream.send(request)
                answer: PeerAnswer = await stream.receive()
                return answer
        except (Disconnected, TimeoutError) as error:
            raise OutcomeUnknown(f"{address} did not answer: {error}") from error
        finally:
            await stream.close()


class _HistoryOfProcess(History):
    """The replica's SQLite as one of its processes has it open."""

    def __init__(self, disk: History, process: Process, delay_s: Callable[[], float]) -> None:
        self._database: sqlite3.Connection = disk._database
        self._path = None
        self._dense_from = None
        self._is_prepared = True
        self._process = process
        self._delay_s = delay_s
        self._offload = self.offload

    async def offload(self, work: Callable[[], T]) -> T:
        self._process.check()
        delay_s = self._delay_s()
        if delay_s > 0:
            await asyncio.sleep(delay_s / 2)
            self._process.check()
        result = work()
        if delay_s > 0:
            await asyncio.sleep(delay_s / 2)
            self._process.check()
        return result

    async def close(self) -> None:
        """The disk stays."""
