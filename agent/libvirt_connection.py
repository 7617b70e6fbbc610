"""The link to libvirtd: opened, watched, given up and opened again.

Owns libvirt's event loop (one thread per process), the connection that carries events and tells of
libvirtd's death, and four lanes of calls: acts, reads, jobs, statistics. Nothing here blocks the
asyncio loop. While libvirtd is away every call raises HypervisorUnavailable at once, also those
under way; after each reconnection the listener is told that events were lost.
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

from agent.libvirt_lane import Lane, Work, close_quietly, open_connection, run_detached
from shared.errors import DomainNotFound, HypervisorError, HypervisorUnavailable
from shared.retry import Backoff

T = TypeVar("T")

# More at once would only queue inside libvirtd, whose workers are 20; a hung QEMU holds one each.
CALLS_AT_ONCE_MAX = 5
STATISTICS_AT_ONCE_MAX = 4
# A node moves two guests out and two in at a time. Not more: libvirtd 9.0 starts its workers one by
# one, and with all of them held by a hung QEMU, whatever else is asked waits for the next request.
JOBS_AT_ONCE_MAX = 4
# libvirt itself gives up on a busy domain after 30 s; past this only a hung QEMU is left.
CALL_TIMEOUT_S = 60.0
# Opening and closing take milliseconds; only a stopped libvirtd lets a client wait.
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
RECONNECT = Backoff(first_s=0.2, cap_s=5.0)

_log = logging.getLogger(__name__)
_event_loop_lock = threading.Lock()
_event_loop_runs = False


class Watched(Struct, frozen=True):
    """The connection that carries events; ``lost`` is set once it has died.

    Each has its own ``lost``, so that a late word about an earlier connection never ends the
    present one.
    """

    connection: libvirt.virConnect
    callback_ids: tuple[int, ...]
    lost: asyncio.Event


class LibvirtLink:
    """Keeps the link to one libvirtd; ``run`` must run for any call to succeed."""

    def __init__(
        self,
        uri: str,
        rng: random.Random,
        prepare: Work[None],
        events_lost: Callable[[], None],
        domain_changed: Callable[[str, int, int], None],
        job_completed: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """``prepare`` runs in a thread on each new connection, before any other call.

        ``events_lost()`` is called when events come (again) from now on, ``domain_changed(name,
        event, detail)`` with libvirt's numbers after a domain has changed, ``job_completed(name,
        figures)`` after a long piece of work on it has ended; all on the event loop.
        """
        self._uri = uri
        self._rng = rng
        self._prepare = prepare
        self._events_lost = events_lost
        self._domain_changed = domain_changed
        self._job_completed = job_completed
        self._watched: Watched | None = None
        self._connected = asyncio.Event()
        self._closed = False
        self._opening: Future[Watched] | None = None
        self._opener = ThreadPoolExecutor(1, "libvirt-open")
        self._acts = Lane("act", uri, CALLS_AT_ONCE_MAX)
        self._reads = Lane("read", uri, CALLS_AT_ONCE_MAX)
        self._statistics = Lane("statistics", uri, STATISTICS_AT_ONCE_MAX)
        self._jobs = Lane("job", uri, JOBS_AT_ONCE_MAX)

    async def run(self) -> None:
        """Keep the link up until cancelled or closed, and close it then."""
        _ensure_event_loop()
        loop = asyncio.get_running_loop()
        delays = RECONNECT.delays(self._rng)
        try:
            while not self._closed:
                try:
                    watched = await self._open(loop)
                except HypervisorUnavailable as error:
                    _log.warning("%s", error)
                    await asyncio.sleep(next(delays))
                    continue
                delays = RECONNECT.delays(self._rng)
                self._watched = watched
                self._connected.set()
                self._events_lost()
                await watched.lost.wait()
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
        for lane in self._lanes():
            lane.end()
        await self._give_up(asyncio.get_running_loop())
        self._opener.shutdown(wait=False, cancel_futures=True)

    async def wait_connected(self) -> None:
        """Return once libvirtd can be asked."""
        await self._connected.wait()

    async def act(self, work: Work[T]) -> T:
        """Run ``work``, which changes something, in a thread.

        Raises HypervisorUnavailable also when libvirtd died or did not answer in CALL_TIMEOUT_S
        while the call was under way: it may have been carried out.
        """
        return await self._call(self._acts, work, CALL_TIMEOUT_S)

    async def read(self, work: Work[T]) -> T:
        """Run ``work`` in a thread; it never waits behind an act."""
        return await self._call(self._reads, work, CALL_TIMEOUT_S)

    async def read_job(self, work: Work[T]) -> T:
        """Run ``work`` in a thread, which asks a QEMU: one that hangs holds up no other read."""
        return await self._call(self._jobs, work, CALL_TIMEOUT_S)

    async def statistics(self, work: Work[T], timeout_s: float) -> T:
        """Run ``work`` in a thread; it may be left hanging."""
        return await self._call(self._statistics, work, timeout_s)

    async def run_long(self, work: Work[T]) -> T:
        """Run ``work`` for as long as it takes; once begun it goes on without its caller.

        Raises HypervisorUnavailable when libvirtd died, or fell silent, while it was under way.
        """
        watched = self._watched
        if watched is None or watched.lost.is_set():
            raise HypervisorUnavailable("libvirtd is out of reach")
        answer = asyncio.wrap_future(run_detached(self._uri, work))
        lost = asyncio.ensure_future(watched.lost.wait())
        try:
            await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise HypervisorUnavailable("libvirtd died while a migration was under way")
            return answer.result()
        except libvirt.libvirtError as error:
            raise _named(error) from error
        finally:
            lost.cancel()
            answer.add_done_callback(_forget)
            answer.cancel()

    def _lanes(self) -> tuple[Lane, ...]:
        return (self._acts, self._reads, self._jobs, self._statistics)

    async def _call(self, lane: Lane, work: Work[T], timeout_s: float) -> T:
        watched = self._watched
        if watched is None or watched.lost.is_set():
            raise HypervisorUnavailable("libvirtd is out of reach")
        answer = asyncio.wrap_future(lane.submit(work))
        lost = asyncio.ensure_future(watched.lost.wait())
        try:
            await asyncio.wait(
                (answer, lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done():
                return answer.result()
        except HypervisorUnavailable:
            watched.lost.set()
            raise
        except libvirt.libvirtError as error:
            raise _named(error) from error
        finally:
            lost.cancel()
            answer.cancel()
        if watched.lost.is_set():
            raise HypervisorUnavailable("libvirtd went out of reach during the call")
        raise HypervisorUnavailable(f"no answer from libvirt within {timeout_s:g} s")

    async def _open(self, loop: asyncio.AbstractEventLoop) -> Watched:
        """Open the connection; an opening that hangs is waited for again, never doubled."""
        if self._opening is None:
            self._opening = self._opener.submit(self._open_blocking, loop)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                watched = await asyncio.shield(asyncio.wrap_future(self._opening))
        except TimeoutError:
            raise HypervisorUnavailable(f"{self._uri} does not answer") from None
        except (libvirt.libvirtError, HypervisorUnavailable) as error:
            self._opening = None
            raise HypervisorUnavailable(str(error)) from error
        self._opening = None
        return watched

    def _open_blocking(self, loop: asyncio.AbstractEventLoop) -> Watched:
        connection = open_connection(self._uri)
        try:
            self._prepare(connection)
            return self._watch(connection, loop)
        except BaseException:
            close_quietly(connection)
            raise

    def _watch(self, connection: libvirt.virConnect, loop: asyncio.AbstractEventLoop) -> Watched:
        lost = asyncio.Event()

        def closed(_connection: object, _reason: int, _opaque: object) -> None:
            _tell(loop, lost.set)

        def changed(
            _connection: object, domain: Any, event: int, detail: int, _opaque: object
        ) -> None:
            _tell(loop, self._domain_changed, domain.name(), event, detail)

        def completed(_connection: object, domain: Any, figures: Any, _opaque: object) -> None:
            _tell(loop, self._job_completed, domain.name(), dict(figures))

        connection.registerCloseCallback(closed, None)
        events = (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, changed),
            (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, completed),
        )
        callback_ids = tuple(
            connection.domainEventRegisterAny(None, event, callback, None)
            for event, callback in events
        )
        return Watched(connection, callback_ids, lost)

    async def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        watched, self._watched = self._watched, None
        self._connected.clear()
        if watched is None:
            return
        watched.lost.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await loop.run_in_executor(self._opener, self._close_blocking, watched)

    def _close_blocking(self, watched: Watched) -> None:
        _close_watched(watched)
        for lane in self._lanes():
            lane.close_idle()


def _forget(answer: asyncio.Future[Any]) -> None:
    """Whoever asked has gone; what comes of it is looked at, not read from here."""
    if not answer.cancelled():
        answer.exception()


def _named(error: libvirt.libvirtError) -> HypervisorError:
    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return DomainNotFound(str(error))
    return HypervisorError(str(error))


def _close_watched(watched: Watched) -> None:
    # A connection that is closed with callbacks registered stays open behind our back.
    for callback_id in watched.callback_ids:
        with contextlib.suppress(libvirt.libvirtError):
            watched.connection.domainEventDeregisterAny(callback_id)
    with contextlib.suppress(libvirt.libvirtError):
        watched.connection.unregisterCloseCallback()
    close_quietly(watched.connection)


def _close_late(opening: Future[Watched]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _close_watched(opening.result())


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
