"""Relays whose agents die on both ends: not a byte is lost, and they end by themselves.

A relay that dies within milliseconds of the switch makes libvirt run two guests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from agent.relay_files import ProcessKey, dial_file, holder, lives, used_file
from tests.unit.relay_parent import Part, Told, encode
from tests.unit.relay_world import (
    DESTINATION,
    NAME,
    SOURCE,
    RelayWorld,
    connected,
    exchange,
    short_directory,
    the_rest,
    until,
)

BULK = os.urandom(1 << 20)


class Agents:
    """Two processes, each with the relays of a node, and the pipe that is their standard error."""

    def __init__(self, world: RelayWorld, redirection: str) -> None:
        """``redirection`` is the shell's, of the agents' standard descriptors."""
        self.world = world
        self._shell = f'exec "$0" -m tests.unit.relay_parent "$1" {redirection}'
        self.stderr, self._given = os.pipe()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.uri = ""

    def start(self) -> None:
        """Open a relay from one agent to the other."""
        world = self.world
        destination = self._start(
            Part(settings=world.settings(DESTINATION), name=NAME, admits=SOURCE)
        )
        world.port = destination.port
        self.uri = self._start(
            Part(
                settings=world.settings(SOURCE),
                name=NAME,
                target=world.target,
                token=destination.token,
            )
        ).uri

    def signal_groups(self, number: signal.Signals) -> None:
        """Send both agents' process groups a signal, and wait for the agents' end."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.wait()

    def relays(self) -> tuple[ProcessKey, ProcessKey]:
        """Return the source's and the destination's end."""
        dial = holder(dial_file(self.world.root / SOURCE, NAME))
        used = holder(used_file(self.world.root / DESTINATION, NAME))
        assert dial is not None
        assert used is not None
        return dial, used

    def kill_source(self) -> None:
        self._processes[1].kill()
        self._processes[1].wait()

    def fill_stderr(self) -> None:
        """Write to standard error until it takes nothing more."""
        filler = os.dup(self._given)
        os.set_blocking(filler, False)
        try:
            while True:
                os.write(filler, bytes(65536))
        except BlockingIOError:
            pass
        finally:
            os.set_blocking(filler, True)
            os.close(filler)

    def break_stderr(self) -> None:
        os.close(self.stderr)
        self.stderr = -1

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        os.close(self._given)
        if self.stderr >= 0:
            os.close(self.stderr)

    def _start(self, part: Part) -> Told:
        process = subprocess.Popen(
            # A suite in a shell's background ignores interrupts, and so would the agent.
            ["env", "--default-signal=INT", "sh", "-c", self._shell, sys.executable, encode(part)],
            env=self.world.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._given,
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None, "it is a pipe"
        return msgspec.json.decode(process.stdout.readline(), type=Told)


@pytest.fixture
async def agents(request: pytest.FixtureRequest) -> AsyncIterator[Agents]:
    with short_directory() as root:
        world = RelayWorld(root)
        made = Agents(world, getattr(request, "param", ""))
        try:
            await asyncio.to_thread(made.start)
            yield made
            await asyncio.to_thread(made.signal_groups, signal.SIGKILL)
            await world.until_none_is_left()
        finally:
            world.stop()
            made.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_relays_outlive_their_agents(agents: Agents, number: signal.Signals) -> None:
    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, BULK) == BULK
        await asyncio.to_thread(agents.signal_groups, number)
        agents.break_stderr()

        assert await exchange(reader, writer, BULK) == BULK


async def test_a_relay_that_nobody_used_yet_outlives_its_agent(agents: Agents) -> None:
    """The destination's agent must live to take it in; the source's need not."""
    await asyncio.to_thread(agents.kill_source)
    agents.break_stderr()

    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, BULK) == BULK
        await asyncio.to_thread(agents.signal_groups, signal.SIGKILL)


async def test_nobody_reading_the_logs_holds_nothing_up(agents: Agents) -> None:
    agents.fill_stderr()
    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, BULK) == BULK


@pytest.mark.parametrize("agents", ["2>&-"], indirect=True)
async def test_an_agent_without_standard_error_has_relays_that_work(agents: Agents) -> None:
    """Their log lines must not go into whatever they open first."""
    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, BULK) == BULK


@pytest.mark.parametrize("agents", ["7</dev/zero"], indirect=True)
async def test_relays_hold_nothing_of_their_agents(agents: Agents) -> None:
    """Neither in their groups, nor with a descriptor of theirs but standard error."""
    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
        for key in agents.relays():
            assert os.getsid(key.pid) == os.getpgid(key.pid) == key.pid
            # Standard input and output; standard error; the local connection and the link.
            assert kinds_open(key.pid) == ["/dev/null", "/dev/null", "pipe", "socket", "socket"]


def kinds_open(pid: int) -> list[str]:
    """Return what the descriptors of a process are."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return sorted(str(link.readlink()).split(":")[0] for link in links)


@pytest.mark.parametrize("side", [SOURCE, DESTINATION])
async def test_a_later_agent_ends_what_an_earlier_one_left(agents: Agents, side: str) -> None:
    later = agents.world.relays(agents.world.settings(side))
    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
        dial, used = agents.relays()
        await asyncio.to_thread(agents.signal_groups, signal.SIGKILL)
        assert lives(dial)
        assert lives(used)

        if side == SOURCE:
            await later.close(NAME)
            assert not lives(dial)
        else:
            await later.revoke(NAME)
            assert not lives(used)

        assert await the_rest(reader) == b""
        await until(lambda: not lives(dial) and not lives(used))


async def test_a_destinations_end_ends_the_sources_without_any_agent(agents: Agents) -> None:
    world = agents.world
    async with connected(agents.uri) as (reader, writer):
        assert await exchange(reader, writer, b"x") == b"x"
        _, used = agents.relays()
        await asyncio.to_thread(agents.signal_groups, signal.SIGKILL)
        os.kill(used.pid, signal.SIGKILL)

        assert await reader.read() == b""
        await until(lambda: not world.processes())
