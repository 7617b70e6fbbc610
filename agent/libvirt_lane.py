"""A lane of calls to libvirtd: some threads, and a connection for each call that is under way.

Calls never share a connection. A call that a hung QEMU holds would otherwise hold up its
neighbours: libvirt's client lets one waiting thread do the input and output of all the others on
its connection, and now and then that thread sleeps on (seen with 9.0: until the next keepalive).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import libvirt

from shared.errors import HypervisorUnavailable

T = TypeVar("T")
Work = Callable[[libvirt.virConnect], T]

# A libvirtd that is silent for 5 s x (3 + 1) is taken to be dead; its calls then end.
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
DETACHED_THREAD = "libvirt-detached"


class Lane:
    """Runs work in at most ``width`` threads, each with a connection of its own to ``uri``."""

    def __init__(self, name: str, uri: str, width: int) -> None:
        self._uri = uri
        self._threads = ThreadPoolExecutor(width, f"libvirt-{name}")
        self._lock = threading.Lock()
        self._idle: list[libvirt.virConnect] = []
        self._ended = False

    def submit(self, work: Work[T]) -> Future[T]:
        """Run ``work`` in a thread. It raises HypervisorUnavailable and libvirt's errors."""
        return self._threads.submit(self._run, work)

    def close_idle(self) -> None:
        """Close the connections that no call uses; blocks."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            close_quietly(connection)

    def end(self) -> None:
        """Take no more work; calls under way end by themselves and close their connections."""
        with self._lock:
            self._ended = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Work[T]) -> T:
        connection = self._take()
        try:
            return work(connection)
        except libvirt.libvirtError as error:
            if is_alive(connection):
                raise
            raise HypervisorUnavailable(f"libvirtd is out of reach: {error}") from error
        finally:
            self._give_back(connection)

    def _take(self) -> libvirt.virConnect:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return open_connection(self._uri)
            if is_alive(connection):
                return connection
            close_quietly(connection)

    def _give_back(self, connection: libvirt.virConnect) -> None:
        with self._lock:
            keep = not self._ended and is_alive(connection)
            if keep:
                self._idle.append(connection)
        if not keep:
            close_quietly(connection)


def run_detached(uri: str, work: Work[T]) -> Future[T]:
    """Run ``work`` in a thread, with a connection, that may outlive this process's interest in it.

    A thread pool's threads would be waited for at the process's end; a migration goes on without.
    An answer that is cancelled while the connection is still being opened never begins: a libvirtd
    that was held up would else begin what has been given up.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            connection = open_connection(uri)
        except HypervisorUnavailable as error:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
            return
        try:
            if answer.set_running_or_notify_cancel():
                _answer(answer, work, connection)
        finally:
            close_quietly(connection)

    threading.Thread(target=run, name=DETACHED_THREAD, daemon=True).start()
    return answer


def _answer(answer: Future[T], work: Work[T], connection: libvirt.virConnect) -> None:
    try:
        result = work(connection)
    except libvirt.libvirtError as error:
        if is_alive(connection):
            answer.set_exception(error)
        else:
            answer.set_exception(HypervisorUnavailable(f"libvirtd is out of reach: {error}"))
    except BaseException as error:
        answer.set_exception(error)
    else:
        answer.set_result(result)


def open_connection(uri: str) -> libvirt.virConnect:
    """Return a new connection that notices a dead libvirtd. Raises HypervisorUnavailable."""
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise HypervisorUnavailable(f"libvirtd is out of reach: {error}") from error
    try:
        connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        close_quietly(connection)
        raise HypervisorUnavailable(f"libvirtd is out of reach: {error}") from error
    return connection


def is_alive(connection: libvirt.virConnect) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def close_quietly(connection: libvirt.virConnect) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()
