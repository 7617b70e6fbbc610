"""Relays between two nodes' agents carry libvirt's own protocol to a real libvirtd."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import libvirt
import pytest
from msgspec.structs import replace

from tests.contract.libvirt_process import LibvirtProcess, libvirt_process
from tests.unit.relay_world import (
    DESTINATION,
    NAME,
    SOURCE,
    RelayWorld,
    serving,
    short_directory,
)

pytestmark = pytest.mark.libvirt


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[LibvirtProcess]:
    with libvirt_process() as process:
        yield process


@pytest.fixture
def world() -> Iterator[RelayWorld]:
    with short_directory() as root:
        made = RelayWorld(root)
        try:
            yield made
        finally:
            made.stop()


async def test_a_client_of_a_relay_talks_to_the_destinations_libvirtd(
    libvirtd: LibvirtProcess, world: RelayWorld
) -> None:
    def ask(uri: str) -> tuple[str, str]:
        connection = libvirt.open(uri)
        try:
            return connection.getHostname(), connection.getCapabilities()
        finally:
            connection.close()

    source = world.relays(world.settings(SOURCE))
    destination = world.relays(replace(world.settings(DESTINATION), libvirt_socket=libvirtd.socket))
    async with serving(destination) as world.port:
        uri = await source.open(NAME, world.target, await destination.admit(NAME, SOURCE))
        through = await asyncio.to_thread(ask, uri)
        await world.until_none_is_left()

    assert through == await asyncio.to_thread(ask, libvirtd.uri)
