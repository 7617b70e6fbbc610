"""The connections to libvirtd: opened, watched, given up and opened again.

Owns libvirt's event loop (one thread per process), three connections and the threads that wait for
their answers. Nothing here blocks the asyncio loop. While libvirtd is away every call raises
HypervisorUnavailable at once; after each reconnection the listener is told that events were lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import libvirt
from msgspec import Struct

from shared.errors import DomainNotFound, HypervisorError, HypervisorUnavailable
from shared.retry import Backoff

T = TypeVar("T")
Work = Callable[[libvirt.virConnect], T]

# A libvirtd that is silent for 5 s x (3 + 1) is taken to be dead; its calls then end.
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
# libvirtd answers five requests of a connection at once; more threads would only wait inside it.
CALLS_AT_ONCE_MAX = 5
# A statistics call that a hung QEMU holds keeps its thread; as many may hang as libvirtd bears.
STATISTICS_AT_ONCE_MAX = 4
# libvirt itself gives up on a busy domain after 30 s; past this only a hung QEMU is left.
CALL_TIMEOUT_S = 60.0
# Opening and closing take milliseconds; only a stopped libvirtd lets a client wait.
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
RECONNECT = Backoff(first_s=0.2, cap_s=5.0)

_log = logging.getLogger(__name__)
_event_loop_lock = threading.Lock()
_event_loop_runs = False


class Connections(Struct, frozen=True):
    """``acting`` changes domains and carries events; the others never wait behind it.

    ``lost`` is set once any of them has died. Each set of connections has its own, so that a late
    word about an earlier set never ends the present one.
    """

    acting: libvirt.virConnect
    reading: libvirt.virConnect
    statistics: libvirt.virConnect
    callback_id: int
    lost: asyncio.Event

    def each(self) -> tuple[libvirt.virConnect, ...]:
        return (self.acting, self.reading, self.statistics)


class LibvirtLink:
    """Keeps the connections to one libvirtd."""

    def __init__(
        self,
        uri: str,
        rng: random.Random,
        prepare: Work[None],
        notify: Callable[[str], None],
    ) -> None:
        """``prepare`` runs in a thread on each new connection, before any other call."""
        self._uri = uri
        self._rng = rng
        self._prepare = prepare
        self._notify = notify
        self._connections: Connections | None = None
        self._connected = asyncio.Event()
        self._closed = False
        self._opening: Future[Connections] | None = None
        self._opener = ThreadPoolExecutor(1, "libvirt-open")
        self._actors = ThreadPoolExecutor(CALLS_AT_ONCE_MAX, "libvirt-act")
        self._readers = ThreadPoolExecutor(CALLS_AT_ONCE_MAX, "libvirt-read")
        self._samplers = ThreadPoolExecutor(STATISTICS_AT_ONCE_MAX, "libvirt-statistics")

    async def run(self) -> None:
        """Keep the connections up until cancelled or closed, and close them then."""
        _ensure_event_loop()
        loop = asyncio.get_running_loop()
        delays = RECONNECT.delays(self._rng)
        try:
            while not self._closed:
                try:
                    connections = await self._open(loop)
                except HypervisorUnavailable as error:
                    _log.warning("libvirtd is out of reach: %s", error)
                    await asyncio.sleep(next(delays))
                    continue
                delays = RECONNECT.delays(self._rng)
                self._connections = connections
                self._connected.set()
                self._notify("")
                await connections.lost.wait()
                if not self._closed:
                    _log.warning("the connection to libvirtd is lost")
                await self._give_up(loop)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connections and end the threads; does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        if self._opening is not None:
            self._opening.add_done_callback(_close_late)
        if self._connections is not None:
            self._connections.lost.set()
        await self._give_up(asyncio.get_running_loop())
        for executor in (self._opener, self._actors, self._readers, self._samplers):
            executor.shutdown(wait=False, cancel_futures=True)

    async def wait_connected(self) -> None:
        """Return once libvirtd can be asked."""
        await self._connected.wait()

    async def act(self, work: Work[T]) -> T:
        """Run ``work`` in a thread on the acting connection.

        Raises HypervisorUnavailable also when no answer came in CALL_TIMEOUT_S: the call may have
        been carried out.
        """
        live = self._live()
        return await _call(live, live.acting, self._actors, work, CALL_TIMEOUT_S)

    async def read(self, work: Work[T]) -> T:
        """Run ``work`` in a thread on the reading connection."""
        live = self._live()
        return await _call(live, live.reading, self._readers, work, CALL_TIMEOUT_S)

    async def statistics(self, work: Work[T], timeout_s: float) -> T:
        """Run ``work`` in a thread on the statistics connection; it may be left hanging."""
        live = self._live()
        return await _call(live, live.statistics, self._samplers, work, timeout_s)

    def _live(self) -> Connections:
        if self._connections is None or self._connections.lost.is_set():
            raise HypervisorUnavailable("libvirtd is out of reach")
        return self._connections

    async def _open(self, loop: asyncio.AbstractEventLoop) -> Connections:
        """Open the connections; an opening that hangs is waited for again, never doubled."""
        if self._opening is None:
            self._opening = self._opener.submit(self._open_blocking, loop)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                opened = await asyncio.shield(asyncio.wrap_future(self._opening))
        except TimeoutError:
            raise HypervisorUnavailable(f"{self._uri} does not answer") from None
        except libvirt.libvirtError as error:
            self._opening = None
            raise HypervisorUnavailable(str(error)) from error
        self._opening = None
        return opened

    def _open_blocking(self, loop: asyncio.AbstractEventLoop) -> Connections:
        opened: list[libvirt.virConnect] = []
        try:
            for _ in range(3):
                connection = libvirt.open(self._uri)
                opened.append(connection)
                connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            self._prepare(opened[0])
            return self._watch(*opened, loop=loop)
        except BaseException:
            for connection in opened:
                _close_quietly(connection)
            raise

    def _watch(
        self,
        acting: libvirt.virConnect,
        reading: libvirt.virConnect,
        statistics: libvirt.virConnect,
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> Connections:
        lost = asyncio.Event()

        def closed(_connection: object, _reason: int, _opaque: object) -> None:
            _tell(loop, lost.set)

        def changed(_connection: object, domain: Any, *_details: object) -> None:
            _tell(loop, self._notify, domain.name())

        for connection in (acting, reading, statistics):
            connection.registerCloseCallback(closed, None)
        callback_id = acting.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, changed, None
        )
        return Connections(acting, reading, statistics, callback_id, lost)

    async def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        connections, self._connections = self._connections, None
        self._connected.clear()
        if connections is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await loop.run_in_executor(self._opener, _close_all, connections)


def named_error(error: libvirt.libvirtError, *, alive: bool) -> HypervisorError:
    """Return what a libvirt error means: the daemon is gone, the domain is, or neither."""
    if not alive:
        return HypervisorUnavailable(f"libvirtd is out of reach: {error}")
    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return DomainNotFound(str(error))
    return HypervisorError(str(error))


async def _call(
    live: Connections,
    connection: libvirt.virConnect,
    executor: ThreadPoolExecutor,
    work: Work[T],
    timeout_s: float,
) -> T:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            return await loop.run_in_executor(executor, work, connection)
    except TimeoutError:
        raise HypervisorUnavailable(f"no answer from libvirt within {timeout_s:g} s") from None
    except libvirt.libvirtError as error:
        named = named_error(error, alive=_is_alive(connection))
        if isinstance(named, HypervisorUnavailable):
            live.lost.set()
        raise named from error


def _close_all(connections: Connections) -> None:
    # A connection that is closed with callbacks registered stays open behind our back.
    with contextlib.suppress(libvirt.libvirtError):
        connections.acting.domainEventDeregisterAny(connections.callback_id)
    for connection in connections.each():
        _close_quietly(connection)


def _close_late(opening: Future[Connections]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _close_all(opening.result())


def _is_alive(connection: libvirt.virConnect) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _close_quietly(connection: libvirt.virConnect) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.unregisterCloseCallback()
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    # The loop may be closed already when libvirt speaks its last words.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _ensure_event_loop() -> None:
    """Start libvirt's own event loop; it must be there before the first connection."""
    global _event_loop_runs  # noqa: PLW0603 - libvirt allows one loop per process
    with _event_loop_lock:
        if _event_loop_runs:
            return
        # libvirt would print each error besides raising it.
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _event_loop_runs = True


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
