"""Calls that take long: they outlive whoever asked, and never begin once they were given up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import libvirt
import pytest

from agent.libvirt_connection import LibvirtLink
from agent.libvirt_lane import DETACHED_THREAD, run_detached
from shared.errors import DomainNotFound, HypervisorError, HypervisorUnavailable
from tests.contract.libvirt_process import LibvirtProcess, libvirt_process
from tests.source_tree import ROOT

pytestmark = pytest.mark.libvirt

WAIT_LIMIT_S = 30

# A process with a migration under way that will never end: asked to stop, it is to be gone at once.
_PROCESS = """
import asyncio, sys, time
from agent import libvirt_lane
from shared.lifetime import run_until_asked_to_stop

libvirt_lane.open_connection = lambda uri: None

def migrate(connection):
    print("begun", flush=True)
    time.sleep(600)

async def travel():
    await asyncio.wrap_future(libvirt_lane.run_detached("", migrate))

asyncio.run(run_until_asked_to_stop(travel()))
"""


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[LibvirtProcess]:
    with libvirt_process() as process:
        yield process


@pytest.fixture
async def link(libvirtd: LibvirtProcess) -> AsyncIterator[LibvirtLink]:
    made = LibvirtLink(
        libvirtd.uri,
        random.Random(1),
        lambda _: None,
        lambda: None,
        lambda *_: None,
        lambda *_: None,
    )
    running = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(WAIT_LIMIT_S):
            await made.wait_connected()
        yield made
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


class LongWork:
    """Work that a test ends, and sees begin and end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.ended = threading.Event()

    def __call__(self, connection: libvirt.virConnect) -> str:
        self.begun.set()
        self.may_end.wait(WAIT_LIMIT_S)
        try:
            return str(connection.getHostname())
        finally:
            self.ended.set()


async def seen(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_LIMIT_S)


async def test_long_work_answers_and_its_errors_are_named(link: LibvirtLink) -> None:
    work = LongWork()
    work.may_end.set()
    assert await link.run_long(work) == "node"
    with pytest.raises(DomainNotFound):
        await link.run_long(lambda connection: connection.lookupByName("nobody"))
    with pytest.raises(HypervisorError):
        await link.run_long(lambda connection: connection.defineXML("<domain/>"))


async def test_long_work_goes_on_without_the_one_who_asked(link: LibvirtLink) -> None:
    work = LongWork()
    asking = asyncio.create_task(link.run_long(work))
    await seen(work.begun)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not work.ended.is_set()
    work.may_end.set()
    await seen(work.ended)


async def test_the_death_of_libvirtd_ends_the_wait_for_long_work(
    link: LibvirtLink, libvirtd: LibvirtProcess
) -> None:
    work = LongWork()
    asking = asyncio.create_task(link.run_long(work))
    await seen(work.begun)
    libvirtd.kill()
    try:
        with pytest.raises(HypervisorUnavailable):
            await asking
        with pytest.raises(HypervisorUnavailable):
            await link.run_long(work)
    finally:
        libvirtd.start()
    work.may_end.set()
    await seen(work.ended)


async def test_long_work_that_finds_libvirtd_dead_says_so(
    link: LibvirtLink, libvirtd: LibvirtProcess
) -> None:
    """What libvirt's client says of it first is an error like any other."""

    def kill_and_ask(connection: libvirt.virConnect) -> str:
        libvirtd.kill()
        return str(connection.getHostname())

    try:
        with pytest.raises(HypervisorUnavailable):
            await asyncio.wrap_future(run_detached(libvirtd.uri, kill_and_ask))
    finally:
        libvirtd.start()


async def test_what_is_given_up_before_it_began_never_begins(
    link: LibvirtLink, libvirtd: LibvirtProcess
) -> None:
    work = LongWork()
    work.may_end.set()
    libvirtd.signal_libvirtd(signal.SIGSTOP)
    try:
        asking = asyncio.create_task(link.run_long(work))
        await asyncio.sleep(0.5)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    finally:
        libvirtd.signal_libvirtd(signal.SIGCONT)
    threads = [each for each in threading.enumerate() if each.name == DETACHED_THREAD]
    assert len(threads) == 1, "it still waits for its connection"
    await asyncio.to_thread(threads[0].join, WAIT_LIMIT_S)
    assert not threads[0].is_alive()
    assert not work.begun.is_set()


def test_a_process_ends_at_once_although_a_migration_is_under_way() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROCESS], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert process.stdout is not None, "it is a pipe"
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_LIMIT_S) == 0
    finally:
        process.kill()
        process.communicate()
